"""What a hang is said to be, by hand; the stacks of a process that hangs are in tests/faults."""

import os
import subprocess
import sys
import time

import pytest

from proteingpt.distributed import Rank
from proteingpt.training.signals import REQUEUE, StopRequest
from proteingpt.training.watchdog import Watchdog, hang_message, least_quiet, silent_ranks


def said(pid: int, doing: str) -> dict:
    return {"pid": pid, "host": "node1", "doing": doing}


def test_who_has_not_been_heard_is_silent():
    heard = {0: ({}, 100.0), 1: ({}, 95.0), 2: ({}, 89.9)}
    assert silent_ranks(heard, 100.0, 10.0) == [2]
    assert silent_ranks(heard, 100.0, 4.0) == [1, 2]


def test_the_message_names_the_silent_first_and_what_all_were_at():
    heard = {0: (said(11, "instruct, after step 7"), 0.4), 1: (said(12, "instruct, after step 7"), 31.0)}
    message = hang_message(heard, [1], 30.0)
    assert message.startswith(
        "the run hangs: nothing has gone on for 30 s (devices.hang_seconds); rank 1 (pid 12 on node1)"
    )
    assert "no sign of life for 31 s" in message and message.index("rank 1 (pid") < message.index(
        "rank 0 is at: instruct"
    )


def test_without_others_it_is_said_all_the_same():
    assert "the run hangs: nothing has gone on for 5 s" in hang_message({}, [], 5.0)


def test_the_run_is_as_quiet_as_the_rank_that_went_on_last():
    """Rank 0 said 3 s ago that it had waited for 900; rank 1, just now, that it had gone on 2 s before."""
    assert least_quiet({0: ({"for": 900.0}, 97.0), 1: ({"for": 2.0}, 100.0)}, 100.0) == 2.0
    assert least_quiet({0: ({"for": 900.0}, 97.0), 1: ({"for": 2.0}, 40.0)}, 100.0) == 62.0


@pytest.fixture
def watchdog():
    made = Watchdog(Rank(0, 1, 0, "127.0.0.1", 0, "none"), StopRequest(), hang_seconds=None)
    yield made
    made.close()


def test_a_run_that_did_not_hang_leaves_no_stacks(watchdog, tmp_path):
    watchdog.keep_stacks_in(tmp_path)
    assert (tmp_path / "stacks/rank-0.txt").is_file()
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stack_is_written_on_the_signal_by_which_others_ask_for_it(watchdog, tmp_path):
    from proteingpt.training.watchdog import STACK_SIGNAL

    watchdog.keep_stacks_in(tmp_path)
    os.kill(os.getpid(), STACK_SIGNAL)
    text = (tmp_path / "stacks/rank-0.txt").read_text()
    assert "test_a_stack_is_written_on_the_signal" in text and "most recent call first" in text


def test_a_rank_whose_process_is_silent_is_lost_also_while_nothing_is_watched(watchdog):
    """The others may wait for it in a collective that is patient with what rank 0 does alone."""
    watchdog.close()  # its threads know the time
    watchdog.hang_seconds, watchdog.heard = 70.0, {0: ({}, 100.0), 1: ({}, 35.0)}
    assert not watchdog.has_lost_one(105.0) and watchdog.has_lost_one(105.5)
    watchdog.heard, watchdog.store, watchdog.talked = {}, object(), 40.0
    assert not watchdog.has_lost_one(110.0) and watchdog.has_lost_one(110.5)


def test_words_that_change_are_a_sign_of_life_and_words_that_do_not_are_none(watchdog):
    words = ["1 of 500 MB"]
    with watchdog.watching(lambda: words[0]):
        for changed in (True, False):
            watchdog.beaten, words[0] = 0.0, "2 of 500 MB"
            time.sleep(1.2)
            assert (watchdog.beaten > 0.0) == changed


def test_a_stop_while_there_is_nothing_to_save_ends_the_process_and_asks_for_another_start(tmp_path):
    """The main thread may be in the midst of an index of millions, or of an export."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from proteingpt.distributed import Rank\n"
        "from proteingpt.training import watchdog\n"
        "from proteingpt.training.signals import StopRequest\n"
        "watchdog.LEAVE_SECONDS = 0.2\n"
        "made = watchdog.Watchdog(Rank(0, 1, 0, '127.0.0.1', 0, 'none'), StopRequest(), None)\n"
        "made.keep_stacks_in(Path(sys.argv[1]))\n"
        "with made.watching():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); time.sleep(2); print('steps come to an end', flush=True)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (REQUEUE, "steps come to an end\n"), done.stderr
    assert (tmp_path / "requeue").read_text() == "SIGUSR1\n"


def test_what_all_find_out_is_said_once(worlds):
    answers = worlds(2)(say_on_rank)
    assert sorted(answers) == [[False, False], [True, True]] or sorted(map(sum, answers)) == [1, 1]


def say_on_rank(rank, device) -> list[bool]:
    made = Watchdog(rank, StopRequest(), None)
    try:
        return [made.says_first(message) for message in ("no such shard", "another error")]
    finally:
        import torch.distributed as dist

        dist.barrier()
        made.close()
        dist.barrier()


@pytest.mark.nightly
def test_ranks_that_wait_for_a_slow_one_that_goes_on_do_not_hang(worlds):
    """Each rank in turn waits for thrice what it may be silent: were that a hang, its process would be gone."""
    assert worlds(2)(wait_on_rank, 1) == [True, True]
    assert worlds(2)(wait_on_rank, 0) == [True, True]


def wait_on_rank(rank, device, slow: int) -> bool:
    import time

    import torch.distributed as dist

    made = Watchdog(rank, StopRequest(), hang_seconds=2)
    try:
        with made.watching():
            for _ in range(30 if rank.rank == slow else 0):
                made.beat("a long evaluation")
                time.sleep(0.2)
            dist.barrier()
    finally:
        made.close()
        dist.barrier()
    return True
