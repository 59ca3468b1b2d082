"""Columns: what grows with the samples of a data set, in files that are mapped into memory.

Numbers only, little-endian and end to end. What is not looked at is not read, and what has been can be dropped again,
so that token ids (index.py) and the places of samples (shard_set.py) take the memory of what is in use. A folder of
columns is made once and found by its name; without a place for it the files have no name, and go with the last reader.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from proteingpt.data.shard_format import ShardError

log = logging.getLogger("proteingpt")

# Samples looked at together by whoever looks at all of them.
AT_ONCE = 100_000


class Writer:
    """Appends to the columns of a folder, so that they are made in the memory of a piece. dtypes: of each by name."""

    def __init__(self, directory: Path, dtypes: Mapping[str, str]):
        self.dtypes, self.ends = dtypes, {}
        self.files = {name: open(directory / name, "wb") for name in dtypes}

    def append(self, name: str, values: np.ndarray):
        self.files[name].write(np.ascontiguousarray(values, self.dtypes[name]).tobytes())

    def append_lengths(self, name: str, lengths: np.ndarray):
        """Of items: the column holds 0 and then where each ends."""
        if name not in self.ends:
            self.ends[name] = 0
            self.append(name, np.zeros(1, np.int64))
        ends = self.ends[name] + np.cumsum(lengths, dtype=np.int64)
        self.append(name, ends)
        self.ends[name] = int(ends[-1]) if len(ends) else self.ends[name]

    def close(self):
        for file in self.files.values():
            file.close()


def made_once(path: Path | None, dtypes: Mapping[str, str], write: Callable[[Writer], None]) -> dict[str, np.ndarray]:
    """Columns by name: from the folder `path` if it is there, else as `write` writes them, and left there where there
    is room and leave to. None: left nowhere. ShardError where there is no room for them anywhere."""
    if path is not None and not path.is_dir() and os.access(path.parent, os.W_OK):
        keep(path, dtypes, write)
    if path is not None and path.is_dir():
        return load(path, dtypes)
    try:
        with tempfile.TemporaryDirectory(prefix="columns-") as directory:
            fill(Path(directory), dtypes, write)
            return load(Path(directory), dtypes)
    except OSError as error:
        where = tempfile.gettempdir()
        raise ShardError(f"the index of a data set cannot be written to {where}: {error}: make room there") from error


def keep(path: Path, dtypes: Mapping[str, str], write: Callable[[Writer], None]):
    """Written aside and renamed, so that what has its name is whole. Another run may be first, with the same bytes."""
    aside = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        aside.mkdir(exist_ok=True)
        fill(aside, dtypes, write)
        for name in dtypes:
            fsync(aside / name)
        os.rename(aside, path)
    except OSError as error:
        if not path.is_dir():
            log.warning("%s cannot be kept, and is made anew at each start: %s", path, error)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fill(directory: Path, dtypes: Mapping[str, str], write: Callable[[Writer], None]):
    writer = Writer(directory, dtypes)
    try:
        write(writer)
    finally:
        writer.close()


def fsync(path: Path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def load(directory: Path, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {name: map_file(directory / name, dtype) for name, dtype in dtypes.items()}


def map_file(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # which cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r"))


def pieces(num: int) -> Iterator[slice]:
    """0 .. num in slices of AT_ONCE."""
    return (slice(first, min(first + AT_ONCE, num)) for first in range(0, num, AT_ONCE))


class Texts(Sequence):
    """S short texts. letters: uint8, ASCII, end to end; starts: int64 (S + 1,)."""

    def __init__(self, letters: np.ndarray, starts: np.ndarray):
        self.letters, self.starts = letters, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, where):
        number = range(len(self))[where]
        if isinstance(number, range):
            return [self[n] for n in number]
        # Latin-1 takes any byte: a damaged text is another text, and whoever compares it says so.
        begin, end = self.starts[number : number + 2].tolist()
        return str(self.letters[begin:end].tobytes(), "latin-1")

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Joined:
    """One-dimensional arrays end to end, where they lie, each with `shifts[part]` added to its values. Read by number,
    by a slice, or by an int array of numbers."""

    def __init__(self, parts: list[np.ndarray], shifts: list[int] | None = None):
        self.parts, self.shifts = parts, shifts or [0] * len(parts)
        self.starts = np.concatenate(([0], np.cumsum([len(part) for part in parts])))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where):
        if isinstance(where, slice):
            return self._slice(*where.indices(len(self))[:2])
        part = np.searchsorted(self.starts, where, side="right") - 1
        if np.ndim(where) == 0:
            return self.parts[part][where - self.starts[part]] + self.shifts[part]
        found = np.empty(len(where), self.parts[0].dtype)
        for p in np.unique(part):
            chosen = part == p
            found[chosen] = self.parts[p][where[chosen] - self.starts[p]] + self.shifts[p]
        return found

    def _slice(self, first: int, last: int) -> np.ndarray:
        found = [
            part[max(0, first - start) : last - start] + part.dtype.type(shift)
            for part, start, shift in zip(self.parts, self.starts.tolist(), self.shifts)
            if start < last and first < start + len(part)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, self.parts[0].dtype), *found])
