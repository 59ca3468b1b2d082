"""Cached rows: written by the real writer in this process, read back, and compared with data and recipe."""

import dataclasses
import json
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from proteingpt.cluster.spec import parse_cluster
from proteingpt.config import EncodersConfig
from proteingpt.data.shards import ShardError, ShardSet, write_shards
from proteingpt.distributed import Rank
from proteingpt.encoders.cache import (
    BrokenRows, CacheError, CachedEncoders, CachedRows, check, encoder_differences, hashes_at_hand, with_names,
)  # fmt: skip
from proteingpt.encoders.cache_command import show_estimate
from proteingpt.encoders.cache_run import all_jobs, begin, check_space, do_job, finish, progress_line, settings_of
from proteingpt.encoders.cache_shard import Published
from proteingpt.encoders.claims import Claims
from proteingpt.encoders.pair import Encoders
from proteingpt.protein import Sample, Turn

DTYPE = "bfloat16"


@pytest.fixture(scope="module")
def config(esm2_file, esm_if1_file):
    return EncodersConfig(esm2=str(esm2_file), esm_if1=str(esm_if1_file), dtype=DTYPE)


@pytest.fixture(scope="module")
def samples(make_protein):
    """Seven, of lengths 1 to 40, one with gaps, and one whose pLDDT was not divided by 100."""
    proteins = [make_protein(n, seed=n, missing=(1, 2) * (n == 9)) for n in (1, 5, 9, 40, 12, 7)]
    proteins.append(make_protein(11, confidence=np.full(11, 80, np.float32)))
    named = [dataclasses.replace(protein, id=f"p{i}") for i, protein in enumerate(proteins)]
    return [Sample(protein, "a protein", (Turn("How long?", str(len(protein))),)) for protein in named]


@pytest.fixture(scope="module")
def data(samples, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory, {"train": samples[:5], "test": samples[5:]}, samples_per_shard=3, options={})
    return directory


def make_cache(data, out, config, encoders=None, together=False) -> dict:
    """What each rank does, without ranks."""
    splits = {split: ShardSet(data, split) for split in ("train", "test")}
    encoders = encoders or Encoders.load(config, "cpu")
    settings = settings_of(list(splits.values()), encoders, config, together)
    widths = {part: getattr(encoders, part).width for part in ("structure", "sequence")}
    jobs = all_jobs(list(splits.values()), widths, config.dtype)
    assert begin(out, settings, False)
    for job in jobs:
        with Claims(out / ".claims").claim(job.name) as claim:
            do_job(out, job, claim, splits[job.split], encoders, config.dtype, together, lambda num_residues: None)
    manifest = finish(out, settings, jobs)
    if not manifest["left_out"]:
        assert {s["file"]: s["num_bytes"] for ss in manifest["splits"].values() for s in ss} == {
            f"{job.name}.tar": job.num_bytes for job in jobs
        }
    assert not begin(out, settings, False), "a finished cache is not begun again"
    return manifest


