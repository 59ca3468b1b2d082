"""Files and their bytes: which are structures, plain or gzipped, and which of the three formats, told by content."""

import gzip
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO

from proteingpt.data.structure.atoms import StructureError
from proteingpt.protein import short_id

STRUCTURE_SUFFIXES = tuple(
    suffix + packed for suffix in (".cif", ".mmcif", ".pdbx", ".bcif", ".pdb", ".ent") for packed in ("", ".gz")
)

# Beyond any entry of the archive (the largest have a few million atoms and half a GB of text): refused before a
# damaged or hostile length fills the memory.
MAX_FILE_BYTES = 2 << 30
BLOCK_BYTES = 1 << 20


def find_structures(directory: str | Path) -> list[Path]:
    """All structure files under a directory, sorted: flat, or in sub-folders such as the archive's two-letter ones.

    Folders that are links are followed, each folder once. Raises StructureError where a folder cannot be listed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise StructureError(f"{directory}: not a directory; wanted one that holds structure files")
    found, seen = [], set()
    for folder, subfolders, names in os.walk(directory, onerror=_refuse_folder, followlinks=True):
        # A link may lead to where we are or have been; by name, so that it is always the same path that counts.
        subfolders.sort()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        found += [Path(folder, name) for name in names if name.lower().endswith(STRUCTURE_SUFFIXES)]
    return sorted(path for path in found if path.is_file())


def _refuse_folder(error: OSError) -> None:
    raise StructureError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = _read_blocks(gzip.GzipFile(fileobj=file) if packed else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StructureError(f"damaged or truncated gzip: {error}; fetch the file again") from error
    except OSError as error:
        raise StructureError(f"cannot be opened: {error.strerror or error}") from error
    if not data.strip():
        raise StructureError("the file is empty; fetch it again")
    return data


def _read_blocks(file: BinaryIO) -> bytes:
    """All of it. By blocks, since one read of so many bytes would reserve the memory for the largest file allowed."""
    blocks, num_bytes = [], 0
    while block := file.read(BLOCK_BYTES):
        num_bytes += len(block)
        if num_bytes > MAX_FILE_BYTES:
            raise StructureError(f"more than {MAX_FILE_BYTES} bytes unpacked; no structure is that large: set it aside")
        blocks.append(block)
    return b"".join(blocks)


_PDB_RECORD = re.compile(
    rb"^(?:HEADER|TITLE |COMPND|SEQRES|REMARK|CRYST1|MODEL |ATOM  |HETATM|EXPDTA|AUTHOR|HELIX |DBREF )", re.MULTILINE
)


def kind_of(data: bytes, path: Path) -> str:
    """`bcif`, `mmcif` or `pdb`, by content."""
    is_map = 0x80 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF)  # MessagePack's map markers
    if is_map and b"dataBlocks" in data:
        return "bcif"
    if b"\0" in data:
        if ".bcif" in path.suffixes:
            raise StructureError("binary, but not a whole BinaryCIF: it has no dataBlocks; fetch the file again")
        raise StructureError("binary content that is neither gzip nor BinaryCIF; wanted a structure")
    if re.match(rb"(?:\xef\xbb\xbf)?(?:\s|#[^\n]*\n)*data_", data, re.IGNORECASE):
        return "mmcif"
    if _PDB_RECORD.search(data):
        return "pdb"
    raise StructureError(
        "neither mmCIF (no data_ block), BinaryCIF, nor PDB format (no record of it); wanted one of them"
    )


def decode(data: bytes) -> str:
    """Text with plain line ends. Titles of old files may hold stray bytes: they are replaced, not fatal."""
    text = data.decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def entry_of(path: Path) -> str:
    """The entry that a file is of, by its name: `pdb1CBS.ent.gz` and `pdb_00001cbs_xyz_v1-2.cif.gz` are of 1cbs."""
    name = path.name.lower().removesuffix(".gz")
    stem, _, extension = name.rpartition(".")
    if extension == "ent":
        stem = stem.removeprefix("pdb")
    return short_id(re.sub(r"^(pdb_[0-9a-z]{8})_xyz.*", r"\1", stem or name))
