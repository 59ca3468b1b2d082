"""Exit codes: who is at fault, on one rank and on two."""

import errno
import os
import time
from contextlib import closing

import pytest

from proteingpt.config import ConfigError
from proteingpt.distributed import Rank, on_first_rank
from proteingpt.training.endings import guarded
from proteingpt.training.loop import RankFailed
from proteingpt.training.signals import StopRequest
from proteingpt.training.watchdog import FAILED, Watchdog


def test_news_of_another_ranks_fault_is_no_users_error(capfd):
    """With 1 a restart would not be tried; a user's error gives 1 on the rank that met it, which decides."""

    def raising(error: Exception):
        def action():
            raise error

        return action

    rank = Rank(0, 1, 0, "127.0.0.1", 0, "none")
    with closing(Watchdog(rank, StopRequest(), hang_seconds=None)) as watchdog:
        assert guarded(raising(RankFailed("rank 1 at step 3: RuntimeError: CUDA error")), rank, watchdog) == FAILED
        assert guarded(raising(ConfigError("data.shards is not set")), rank, watchdog) == 1
        assert guarded(raising(OSError(errno.ENOSPC, "No space left on device")), rank, watchdog) == 1
        assert guarded(raising(OSError(errno.EIO, "Input/output error")), rank, watchdog) == FAILED
    said = capfd.readouterr().err
    assert said.count("error: ") == 3 and "make room" in said and "Traceback" in said


@pytest.mark.parametrize("error, codes", [(ConfigError("no --llm"), [1, 1]), (KeyError("ours"), [FAILED, FAILED])])
def test_what_rank_0_raises_for_all_gives_all_its_exit_code(worlds, error, codes):
    """A supervisor tries a fault again and a user's error not: by the code of any rank."""
    assert worlds(2)(guarded_on_rank, error) == codes


def guarded_on_rank(rank, device, error) -> int:
    made = Watchdog(rank, StopRequest(), None)
    left = []
    os_exit, os._exit = os._exit, left.append

    def raising():
        raise error

    try:
        code = guarded(lambda: on_first_rank(raising), rank, made)
        time.sleep(1.0)  # rank 0 keeps the store
    finally:
        made.close()
        os._exit = os_exit
    return left[0] if left else code
