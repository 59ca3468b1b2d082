"""Shards against the two programs that know the format best, tarfile and webdataset, and against deliberate damage."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.data import shard_set as shard_set_module
from proteingpt.data import shards
from proteingpt.data.shards import ShardError, ShardSet, check_key, encode_sample, find_faults, write_shards
from proteingpt.protein import Protein, Sample, Turn


def make_sample(entry="1abc", chain="A", length=7, confidence=False, num_turns=2) -> Sample:
    rng = np.random.default_rng((length, num_turns))
    backbone = rng.normal(size=(length, 3, 3)).astype(np.float32)
    backbone[: min(1, length - 1)] = np.nan
    protein = Protein(
        entry,
        chain,
        "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWYX"), length)),
        backbone,
        rng.random(length).astype(np.float32) if confidence else None,
    )
    turns = tuple(Turn(f"Question {n} of {entry}?", f"{n} Å") for n in range(num_turns))
    return Sample(protein, f"About {entry}, β-barrel.", turns, {"source": {"file": f"{entry}.cif", "sha256": "0" * 64}})


SAMPLES = {
    "train": [
        make_sample(),
        make_sample("1abc", "a"),
        make_sample("2xyz", "A", 300, confidence=True),
        make_sample("3def", "B2", 1),
    ],
    "test": [make_sample("4ghi", "A", 20, num_turns=0)],
}


def write(directory: Path, samples=SAMPLES, samples_per_shard=3) -> dict:
    return write_shards(directory, samples, samples_per_shard=samples_per_shard, options={"seed": 42})


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / "shards")
    return tmp_path / "shards"


def assert_same(left: Sample, right: Sample) -> None:
    assert (left.protein.id, left.protein.chain, left.protein.sequence) == (
        right.protein.id,
        right.protein.chain,
        right.protein.sequence,
    )
    np.testing.assert_array_equal(left.protein.backbone, right.protein.backbone)
    assert (left.protein.confidence is None) == (right.protein.confidence is None)
    if left.protein.confidence is not None:
        np.testing.assert_array_equal(left.protein.confidence, right.protein.confidence)
    assert (left.description, left.turns, left.metadata) == (right.description, right.turns, right.metadata)


# --- other programs read what we wrote


def test_webdataset_reads_the_same_content(directory):
    urls = [str(directory / name) for name in ("train-00000.tar", "train-00001.tar")]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == ["1abc_A", "1abc_a", "2xyz_A", "3def_B2"]
    for sample, wanted in zip(found, SAMPLES["train"]):
        assert sample["backbone.npy"].dtype == np.float32
        np.testing.assert_array_equal(sample["backbone.npy"], wanted.protein.backbone)
        assert sample["sequence.txt"] == wanted.protein.sequence
        assert sample["qa.json"] == [{"Q": turn.question, "A": turn.answer} for turn in wanted.turns]
        assert sample["meta.json"] == {
            "id": wanted.protein.id,
            "chain": wanted.protein.chain,
            "description": wanted.description,
            **wanted.metadata,
        }
        if wanted.protein.confidence is None:
            assert "confidence.npy" not in sample
        else:
            np.testing.assert_array_equal(sample["confidence.npy"], wanted.protein.confidence)


def test_tarfile_finds_each_member_where_the_index_says(directory):
    records = [json.loads(line) for line in (directory / "train-00000.index.jsonl").read_text().splitlines()]
    raw = (directory / "train-00000.tar").read_bytes()
    with tarfile.open(directory / "train-00000.tar") as tar:
        members = {member.name: member for member in tar}
        assert list(members) == [f"{record['key']}.{name}" for record in records for name in record["members"]]
        for record in records:
            for name, (offset, size, _) in record["members"].items():
                member = members[f"{record['key']}.{name}"]
                assert (member.offset_data, member.size) == (offset, size)
                assert tar.extractfile(member).read() == raw[offset : offset + size]


def test_headers_are_plain_ustar_and_carry_nothing_of_the_machine(directory):
    with tarfile.open(directory / "train-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o444 and member.pax_headers == {}


def test_numpy_reads_the_coordinates_uncompressed(directory):
    with tarfile.open(directory / "test-00000.tar") as tar:
        array = np.load(io.BytesIO(tar.extractfile("4ghi_A.backbone.npy").read()), allow_pickle=False)
    np.testing.assert_array_equal(array, SAMPLES["test"][0].protein.backbone)


# --- our reader


def test_samples_come_back_as_they_went_in(directory):
    for split, samples in SAMPLES.items():
        shard_set = ShardSet(directory, split)
        assert shard_set.keys == [sample.key for sample in samples] and len(shard_set) == len(samples)
        for i, sample in enumerate(samples):
            assert_same(shard_set.read(i), sample)
            assert shard_set.read_text(i) == (sample.description, sample.turns)
        shard_set.close()


def test_lengths_and_turns_are_known_without_reading_samples(directory):
    train, test = ShardSet(directory, "train"), ShardSet(directory, "test")
    assert train.num_residues.dtype == train.num_turns.dtype == np.int32
    assert train.num_residues.tolist() == [7, 7, 300, 1] and train.num_turns.tolist() == [2, 2, 2, 2]
    assert test.num_residues.tolist() == [20] and test.num_turns.tolist() == [0]


def test_arrays_belong_to_the_caller(directory):
    shard_set = ShardSet(directory, "train")
    shard_set.read(2).protein.backbone[:] = 0
    assert_same(shard_set.read(2), SAMPLES["train"][2])


def test_a_number_out_of_range_is_an_index_error(directory):
    shard_set = ShardSet(directory, "train")
    for i in (-1, 4):
        with pytest.raises(IndexError, match=f"sample {i} of 4 in split 'train'"):
            shard_set.read(i)


def test_many_threads_read_the_same_samples(directory, monkeypatch):
    monkeypatch.setattr(shard_set_module, "MAX_OPEN_SHARDS", 1)
    shard_set = ShardSet(directory, "train")
    failures = []

    def read_all(offset: int) -> None:
        try:
            for n in range(200):
                i = (n + offset) % 4
                assert_same(shard_set.read(i), SAMPLES["train"][i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read_all, args=(offset,)) for offset in range(8)]
    num_open = len(os.listdir("/proc/self/fd"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    # At most the one cached file is left open, though two shards were read.
    assert len(os.listdir("/proc/self/fd")) <= num_open + 1
    shard_set.close()
    with pytest.raises(ShardError, match="after close"):
        shard_set.read(0)


def test_an_empty_split_has_no_samples(tmp_path):
    write(tmp_path, {"train": SAMPLES["train"], "test": []})
    shard_set = ShardSet(tmp_path, "test")
    assert len(shard_set) == 0 and shard_set.num_residues.shape == (0,)
    shard_set.verify()


# --- the manifest


def test_the_manifest_counts_and_checksums_agree_with_the_files(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and manifest["options"] == {"seed": 42}
    first, second = manifest["splits"]["train"]
    assert first["file"] == "train-00000.tar" and second["file"] == "train-00001.tar"
    assert (first["num_samples"], first["num_residues"], first["num_turns"]) == (3, 314, 6)
    assert (second["num_samples"], second["num_residues"], second["num_turns"]) == (1, 1, 2)
    for shard in (first, second, *manifest["splits"]["test"]):
        content = (directory / shard["file"]).read_bytes()
        assert shard["num_bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        index = (directory / shard["index_file"]).read_bytes()
        assert shard["index_sha256"] == hashlib.sha256(index).hexdigest()
    totals = manifest["totals"]["train"]
    assert (totals["num_shards"], totals["num_samples"], totals["num_residues"], totals["num_turns"]) == (2, 4, 315, 8)
    assert totals["num_bytes"] == first["num_bytes"] + second["num_bytes"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "manifest.json",
        *(f"test-00000.{suffix}" for suffix in ("index.jsonl", "tar")),
        *(f"train-0000{n}.{suffix}" for n in (0, 1) for suffix in ("index.jsonl", "tar")),
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_fingerprint_follows_the_samples_of_the_split(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", {"train": SAMPLES["train"], "test": [make_sample("5jkl")]})
    one, two = tmp_path / "one", tmp_path / "two"
    assert ShardSet(one, "train").fingerprint == ShardSet(two, "train").fingerprint
    assert ShardSet(one, "test").fingerprint != ShardSet(two, "test").fingerprint


def test_samples_are_taken_only_as_they_are_written(tmp_path):
    """The second shard's samples are asked for when the first shard already stands on disk."""

    def samples():
        for n in range(4):
            if n == 2:
                assert (tmp_path / "train-00000.tar").is_file()
            yield make_sample(f"{n}abc")

    write(tmp_path, {"train": samples()}, samples_per_shard=2)
    assert len(ShardSet(tmp_path, "train")) == 4


