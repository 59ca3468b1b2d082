"""Tar headers, against tarfile, and members that no shard may have."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.data.shards import BadSample, ShardCache, ShardSet, find_faults, write_shards
from proteingpt.data.tar_headers import TarError, hostile_member, parse_header, tar_members
from proteingpt.protein import Protein, Sample


@pytest.fixture
def directory(tmp_path):
    backbones = {n: np.ones((5 * n, 3, 3), np.float32) for n in (1, 2, 9)}
    samples = [Sample(Protein(f"{n}abc", "A", "ACDEF" * n, backbone), "", ()) for n, backbone in backbones.items()]
    write_shards(tmp_path / "shards", {"train": samples}, samples_per_shard=10, options={})
    return tmp_path / "shards"


def test_members_are_those_that_tarfile_finds(directory):
    path = directory / "train-00000.tar"
    with tarfile.open(path) as tar:
        wanted = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(m.name, m.offset, m.size) for m in tar_members(path)] == wanted and len(wanted) == 12
    assert hostile_member(path) is None


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info.tobuf(tarfile.USTAR_FORMAT)


HOSTILE = {
    "absolute": (member("/etc/passwd"), "'/etc/passwd': wanted a plain name"),
    "climbing": (member("../../etc/passwd"), "'../../etc/passwd': wanted a plain name"),
    "in a directory": (member("sub/1abc_A.qa.json"), "wanted a plain name"),
    "symbolic link": (member("1zzz_A.qa.json", tarfile.SYMTYPE, target="/etc/passwd"), "is a symbolic link"),
    "hard link": (member("1zzz_A.qa.json", tarfile.LNKTYPE, target="1abc_A.qa.json"), "is a hard link"),
    "device": (member("1zzz_A.qa.json", tarfile.CHRTYPE), "is of type b'3'"),
    "directory": (member("1zzz_A", tarfile.DIRTYPE), "wanted plain files only"),
    "extended header": (tarfile.TarInfo.create_pax_global_header({"comment": "x"})[:512], "is of type b'g'"),
    "control character": (member("1zzz\n_A.qa.json"), "wanted a plain name"),
    "prefix": (member("d" * 90 + "/" + "f" * 90), "wanted a plain name"),
    "size beyond the file": (member("1zzz_A.qa.json", size=2**32), "is said to have 4294967296 bytes"),
}  # fmt: skip


def with_first_member(directory, header: bytes):
    """The tar with one more header at its front, and index and manifest made to fit, as a hostile publisher would."""
    path = directory / "train-00000.tar"
    path.write_bytes(header + path.read_bytes())
    index = directory / "train-00000.index.jsonl"
    records = [json.loads(line) for line in index.read_text().splitlines()]
    for record in records:
        record["members"] = {field: [span[0] + len(header), *span[1:]] for field, span in record["members"].items()}
    index.write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = json.loads((directory / "manifest.json").read_text())
    shard = manifest["splits"]["train"][0]
    shard |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
    shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_named_by_verify_and_refused_when_the_shard_is_first_opened(directory, tmp_path, name):
    header, said = HOSTILE[name]
    with_first_member(directory, header)
    assert any(said in fault for fault in find_faults(directory))
    if "size" in name:
        return  # an announcement alone: nothing is extracted, and reading goes by the index
    with pytest.raises(BadSample, match="it was not made by launch/build_shards.py"):
        ShardSet(directory, "train", ShardCache(tmp_path / "cache", 2**30)).read(0)


@settings(max_examples=200)
@given(st.binary(min_size=512, max_size=512), st.booleans())
def test_any_block_is_a_header_or_a_tar_error(block, fix_checksum):
    if fix_checksum:
        checksum = sum(block[:148]) + 256 + sum(block[156:])
        block = block[:148] + b"%06o\0 " % checksum + block[156:]
    try:
        parsed = parse_header(block, 512)
    except TarError:
        return
    assert fix_checksum and parsed.size >= 0


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * 512, member("a") + b"x" * 512, member("a", size=10**9)])
def test_what_is_no_tar_ends_with_a_tar_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(TarError):
        list(tar_members(tmp_path / "a.tar"))
    assert hostile_member(tmp_path / "a.tar") is None


def test_names_with_a_prefix_are_read_as_tarfile_reads_them(tmp_path):
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("d" * 90 + "/" + "f" * 90), io.BytesIO(b""))
    with tarfile.open(path) as tar:
        assert [m.name for m in tar_members(path)] == tar.getnames()
