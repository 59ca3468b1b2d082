"""Manifests and indexes that nobody vouches for: checked numbers, or one ShardError."""

import hashlib
import json
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.data.manifest import MAX_SAMPLE_BYTES, parse_index, parse_manifest
from proteingpt.data.shards import FIELDS, ShardError, ShardSet, find_faults, write_shards
from proteingpt.protein import Protein, Sample, Turn

SHARD = {
    "file": "train-00000.tar", "sha256": "0" * 64, "num_bytes": 10240, "index_file": "train-00000.index.jsonl",
    "index_sha256": "0" * 64, "num_samples": 1, "num_residues": 7, "num_turns": 2,
}  # fmt: skip
MANIFEST = {"format_version": 1, "splits": {"train": [SHARD]}, "totals": {"train": {"num_samples": 1}}}
LINE = {
    "key": "1abc_A", "num_residues": 7, "num_turns": 2,
    "members": {"backbone.npy": [512, 380, 1], "meta.json": [1536, 30, 2], "sequence.txt": [2560, 7, 3]},
}  # fmt: skip

HOSTILE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(), st.text(max_size=10), st.integers(-(2**70), 2**70),
        st.sampled_from([-1, 0, 2**31, 2**53, 2**63 - 1, 2**63, 10**400]),
        st.sampled_from(["../../etc/passwd", "/etc/passwd", "train-00000.tar\n", "NaN"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def changed(value, path: list, new):
    """value with what stands at `path` replaced."""
    if not path:
        return new
    step, *rest = path
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[step] = changed(copy[step], rest, new)
    return copy


def paths(value, path=()):
    """Every place in a JSON value."""
    yield list(path)
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in inside:
        yield from paths(inner, (*path, step))


def index_of(lines: list, shard=SHARD) -> tuple[bytes, dict]:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return content, {**shard, "index_sha256": hashlib.sha256(content).hexdigest(), "num_samples": len(lines)}


def test_a_good_manifest_and_index_are_taken():
    assert parse_manifest(json.dumps(MANIFEST).encode(), "m") == MANIFEST
    index = parse_index(*index_of([LINE]), "i")
    assert index.keys == ["1abc_A"] and index.num_residues.tolist() == [7] and index.num_turns.tolist() == [2]
    assert index.spans.shape == (1, len(FIELDS), 3)
    assert index.spans[0].tolist() == [[512, 380, 1], [-1, 0, 0], [1536, 30, 2], [-1, 0, 0], [2560, 7, 3]]


@settings(max_examples=300)
@given(st.sampled_from(list(paths(MANIFEST))), HOSTILE)
def test_a_manifest_with_anything_anywhere_is_taken_or_refused(path, new):
    content = json.dumps(changed(MANIFEST, path, new)).encode()
    try:
        manifest = parse_manifest(content, "m")
    except ShardError as error:
        assert str(error).startswith("m: ")
        return
    for shards in manifest["splits"].values():
        for shard in shards:
            assert os.path.basename(shard["file"]) == shard["file"] and shard["file"].endswith(".tar")
            assert all(type(shard[name]) is int and shard[name] >= 0 for name in SHARD if name.startswith("num_"))


@settings(max_examples=300)
@given(st.sampled_from(list(paths(LINE))), HOSTILE)
def test_an_index_with_anything_anywhere_is_taken_or_refused(path, new):
    content, shard = index_of([LINE, changed(LINE, path, new)])
    try:
        index = parse_index(content, shard, "i")
    except ShardError as error:
        assert str(error).startswith("index i")
        return
    offset, size, _ = np.moveaxis(index.spans, 2, 0)
    there = offset >= 0
    assert ((offset + size)[there] <= SHARD["num_bytes"]).all() and (size[there] >= 0).all() and there.any(axis=1).all()


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_are_refused(content):
    with pytest.raises(ShardError):
        parse_manifest(content, "m")
    shard = {**SHARD, "index_sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(ShardError):
        parse_index(content, shard, "i")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b'{"format_version":' + b"1" * 10**5 + b"}"])
def test_json_made_to_exhaust_the_parser_is_refused(content):
    with pytest.raises(ShardError):
        parse_manifest(content, "m")


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("file", "../train-00000.tar", "file is '../train-00000.tar', wanted"),
        ("file", "/train-00000.tar", "file is '/train-00000.tar', wanted"),
        ("index_file", "train-00000.tar", "index_file is 'train-00000.tar', wanted"),
        ("num_bytes", -1, "num_bytes is -1, wanted a number from 0"),
        ("num_samples", 10**12, "num_samples is 1000000000000, wanted"),
        ("num_turns", "2", "num_turns is '2', wanted"),
        ("num_turns", True, "num_turns is True, wanted"),
        ("sha256", "x" * 64, "sha256 is"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(field, value, said):
    content = json.dumps(changed(MANIFEST, ["splits", "train", 0, field], value)).encode()
    with pytest.raises(ShardError, match="m: shard 0 of train: ") as raised:
        parse_manifest(content, "m")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "path, value, said",
    [
        (["members", "sequence.txt"], [10240, 1, 0], "a member outside the shard's 10240 bytes"),
        (["members", "sequence.txt"], [2**62, 2**62, 0], "a member outside the shard's"),
        (["members", "backbone.npy"], [0, 380, 0], "a member outside the shard's"),
        (["members", "backbone.npy"], [512, -1, 0], "a member outside the shard's"),
        (["members", "backbone.npy"], [512, -5, 0], "line 1: a member at list, wanted [offset, size, crc32]"),
        (["members", "backbone.npy"], [512, 380, 2**32], "a crc32 of more than 32 bits"),
        (["members", "backbone.npy"], [512.0, 380, 0], "line 1: a member at list, wanted [offset, size, crc32]"),
        (["members"], {}, "a sample without members"),
        (["num_residues"], 10**9, "line 1: 1000000000 residues and 2 turns, wanted numbers up to"),
        (["key"], "1abc.A", "line 1: the key is '1abc.A', wanted printable ASCII"),
        (["key"], "a/b", "line 1: the key is 'a/b'"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(path, value, said):
    with pytest.raises(ShardError) as raised:
        parse_index(*index_of([changed(LINE, path, value)]), "i")
    assert said in str(raised.value)


def test_a_sample_spread_over_a_huge_shard_is_refused_before_memory_is_taken():
    """Two members far apart would be one read of everything between them."""
    far = changed(LINE, ["members", "sequence.txt"], [2**40, 7, 3])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ShardError, match=f"a sample spread over .* bytes, wanted at most {MAX_SAMPLE_BYTES}"):
        parse_index(*index_of([far], {**SHARD, "num_bytes": 2**41}), "i")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_counts_that_the_manifest_has_otherwise_are_said():
    content, shard = index_of([LINE])
    with pytest.raises(ShardError, match="1 samples, the manifest says 5"):
        parse_index(content, {**shard, "num_samples": 5}, "i")


# --- members


def write_one(directory: Path) -> dict:
    backbone = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    sample = Sample(Protein("1abc", "A", "ACDEF", backbone), "About it.", (Turn("What?", "That."),))
    return write_shards(directory, {"train": [sample]}, samples_per_shard=10, options={})


def with_member(directory: Path, field: str, content: bytes):
    """The only sample of `directory` with other bytes in a member, and all checksums to match."""
    import zlib

    index = directory / "train-00000.index.jsonl"
    record = json.loads(index.read_text())
    offset, size, _ = record["members"][field]
    assert len(content) <= 512 * (-(-size // 512))
    tar = bytearray((directory / "train-00000.tar").read_bytes())
    tar[offset : offset + len(content)] = content
    (directory / "train-00000.tar").write_bytes(tar)
    record["members"][field] = [offset, len(content), zlib.crc32(content)]
    index.write_text(json.dumps(record) + "\n")
    manifest = json.loads((directory / "manifest.json").read_text())
    shard = manifest["splits"]["train"][0]
    shard["sha256"], shard["index_sha256"] = (hashlib.sha256(p).hexdigest() for p in (tar, index.read_bytes()))
    (directory / "manifest.json").write_text(json.dumps(manifest))


@settings(max_examples=100)
@given(st.sampled_from([f for f in FIELDS if "confidence" not in f]), st.binary(max_size=100), st.integers(0, 200))
def test_members_of_any_bytes_are_a_sample_or_a_shard_error(field, new, position):
    """With checksums that fit, as whoever makes shards by hand would have them."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_one(directory)
        offset, size, _ = json.loads((directory / "train-00000.index.jsonl").read_text())["members"][field]
        old = (directory / "train-00000.tar").read_bytes()[offset : offset + size]
        with_member(directory, field, (old[: min(position, size)] + new)[:512] or b"x")
        shards = ShardSet(directory, "train")
        for read in (shards.read, shards.read_protein, shards.read_text):
            try:
                read(0)
            except ShardError as error:
                assert "train-00000.tar, sample 1abc_A" in str(error)
        assert isinstance(find_faults(directory), list)
        shards.close()


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 3, 3), }"


@pytest.mark.parametrize(
    "header",
    [
        HEADER.replace("<f4", "|O"), HEADER.replace("<f4", "<f8"), HEADER.replace("False", "True"),
        HEADER.replace("(5, 3, 3)", "(999999999, 999999999, 9)"), HEADER.replace("(5, 3, 3)", "(" * 50 + ")" * 50),
        HEADER.replace("(5, 3, 3)", "__import__('os').system('true')"), HEADER.replace("(5, 3, 3)", "(5, 9)"), "",
    ],
)  # fmt: skip
def test_an_array_of_objects_or_of_another_shape_is_refused(tmp_path, header):
    """Pickles among them: nothing of a header is evaluated."""
    write_one(tmp_path)
    npy = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n" + bytes(180)
    with_member(tmp_path, "backbone.npy", npy)
    with pytest.raises(ShardError, match="sample 1abc_A"):
        ShardSet(tmp_path, "train").read_protein(0)


def test_an_array_that_numpy_wrote_is_read_whatever_its_length(tmp_path):
    """The same header by hand and by numpy."""
    for length in (1, 9, 10, 12345):
        directory = tmp_path / str(length)
        sample = Sample(Protein("1abc", "A", "A" * length, np.ones((length, 3, 3), np.float32)), "", ())
        write_shards(directory, {"train": [sample]}, samples_per_shard=1, options={})
        assert ShardSet(directory, "train").read(0).protein.backbone.shape == (length, 3, 3)


@pytest.mark.parametrize("field, content", [("sequence.txt", b"ACDEFG"), ("sequence.txt", b"ACDE")])
def test_a_length_that_is_not_the_indexs_is_refused(tmp_path, field, content):
    """The plan has reserved its places by the index."""
    write_one(tmp_path)
    with_member(tmp_path, field, content)
    with pytest.raises(ShardError, match="sample 1abc_A"):
        ShardSet(tmp_path, "train").read_protein(0)


def test_a_protein_shorter_than_its_index_says_is_refused(tmp_path):
    write_one(tmp_path)
    index = tmp_path / "train-00000.index.jsonl"
    index.write_text(index.read_text().replace('"num_residues":5', '"num_residues":6'))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"][0]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="sample 1abc_A, sequence.txt: 5 residues, the index says 6"):
        ShardSet(tmp_path, "train").read(0)
