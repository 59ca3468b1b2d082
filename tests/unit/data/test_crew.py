"""Handing out: every file once, the largest first, and no batch so large that the others wait for it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data import crew
from proteingpt.data.crew import Crew, cut_batches
from proteingpt.data.sources import Job


class SizedPath(type(Path())):
    """A path that says how large its file is."""

    def stat(self, **_):
        class Stat:
            st_size = int(self.name)

        return Stat


@given(st.lists(st.integers(0, 3 * crew.BATCH_BYTES), max_size=60))
def test_every_file_is_in_one_batch_the_largest_first(sizes):
    jobs = [(f"key{n}", Job(SizedPath(str(size)), str(size), str(size))) for n, size in enumerate(sizes)]
    batches = cut_batches(jobs)
    assert sorted(key for batch in batches for key, _ in batch) == sorted(key for key, _ in jobs)
    order = [int(job.file) for batch in batches for _, job in batch]
    assert order == sorted(sizes, reverse=True)
    for batch in batches:
        total = sum(int(job.file) for _, job in batch)
        assert len(batch) == 1 or (len(batch) <= crew.BATCH_FILES and total <= crew.BATCH_BYTES)


@pytest.mark.parametrize("num_remote, here", [(0, True), (1, True), (3, True), (2, False)])
def test_every_batch_is_done_once_whoever_there_is(num_remote, here):
    with ThreadPoolExecutor(max(num_remote, 1)) as executor:
        found = list(Crew(executor if num_remote else None, num_remote, here).run(lambda batch: batch, list(range(50))))
    assert sorted(found) == list(range(50))


def test_nobody_waits_for_the_one_with_the_ribosome():
    """One batch does not end until all others are done: they must be dealt to the other worker and to this process."""
    done, others_done = [], threading.Event()

    def work(batch: int) -> int:
        if batch == 0:
            assert others_done.wait(20), "the others waited for the slow one"
        else:
            done.append(batch)
            if len(done) == 39:
                others_done.set()
            time.sleep(0.001)
        return batch

    with ThreadPoolExecutor(2) as executor:
        assert sorted(Crew(executor, 2, here=True).run(work, list(range(40)))) == list(range(40))


def test_what_comes_first_is_done_once_and_only_if_others_work_meanwhile():
    done = []
    with ThreadPoolExecutor(2) as executor:
        found = list(Crew(executor, 2, here=True).run(len, ["a", "bc", "def"], first=lambda: done.append(1)))
    assert sorted(found) == [1, 2, 3] and done == [1]
    assert list(Crew(None, 0, here=True).run(len, ["a"], first=lambda: done.append(2))) == [1] and done == [1]


def test_a_fault_of_a_worker_is_raised_here():
    def work(batch: int) -> int:
        raise OSError("disk full")

    with ThreadPoolExecutor(1) as executor, pytest.raises(OSError, match="disk full"):
        list(Crew(executor, 1, here=False).run(work, [1, 2, 3]))
