"""Mutated real files: whatever a file holds, it becomes samples or a named reason, in bounded time and memory.

The reader runs in a process of its own under a limit of address space, so that neither a hang nor a blow-up can hide.
"""

import gzip
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteingpt.data.entries import encode_outcome, read_outcome
from proteingpt.data.filters import STEP_OF, Filters
from proteingpt.data.sources import Job

REAL = Path(__file__).parents[3] / "shared" / "data" / "pdb"
SUFFIXES = (".bcif", ".cif", ".pdb")
NUM_FILES, NUM_EXAMPLES = 6, 500
MAX_SECONDS = 20
# Memory beyond what the process has when it starts; the largest of these files takes a few MB. The address space is
# larger, since the reader asks for as much as a file may have at most, and touches what the file has.
MAX_RESIDENT_BYTES, MAX_ADDRESS_BYTES = 300 << 20, 4 << 30

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data in {REAL} are absent")


def read_forever(pipe, directory: Path) -> None:
    """Reads the file each message names, with all its chains, and says what became of it."""
    num_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes + MAX_ADDRESS_BYTES,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while name := pipe.recv():
        outcome = read_outcome(Job(directory / name, name, "1abc"), Filters(chain="all"))
        encode_outcome("key", outcome, {})
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        pipe.send((len(outcome.samples), [(skip.reason, skip.detail) for skip in outcome.skips], more))


class Reader:
    """A reading process; `read` gives its answer or fails, and starts another after one that did not answer."""

    def __init__(self, directory: Path):
        self.directory, self.process = directory, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=read_forever, args=(other, self.directory), daemon=True)
        self.process.start()
        other.close()

    def read(self, suffix: str, content: bytes) -> tuple[int, list[tuple[str, str]], int]:
        if self.process is None:
            self.start()
        name = f"1abc{suffix}"
        (self.directory / name).write_bytes(content)
        self.pipe.send(name)
        try:
            if self.pipe.poll(MAX_SECONDS):
                return self.pipe.recv()
            why = f"no answer in {MAX_SECONDS} s"
        except EOFError:
            why = "the reading process died"
        self.stop()
        raise AssertionError(why)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("fuzz"))
    yield reader
    reader.stop()


def small_files(suffix: str) -> list[bytes]:
    paths = sorted(REAL.glob(f"*{suffix}.gz"), key=lambda path: (path.stat().st_size, path.name))[:NUM_FILES]
    return [gzip.decompress(path.read_bytes()) for path in paths]


FILES = {suffix: small_files(suffix) for suffix in SUFFIXES} if REAL.is_dir() else {}

# Where: a share of the file's length. What: bytes put there, in place of so many. Long runs and extreme numbers too.
TEXTS = [b"\n", b"'", b'"', b"\n;", b"#", b"loop_\n", b"data_x\n", b"?", b".", b"9" * 30, b"-1", b"nan", b"1e400"]
NUMBERS = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x00"]
RUNS = st.tuples(st.binary(min_size=1, max_size=3), st.integers(100, 20_000)).map(lambda drawn: drawn[0] * drawn[1])
PIECES = st.one_of(st.binary(max_size=8), st.sampled_from(TEXTS), st.sampled_from(NUMBERS), RUNS)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 1, 2, 4, 80, 3000]), PIECES), max_size=6)


def mutate(content: bytes, edits: list[tuple[float, int, bytes]], end: float, packed: bool) -> bytes:
    if packed:
        content = gzip.compress(content, compresslevel=1)
    for share, num_removed, piece in edits:
        place = int(share * len(content))
        content = content[:place] + piece + content[place + num_removed :]
    return content[: int(end * len(content))]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mutated_file_becomes_samples_or_a_named_reason(reader, suffix):
    for content in FILES[suffix]:
        num_samples, skips, _ = reader.read(suffix, content)
        assert num_samples + len(skips) >= 1, "the files are not read at all"

    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, NUM_FILES - 1), EDITS, st.just(1.0) | st.floats(0, 1), st.sampled_from([False] * 5 + [True]))
    def holds(file, edits, end, packed):
        num_samples, skips, more = reader.read(suffix, mutate(FILES[suffix][file], edits, end, packed))
        assert more < MAX_RESIDENT_BYTES
        assert num_samples or skips
        for reason, detail in skips:
            assert reason in STEP_OF and detail
            assert reason != "reader failed" and "MemoryError" not in detail, detail

    holds()


def test_the_limits_are_those_of_the_reading_process(reader):
    """The harness itself: a process that ends is seen, and the next file is read again."""
    reader.read(".pdb", FILES[".pdb"][0])
    reader.process.kill()
    reader.process.join()
    with pytest.raises((AssertionError, OSError)):
        reader.read(".pdb", FILES[".pdb"][0])
    reader.stop()
    assert reader.read(".pdb", FILES[".pdb"][0])
