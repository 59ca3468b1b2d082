"""How a process of a run ends: with which exit code, who says why, and that no rank is left waiting for another.

0: finished. 1: the user's error, in one line. signals.REQUEUE: saved on a signal, start it again. watchdog.HUNG and
FAILED: all else; starting again may help.
"""

import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from proteingpt.config import ConfigError
from proteingpt.data.plan import PlanError
from proteingpt.data.shards import ShardError
from proteingpt.distributed import LaunchError, Rank, on_first_rank, stop
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.model.assemble import ModelError
from proteingpt.model.attention import AttentionError
from proteingpt.training.capacity import CapacityError
from proteingpt.training.checkpoint import CheckpointError
from proteingpt.training.guard import LossSpike, NonFiniteLoss
from proteingpt.training.loop import OutOfMemory, RankFailed
from proteingpt.training.signals import REQUEUE, Stopped
from proteingpt.training.watchdog import FAILED, USER_ERROR, Watchdog

log = logging.getLogger("proteingpt")

# The user's faults: shown as one sentence, without a traceback.
USER_ERRORS = (
    ConfigError,
    LaunchError,
    ShardError,
    PlanError,
    WeightsNotFound,
    UnknownWeights,
    BadCheckpoint,
    ModelError,
    AttentionError,
    CapacityError,
    CheckpointError,
    NonFiniteLoss,
    LossSpike,
    OutOfMemory,
    RankFailed,
)
# Of the disk: the user's to mend, and no reason for a traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# How a rank learns that another is gone.
LOST_TOUCH = re.compile("gloo|Connection (closed|reset)|NCCL|DistBackendError|DistNetworkError|Broken pipe")


def guarded(action: Callable[[], None], rank: Rank, watchdog: Watchdog) -> int:
    """The exit code of `action`. What ends it is said once, by one rank, and no rank is left waiting for this one."""
    try:
        action()
        leave(watchdog)
        return 0
    except Stopped as stopped:
        log.info(
            "stopped by %s: %s; the same command goes on from there (exit code %d)",
            watchdog.stop.reason,
            stopped,
            REQUEUE,
        )
        leave(watchdog)
        return REQUEUE
    except SystemExit:  # rank 0 has raised in what it did for all (distributed.on_first_rank), and says why
        return watchdog.code_of_failed()
    except USER_ERRORS as error:
        said = str(error)
        # What befell another rank may be no user's fault: that rank knows, and a restart may help.
        code = FAILED if isinstance(error, RankFailed) else USER_ERROR
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            return end_at_once(rank, watchdog)
        code = USER_ERROR
        said = f"{error}: make room, or give another --output; the same command goes on from the last checkpoint"
    except Exception:  # ours
        return end_at_once(rank, watchdog)
    watchdog.fail(code)
    if watchdog.says_first(said):
        print(f"error: {said}", file=sys.stderr, flush=True)
    return code


def leave(watchdog: Watchdog):
    """All ranks together: first nobody talks to rank 0's store any more, then it may go. A signal that is sent twice,
    by a batch system and by a launcher, must not change the exit code now."""
    watchdog.listener.ignore()
    watchdog.close()
    on_first_rank(lambda: None)
    stop()


def end_at_once(rank: Rank, watchdog: Watchdog) -> int:
    """An error that no user made. Among ranks without Python's leave-taking, in which collectives and devices may
    hang."""
    text = traceback.format_exc()
    while watchdog.is_ending:  # it says what is the matter, and ends this process
        time.sleep(1.0)
    if LOST_TOUCH.search(text):
        last = text.strip().splitlines()[-1][:200]
        print(
            f"error: rank {rank.rank} has lost touch with another rank, which was killed or ended: {last}",
            file=sys.stderr,
        )
    else:
        print(f"rank {rank.rank}:\n{text}", file=sys.stderr)
    if rank.world_size > 1:
        watchdog.fail(FAILED)
        sys.stderr.flush()
        time.sleep(0.2)  # for the store to send it
        os._exit(FAILED)
    return FAILED