def test_an_older_build_is_replaced_whole(tmp_path):
    write(tmp_path, samples_per_shard=1)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, {"train": SAMPLES["train"][:1]}, samples_per_shard=10)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["manifest.json", "notes.txt", "train-00000.index.jsonl", "train-00000.tar"]


def test_a_build_that_fails_midway_leaves_no_manifest_and_no_partial_file(tmp_path):
    def samples():
        yield make_sample()
        raise RuntimeError("power cut")

    write(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path, {"train": samples()})
    assert list(tmp_path.iterdir()) == []


# --- refused


@pytest.mark.parametrize("character", [".", "/", " ", "\t", "\n", "\0", "é"])
def test_a_key_that_the_tar_convention_would_mis_split_is_refused_by_name(tmp_path, character):
    sample = make_sample(f"1a{character}c")
    with pytest.raises(ValueError) as caught:
        write(tmp_path, {"train": [sample]})
    assert repr(sample.key) in str(caught.value) and repr(character) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_empty_and_overlong_keys_are_refused():
    with pytest.raises(ShardError, match="empty"):
        check_key("")
    with pytest.raises(ShardError, match="has 86 characters, a tar header holds 85"):
        check_key("x" * 86)


@given(st.text(min_size=1, max_size=90))
def test_a_key_that_passes_is_found_again_by_webdataset(key):
    """webdataset's own splitting returns the key and the field for every key that check_key lets through."""
    try:
        check_key(key)
    except ShardError:
        return
    for name in shards.FIELDS:
        assert webdataset.tariterators.base_plus_ext(f"{key}.{name}") == (key, name)
        tarfile.TarInfo(f"{key}.{name}").tobuf(tarfile.USTAR_FORMAT)