@pytest.fixture(scope="module")
def cache(data, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("esm")
    make_cache(data, out, config)
    return out


@pytest.fixture
def sets(data):
    return [ShardSet(data, "train"), ShardSet(data, "test")]


def test_rows_are_those_of_live_encoders_to_the_bit(cache, config, samples):
    live, cached = Encoders.load(config, "cpu"), CachedEncoders(cache, config, "cpu", load=None)
    proteins = [sample.protein for sample in samples[:6]]
    for found, wanted in zip(cached.encode(proteins), live.encode(proteins)):
        assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (cached.structure.width, cached.structure.fingerprint) == (live.structure.width, live.structure.fingerprint)
    assert cached.encode([]) == ([], [])


def test_a_protein_that_cannot_be_encoded_is_left_out_by_name(cache, samples):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert list(manifest["left_out"]) == ["p6_A"] and "pLDDT / 100" in manifest["left_out"]["p6_A"]
    with pytest.raises(BrokenRows, match="sample p6_A: .*pLDDT / 100"):
        CachedRows(cache).read(samples[6].protein)


def test_together_gives_rows_equal_but_for_rounding_and_says_so(data, config, tmp_path, samples):
    exact = dataclasses.replace(config, dtype="float32")
    manifest = make_cache(data, tmp_path, exact, together=True)
    assert manifest["together"] and list(manifest["left_out"]) == ["p6_A"]
    proteins = [sample.protein for sample in samples[:6]]
    cached = CachedEncoders(tmp_path, exact, "cpu").encode(proteins)
    for found, wanted in zip(cached, Encoders.load(exact, "cpu").encode(proteins)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_every_flipped_byte_of_an_entry_is_noticed(cache, samples, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    record = json.loads((copy / "train-00000.index.jsonl").read_text().splitlines()[1])
    offset, size, _ = record["members"]["safetensors"]
    whole = (copy / "train-00000.tar").read_bytes()
    for at in range(offset, offset + size, max(1, size // 40)):
        (copy / "train-00000.tar").write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(BrokenRows, match="train-00000.tar, sample p1_A: wrong checksum"):
            CachedRows(copy).read(samples[1].protein)
    (copy / "train-00000.tar").write_bytes(whole[:-512])
    with pytest.raises(CacheError, match="the manifest says"):
        CachedRows(copy)


def test_rows_of_another_structure_under_the_same_key_are_refused(cache, samples):
    moved = dataclasses.replace(samples[1].protein, backbone=samples[1].protein.backbone + 1)
    with pytest.raises(BrokenRows, match="p1_A: it was made from another sequence or structure"):
        CachedRows(cache).read(moved)
    assert issubclass(BrokenRows, ShardError)  # which is what the loader sets aside


def test_the_data_may_gain_questions_but_not_lose_their_structures(cache, config, samples, tmp_path):
    def built(name, changed):
        write_shards(tmp_path / name, {"train": changed[:5], "test": changed[5:]}, samples_per_shard=2, options={})
        return [ShardSet(tmp_path / name, split) for split in ("train", "test")]

    asked = [dataclasses.replace(sample, turns=sample.turns * 2) for sample in samples]
    check(cache, config, built("asked", asked))
    moved = dataclasses.replace(samples[1].protein, backbone=samples[1].protein.backbone + 1)
    other = [*samples[:1], dataclasses.replace(samples[1], protein=moved), *samples[2:]]
    with pytest.raises(CacheError, match=r"1 of 5 samples have another sequence or structure there \(p1_A\)"):
        check(cache, config, built("moved", other))
    renamed = dataclasses.replace(samples[1].protein, id="new")
    other = [*samples[:1], dataclasses.replace(samples[1], protein=renamed), *samples[2:]]
    with pytest.raises(CacheError, match=r"1 of 5 samples are not in it \(new_A\)"):
        check(cache, config, built("renamed", other))


def test_a_recipe_of_other_encoders_is_told_in_what(cache, config, sets, tmp_path):
    check(cache, config, sets)
    manifest = json.loads((cache / "manifest.json").read_text())

    def differences(**changes):
        changed = dataclasses.replace(config, **changes)
        return encoder_differences(manifest, changed, hashes_at_hand(changed))

    assert differences(dtype="float32") == ["encoders.dtype is 'float32', the cache's rows are 'bfloat16'"]
    assert differences(backend="reference") == ["encoders.backend is 'reference', the cache's rows are 'fast'"]
    assert differences(esm2_layer=1) == ["encoders.esm2_layer is 1, the cache's rows are of layer 2"]
    assert differences(esm2_layer=2) == differences(esm2="none") == differences(esm2=None, esm_if1=None) == []
    # Weights that are not there are known by their name; those that are, by their bytes.
    assert differences(esm2=str(tmp_path / "tiny.pt")) == []
    assert differences(esm2="esm2_t36_3B_UR50D") == [
        "encoders.esm2 is 'esm2_t36_3B_UR50D', the cache's rows are of tiny"
    ]
    (tmp_path / "tiny.pt").write_bytes(b"other weights")
    (line,) = differences(esm2=str(tmp_path / "tiny.pt"))
    assert "have sha256" in line and manifest["encoders"]["sequence"]["sha256"][:12] in line
    manifest["encoders"]["sequence"] = None
    (line,) = differences()
    assert "the cache has no sequence rows" in line
    assert with_names(EncodersConfig(), cache).esm2 == "tiny"


def test_other_directories_are_not_taken_for_caches_and_not_overwritten(cache, data, config, tmp_path):
    with pytest.raises(CacheError, match="written last"):
        CachedRows(tmp_path)
    with pytest.raises(CacheError, match="wanted proteingpt-embeddings 1"):
        CachedRows(data)
    settings = settings_of([ShardSet(data, "train")], Encoders.load(config, "cpu"), config, False)
    with pytest.raises(CacheError, match="holds others .*dtype: 'bfloat16', wanted 'float32'"):
        begin(cache, {**json.loads((cache / "manifest.json").read_text()), "dtype": "float32"}, False)
    before = sorted(path.name for path in data.iterdir())
    for overwrite in (False, True):
        with pytest.raises(CacheError, match="holds"):
            begin(data, settings, overwrite)
    assert sorted(path.name for path in data.iterdir()) == before
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    assert not begin(copy, json.loads((copy / "manifest.json").read_text()), True), "the same was removed"
    with Claims(copy / ".claims").claim("begin"):
        assert begin(copy, settings, True) and not list(copy.glob("*.tar"))
    with Claims(copy / ".claims").claim("train-00000"):  # a run that is at work is not robbed
        with pytest.raises(CacheError, match=r"process \d+ on .* writes train-00000 of other embeddings"):
            begin(copy, settings | {"dtype": "float16"}, True)
    assert (copy / ".work").is_dir()


def test_a_disk_that_is_too_small_is_named_with_both_numbers(tmp_path, sets):
    (job, *_) = all_jobs(sets, {"structure": 64, "sequence": 64}, DTYPE)
    check_space(tmp_path, [job])
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CacheError, match=r"bytes free, the embeddings still to be written take [\d,]+ "):
        check_space(tmp_path, [job._replace(num_bytes=free + 2**33)])


def test_published_rows_convert_and_those_that_do_not_fit_are_named(data, tmp_path, samples):
    """p1 has its file; p2's is of another length; the others have none."""
    rows = torch.randn(len(samples[1].protein) + 2, 1, 512)
    torch.save(rows, tmp_path / "1abc.pt")
    named = [
        dataclasses.replace(s, protein=dataclasses.replace(s.protein, id=f"{i}abc")) for i, s in enumerate(samples[:4])
    ]
    torch.save(torch.randn(4, 1, 512), tmp_path / "2abc.pt")
    write_shards(tmp_path / "data", {"train": named[:3], "test": named[3:]}, samples_per_shard=5, options={})
    config = EncodersConfig(esm2="none", esm_if1="esm_if1_gvp4_t16_142M_UR50", dtype="float32")
    manifest = make_cache(tmp_path / "data", tmp_path / "out", config, Published(tmp_path, "float32"))
    assert manifest["left_out"].keys() == {"0abc_A", "2abc_A", "3abc_A"}
    assert "2abc.pt has 4 rows, the sample of 9 residues wants 11" in manifest["left_out"]["2abc_A"]
    assert manifest["encoders"]["sequence"] is None and manifest["encoders"]["structure"]["sha256"] is None
    (structure,), (sequence,) = CachedEncoders(tmp_path / "out", config, "cpu").encode([named[1].protein])
    assert torch.equal(structure, rows[:, 0]) and sequence.shape == (0, 0)
    with pytest.raises(BrokenRows, match="published without their weights' checksum"):
        CachedEncoders(tmp_path / "out", config, "cpu").encode([named[0].protein])


def test_the_estimate_for_a_cluster_by_given_rates_loads_no_weights(data, config, capsys, monkeypatch):
    """67 + 18 residues by one rank of 2 residues/s and two of 1."""
    monkeypatch.setattr(Encoders, "load", None)
    asked = {"rates": [2.0, 1.0], "cluster": parse_cluster("1xH100-80,2xA100-40"), "ranks": None}
    options = Namespace(data=str(data), epochs=3, readings=2, **asked)
    show_estimate(options, config, Rank(0, 1, 0, "127.0.0.1", 0, "none"), None, sys.stdout)
    said = capsys.readouterr().out
    assert "4 in all: 1 x H100-80 at 2, given by --rates; 2 x A100-40 at 1, given by --rates" in said
    lines = re.findall(r"^hours (?:to cache|live, .*\)|live, each epoch) +([\d.e-]+)", said, re.MULTILINE)
    hours = [float(number) for number in lines]
    assert hours == pytest.approx([85 / 4 / 3600, 2 * 67 / 4 / 3600, 3 * 2 * 67 / 4 / 3600], rel=0.01)


def test_the_progress_line_by_hand():
    line = progress_line(3, 1_000, 4, 4_000, 8 * 10**9, 1_000, 100.0)
    assert line == "3/4 shards  25.0% of 4,000 residues  2.00 of 8.00 GB  10 residues/s  5.0 min left"
    resumed = progress_line(3, 1_000, 4, 4_000, 8 * 10**9, 500, 100.0)  # the other half was there at the start
    assert resumed.endswith("5 residues/s  10.0 min left")
