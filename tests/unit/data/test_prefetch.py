"""The thread that reads ahead, and what is said when it does not get on."""

import os
import threading
import time

import numpy as np
import pytest
from shard_server import serving

from proteingpt.data import prefetch as module
from proteingpt.data.prefetch import ReadTimeout, prefetch
from proteingpt.data.shard_cache import Activity
from proteingpt.data.shards import ShardCache, ShardSet, write_shards
from proteingpt.protein import Protein, Sample


@pytest.fixture
def directory(tmp_path):
    samples = [Sample(Protein(f"{n}abc", "A", "ACDEF", np.ones((5, 3, 3), np.float32)), "", ()) for n in range(4)]
    write_shards(tmp_path / "shards", {"train": samples}, samples_per_shard=2, options={})
    return tmp_path / "shards"


def join_readers():
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_a_file_that_blocks_is_named_after_the_set_time_and_waiting_is_shown(directory, monkeypatch, caplog):
    """A pipe in the place of a shard: opening it waits for a writer that never comes."""
    monkeypatch.setattr(module, "SHOW_AFTER_SECONDS", 0.2)
    shards = ShardSet(directory, "train")
    (directory / "train-00001.tar").unlink()
    os.mkfifo(directory / "train-00001.tar")
    ahead = prefetch(shards.read_protein, 0, 4, timeout_seconds=0.8, activity=shards.activity)
    assert [next(ahead).key, next(ahead).key] == ["0abc_A", "1abc_A"]
    with pytest.raises(ReadTimeout, match=r"step 2 waits for data: nothing came for 1 s from shard .*train-00001.tar"):
        next(ahead)
    assert "step 2 has been waiting for data for" in caplog.text and "train-00001.tar, opening it" in caplog.text
    (directory / "train-00001.tar").rename(directory / "aside")
    os.close(os.open(directory / "aside", os.O_WRONLY))  # lets the thread go
    join_readers()


def test_a_server_that_stalls_in_the_middle_of_a_shard_is_named(directory, tmp_path):
    with serving(directory) as (address, orders):
        orders.stalled = {"train-00001.tar"}
        shards = ShardSet(address, "train", ShardCache(tmp_path / "cache", 2**30))
        ahead = prefetch(shards.read_protein, 0, 4, timeout_seconds=0.5, activity=shards.activity)
        next(ahead), next(ahead)
        with pytest.raises(ReadTimeout, match="from shard http://.*/train-00001.tar, fetching it: 0.0 of 0.0 MB"):
            next(ahead)
        orders.stalled = set()
        orders.released.set()
        join_readers()


def test_a_slow_reader_that_gets_on_is_waited_for():
    """In all it takes longer than the time-out; its words change before it."""
    activity = Activity()

    def make(step: int) -> int:
        for part in range(4):
            activity.text = f"shard a, {part} MB"
            time.sleep(0.2)
        activity.text = None
        return step

    assert list(prefetch(make, 0, 2, timeout_seconds=0.5, activity=activity)) == [0, 1]


def test_planning_has_no_time_limit():
    """Only a file is given up."""
    assert list(prefetch(lambda step: time.sleep(0.5) or step, 0, 1, timeout_seconds=0.1)) == [0]


def test_a_thread_that_dies_without_a_word_is_noticed(monkeypatch):
    """As when the interpreter ends it: nothing is put in the queue."""

    class Dead(threading.Thread):
        def run(self):
            pass

    monkeypatch.setattr(module.threading, "Thread", Dead)
    with pytest.raises(RuntimeError, match="the reading thread has died before step 7"):
        next(prefetch(lambda step: step, 7, 8, timeout_seconds=1.0))