def test_a_longest_key_is_written_and_read(tmp_path):
    sample = make_sample("x" * 83, "A", confidence=True)
    write(tmp_path, {"train": [sample]})
    assert_same(ShardSet(tmp_path, "train").read(0), sample)


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(ShardError, match="'1abc_A' occurs twice"):
        write(tmp_path, {"train": [make_sample()], "test": [make_sample()]})


@pytest.mark.parametrize("metadata", [{"id": "2xyz"}, {"array": np.zeros(3)}, {"resolution": float("nan")}])
def test_metadata_that_is_not_json_or_reserved_is_refused(tmp_path, metadata):
    sample = make_sample()
    with pytest.raises(ShardError, match="1abc_A"):
        write(tmp_path, {"train": [Sample(sample.protein, "", (), metadata)]})


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ShardError, match="samples_per_shard is 0"):
        write(tmp_path, samples_per_shard=0)
    with pytest.raises(ShardError, match="split name 'Train 1'"):
        write(tmp_path, {"Train 1": []})


# --- damaged


def test_a_missing_or_empty_directory_says_how_to_build_shards(tmp_path):
    with pytest.raises(ShardError, match=f"no shard directory {tmp_path / 'none'}: build them with python launch"):
        ShardSet(tmp_path / "none", "train")
    with pytest.raises(ShardError, match=f"no shards in {tmp_path}.*python launch/build_shards.py"):
        ShardSet(tmp_path, "train")
    (tmp_path / "train-00000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="interrupted build"):
        ShardSet(tmp_path, "train")


def test_an_unknown_split_names_those_there_are(directory):
    with pytest.raises(ShardError, match="no split 'valid' in .*: there are train, test"):
        ShardSet(directory, "valid")


def test_an_unknown_format_version_is_named(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"format_version": 7}))
    with pytest.raises(ShardError, match="format version 7, this program reads 1"):
        ShardSet(directory, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}'])
