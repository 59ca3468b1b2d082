"""The headers of a tar, one after the other, and what in them may do harm. Pure reading: nothing is ever extracted.

POSIX.1-1988 ustar, which is what shards are: no extended headers, so no name or size stands anywhere but in its block.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proteingpt.data.shard_format import TAR_BLOCK_BYTES, padded

REGULAR = (b"0", b"\0")
MAX_MEMBERS = 2**24


class TarError(ValueError):
    """What follows is no tar header, or lies beyond the end of the file."""


@dataclass(frozen=True)
class TarMember:
    """offset, size: of its data, in bytes. fault: what makes it a member that no shard has, or None."""

    name: str
    offset: int
    size: int
    fault: str | None


def tar_members(path: str | Path) -> Iterator[TarMember]:
    """The members up to the end mark, a zero block. Raises TarError where a header is damaged, or the file ends."""
    with open(path, "rb") as file:
        num_bytes, position = os.fstat(file.fileno()).st_size, 0
        for _ in range(MAX_MEMBERS):
            file.seek(position)
            header = file.read(TAR_BLOCK_BYTES)
            if len(header) < TAR_BLOCK_BYTES:
                raise TarError(f"the file ends at byte {num_bytes}, without an end mark")
            if not any(header):
                return
            member = parse_header(header, position + TAR_BLOCK_BYTES)
            yield member
            if member.size > num_bytes - member.offset:
                raise TarError(f"member {member.name} is said to have {member.size} bytes, the file ends before")
            position = member.offset + padded(member.size)
    raise TarError(f"more than {MAX_MEMBERS} members")


def parse_header(header: bytes, offset: int) -> TarMember:
    """One block of 512 bytes. Fields by the ustar layout: name 0-100, size 124-136, checksum 148-156, type 156, prefix
    345-500."""
    checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if octal(header[148:156]) != checksum:
        raise TarError(f"the header at byte {offset - TAR_BLOCK_BYTES} has a wrong checksum")
    prefix, name = header[345:500], header[:100]
    name = "/".join(part.partition(b"\0")[0].decode("utf-8", "backslashreplace") for part in (prefix, name) if part[0])
    return TarMember(name, offset, octal(header[124:136]), header_fault(name, header[156:157]))


def octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise TarError(f"a header holds {field!r}, wanted octal digits")
    return int(digits, 8)


def header_fault(name: str, kind: bytes) -> str | None:
    if kind not in REGULAR:
        what = {b"1": "a hard link", b"2": "a symbolic link"}.get(kind, f"of type {kind!r}")
        return f"member {name!r} is {what}, wanted plain files only"
    if name.startswith("/") or ".." in name.split("/") or "/" in name or not name.isprintable() or not name:
        return f"member {name!r}: wanted a plain name, without a directory"
    return None


def hostile_member(path: str | Path) -> str | None:
    """The first member that no shard has. A damaged header ends the search: that is for the checksums to say."""
    try:
        return next((member.fault for member in tar_members(path) if member.fault), None)
    except TarError:
        return None