def test_a_broken_manifest_is_named(directory, content):
    (directory / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match="manifest.json: not a manifest"):
        ShardSet(directory, "train")


def test_a_missing_shard_and_a_shortened_one_are_named_at_once(directory):
    path = directory / "train-00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(ShardError, match=rf"train-00001.tar has {len(content) - 512} bytes, the manifest says"):
        ShardSet(directory, "train")
    path.unlink()
    with pytest.raises(ShardError, match="train-00001.tar is missing"):
        ShardSet(directory, "train")
    assert len(ShardSet(directory, "test")) == 1


def test_a_changed_or_missing_index_is_named(directory):
    path = directory / "train-00000.index.jsonl"
    path.write_text(path.read_text().replace('"num_turns":2', '"num_turns":3'))
    with pytest.raises(ShardError, match="train-00000.index.jsonl: its sha256 is not the manifest's"):
        ShardSet(directory, "train")
    path.unlink()
    with pytest.raises(ShardError, match="train-00000.index.jsonl is missing"):
        ShardSet(directory, "train")


@pytest.fixture
def kept(directory, monkeypatch) -> Path:
    """The folder of the columns of a set that counts as large."""
    monkeypatch.setattr(shard_set_module, "KEPT_FROM", len(SAMPLES["train"]))
    ShardSet(directory, "train")
    (folder,) = directory.glob("index-train-*")
    return folder


def test_a_large_set_is_opened_from_its_columns_and_a_small_one_leaves_none(directory, kept):
    """Without reading the indexes again: here they are gone."""
    for path in directory.glob("train-*.index.jsonl"):
        path.unlink()
    shard_set = ShardSet(directory, "train")
    assert shard_set.keys == [sample.key for sample in SAMPLES["train"]] and shard_set.shard_starts.tolist() == [
        0,
        3,
        4,
    ]
    assert [shard_set.num_residues.tolist(), shard_set.num_turns.tolist()] == [[7, 7, 300, 1], [2, 2, 2, 2]]
    for number, sample in enumerate(SAMPLES["train"]):
        assert_same(shard_set.read(number), sample)
    assert shard_set.shard_numbers.tolist() == [0, 0, 0, 1] == [shard_set.shard_of(i) for i in range(4)]
    ShardSet(directory, "test").read(0)
    assert list(directory.glob("index-*")) == [kept]


def test_other_indexes_have_other_columns(directory, kept, tmp_path):
    longer = [make_sample("1abc", length=8), *SAMPLES["train"][1:]]
    write(directory, {"train": longer})
    assert ShardSet(directory, "train").num_residues.tolist() == [8, 7, 300, 1]
    assert len(list(directory.glob("index-train-*"))) == 2


def test_damaged_columns_end_in_an_error_that_says_what(directory, kept):
    """A key, a length, and a place far outside; a column that lost its end."""
    for name, place, value, reason in (
        ("keys", 0, 0xFF, "meta.json: it says 1abc_A"),
        ("num_residues", 0, 9, "7 residues, the index says 9"),
        ("spans", 7, 0x40, "bytes by the index, wanted at most"),
    ):
        whole = (kept / name).read_bytes()
        (kept / name).write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(ShardError, match=reason):
            ShardSet(directory, "train").read(0)
        (kept / name).write_bytes(whole)
    for name in ("num_turns", "spans", "key_starts"):
        whole = (kept / name).read_bytes()
        (kept / name).write_bytes(whole[:-8])
        with pytest.raises(ShardError, match="not the columns of 4 samples: remove this folder"):
            ShardSet(directory, "train")
        (kept / name).write_bytes(whole)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("field", shards.FIELDS)
def test_a_flipped_bit_names_shard_key_and_field(directory, field):
    record = json.loads((directory / "train-00000.index.jsonl").read_text().splitlines()[2])
    offset, size, _ = record["members"][field]
    flip_byte(directory / "train-00000.tar", offset + size // 2)
    shard_set = ShardSet(directory, "train")
    with pytest.raises(ShardError, match=f"train-00000.tar, sample 2xyz_A, {field}: wrong checksum"):
        shard_set.read(2)
    assert_same(shard_set.read(1), SAMPLES["train"][1])
    if field not in shards.TEXT_FIELDS:
        assert shard_set.read_text(2) == (SAMPLES["train"][2].description, SAMPLES["train"][2].turns)
    with pytest.raises(ShardError, match=r"train-00000.tar: wrong sha256 \(broken samples: 2xyz_A\)"):
        shard_set.verify()


def test_a_shard_cut_short_after_opening_is_a_wrong_checksum(directory):
    shard_set = ShardSet(directory, "train")
    os.truncate(directory / "train-00001.tar", 600)
    with pytest.raises(ShardError, match="train-00001.tar, sample 3def_B2, backbone.npy: wrong checksum"):
        shard_set.read(3)


def test_verify_names_everything_that_is_broken(directory):
    ShardSet(directory, "train").verify()
    shard_set = ShardSet(directory, "train")
    # The first byte of the tar is the name in a header: no member is hurt, and yet webdataset would lose the sample.
    flip_byte(directory / "train-00000.tar", 0)
    (directory / "train-00001.tar").unlink()
    with pytest.raises(ShardError) as caught:
        shard_set.verify()
    assert "train-00000.tar: wrong sha256 (outside the members: tar headers or padding)" in str(caught.value)
    assert "train-00001.tar: missing" in str(caught.value)


# --- everything that can be checked


def rewrite(directory: Path, name: str, change) -> None:
    """Changes a file and then the manifest's checksums and sizes, as a faulty writer would leave them."""
    path = directory / name
    path.write_bytes(change(path.read_bytes()))
    manifest = json.loads((directory / "manifest.json").read_text())
    for shard in (shard for found in manifest["splits"].values() for shard in found):
        shard["sha256"] = hashlib.sha256((directory / shard["file"]).read_bytes()).hexdigest()
        shard["index_sha256"] = hashlib.sha256((directory / shard["index_file"]).read_bytes()).hexdigest()
        shard["num_bytes"] = (directory / shard["file"]).stat().st_size
    (directory / "manifest.json").write_text(json.dumps(manifest))


def faults_after(directory: Path, name: str, change) -> str:
    rewrite(directory, name, change)
    return "\n".join(find_faults(directory))


def test_whole_shards_have_no_faults(directory):
    assert find_faults(directory) == []


def test_a_flipped_byte_anywhere_is_found(directory):
    """Header, member and padding: each is under some check."""
    tar = directory / "train-00000.tar"
    whole = tar.read_bytes()
    for place in (0, 150, 600, len(whole) // 2, len(whole) - 1):
        tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert any("train-00000.tar: wrong sha256" in fault for fault in find_faults(directory)), place
    tar.unlink()
    assert find_faults(directory)[0] == "train-00000.tar: missing"


def test_what_checksums_of_the_files_cannot_tell_is_found_too(directory):
    """Files that fit the manifest but not each other."""
    tar = (directory / "train-00000.tar").read_bytes()
    index = (directory / "train-00000.index.jsonl").read_bytes()
    broken = bytearray(tar)
    broken[0] ^= 1
    assert "a tar reader" in faults_after(directory, "train-00000.tar", lambda _: bytes(broken))
    rewrite(directory, "train-00000.tar", lambda _: tar)
    lines = index.splitlines(keepends=True)
    found = faults_after(directory, "train-00000.index.jsonl", lambda _: b"".join(lines[1:]))
    assert "the index does not list 1abc_A.backbone.npy" in found and "num_samples 2, the manifest says 3" in found
    longer = index.replace(b'"num_residues":7', b'"num_residues":8')
    found = faults_after(directory, "train-00000.index.jsonl", lambda _: longer)
    assert "sample 1abc_A: 7 residues and 2 turns, the index says otherwise" in found
    found = faults_after(directory, "train-00000.index.jsonl", lambda _: b"{}\n")
    assert "train-00000.index.jsonl: not an index" in found


def test_a_key_that_is_in_two_shards_is_found(directory, tmp_path):
    write(tmp_path / "other", {"train": SAMPLES["train"], "test": SAMPLES["train"][:0]})
    for kind in ("tar", "index.jsonl"):
        content = (tmp_path / "other" / f"train-00000.{kind}").read_bytes()
        rewrite(directory, f"test-00000.{kind}", lambda _: content)
    assert any("sample 1abc_A is also in train-00000.tar" in fault for fault in find_faults(directory))


@pytest.mark.parametrize(
    "value, what", [(np.inf, "a coordinate beyond 1e+06 angstrom"), (np.nan, "no residue of it has all three")]
)
def test_coordinates_that_no_encoder_can_use_are_found(tmp_path, value, what):
    backbone = np.full((3, 3, 3), value, np.float32)
    write(tmp_path, {"train": [Sample(Protein("1abc", "A", "ACD", backbone), "", ())]})
    (fault,) = find_faults(tmp_path)
    assert "train-00000.tar: sample 1abc_A" in fault and what in fault


def test_a_protein_of_which_only_an_embedding_is_known_may_lack_coordinates(tmp_path):
    backbone = np.full((3, 3, 3), np.nan, np.float32)
    write(tmp_path, {"train": [Sample(Protein("1abc", "A", "XXX", backbone), "", (), {"embedding": "1abc.pt"})]})
    assert find_faults(tmp_path) == []


def test_files_and_totals_that_do_not_fit_the_manifest_are_found(directory):
    (directory / "train-00007.tar.partial").write_bytes(b"")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["totals"]["test"]["num_turns"] += 1
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert find_faults(directory) == [
        "manifest.json: the totals of test are not the sums over its shards",
        "train-00007.tar.partial: the manifest does not list it",
    ]


# --- sizes


@settings(max_examples=25)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 40_000))
def test_a_shard_ends_before_it_would_be_larger_than_asked(lengths, samples_per_shard, bytes_per_shard):
    samples = [make_sample(f"{n}abc", length=length) for n, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as scratch:
        limits = dict(samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard)
        manifest = write_shards(scratch, {"train": samples}, options={}, **limits)
        assert ShardSet(scratch, "train").keys == [sample.key for sample in samples]
    sizes = {sample.key: encode_sample(sample).num_bytes for sample in samples}
    taken = iter(sizes.values())
    shards = [[next(taken) for _ in range(shard["num_samples"])] for shard in manifest["splits"]["train"]]
    for shard, following in zip(shards, shards[1:] + [None]):
        assert len(shard) == 1 or (len(shard) <= samples_per_shard and sum(shard) <= bytes_per_shard)
        full = following is None or len(shard) == samples_per_shard or sum(shard) + following[0] > bytes_per_shard
        assert full, "a shard ended too early"


def test_the_manifest_names_the_programs(directory):
    versions = json.loads((directory / "manifest.json").read_text())["versions"]
    assert versions["format"] == "1" and {"proteingpt", "biotite", "numpy"} < set(versions)
