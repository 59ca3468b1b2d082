"""python launch/status.py RUN: where a run is, in the terminal, from the small files that it writes, and nothing else.

Nothing is written or loaded: it answers within a second beside a run in progress, for a dead one, and from another
machine on the same disk. Whether the run lives is read off the lock that its rank 0 holds on RUN/.lock, off the process
where it is this machine's, and else off the age of what was written last. Exit codes are those of the run itself, and
RUNNING.
"""

import argparse
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from proteingpt.training.ledger import NAME, STARTING, STEPPING, process_age, read_lines, summary
from proteingpt.training.progress import NAME as PROGRESS
from proteingpt.training.progress import number, read_object, read_progress_file, whole
from proteingpt.training.signals import REQUEUE, REQUEUE_MARK
from proteingpt.training.status_text import is_break, text_of, what_is_wrong
from proteingpt.training.watchdog import FAILED, HUNG

FINISHED, NO_RUN, RUNNING = 0, 1, 3
CODES = {"finished": FINISHED, "running": RUNNING, "stopped": REQUEUE, "hung": HUNG, "dead": FAILED}

# So long without a sign of a process that cannot be looked at, and it counts as gone; NFS shows times a minute late.
UNSEEN_SECONDS = 180.0
# A step of a process that lives hangs after the longer of these; what is not a step has no length that is known.
QUIET_SECONDS, QUIET_STEPS, QUIET_OTHERWISE = 600.0, 20, 1800.0
SAME_START_SECONDS = 120.0  # between two clocks' word for when a process began; else its number has been given anew


class NoRun(ValueError):
    """There is no run in that place."""


# ------------------------------------------------------------------------------------------------- what can be seen


@dataclass(frozen=True)
class Signs:
    """Of life. held: whether somebody has the run's lock, None where that cannot be told. process: of rank 0, "alive",
    "stopped" (by a signal) or "gone", None where it is another machine's. age: seconds since something was written."""

    held: bool | None
    process: str | None
    age: float
    doing: str = STEPPING
    step_seconds: float | None = None


def state_of(is_finished: bool, ended: str, waits: bool, signs: Signs) -> str:
    """One of CODES. ended: what the last start said of its end, "" for nothing. waits: to be started again, it says
    so."""
    if is_finished:
        return "finished"
    seen = bool(signs.held) or signs.process in ("alive", "stopped")
    unseen_but_fresh = signs.process is None and not ended and signs.age < UNSEEN_SECONDS
    if not seen and not unseen_but_fresh:
        return "stopped" if waits or ended == "stopped" else "dead"
    return "hung" if signs.process == "stopped" or signs.age > patience(signs) else "running"


def patience(signs: Signs) -> float:
    """Seconds without a sign after which a run that lives counts as hung."""
    if signs.doing != STEPPING:
        return QUIET_OTHERWISE
    return max(QUIET_SECONDS, QUIET_STEPS * (signs.step_seconds or 0.0))


def is_held(path: Path) -> bool | None:
    """Whether a process has locked this file. To ask is to lock it with others for a moment; nothing is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(descriptor)


def process_state(pid: int, began: float, now: float) -> str:
    """Of a process of this machine that began at that time of the clock: "alive", "stopped" or "gone"."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
    if letter in "ZX" or abs(now - process_age(pid) - began) > SAME_START_SECONDS:
        return "gone"
    return "stopped" if letter in "Tt" else "alive"


def age_of(paths: Sequence[Path], now: float) -> float:
    """Seconds since the newest of these was written; infinite where there is none. A clock that is behind makes it
    0."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(0.0, now - max(times)) if times else math.inf


# ----------------------------------------------------------------------------------------------------------- reading


def read_status(run: Path, now: float | None = None, host: str | None = None) -> dict:
    """All that is known of the run, as --json prints it. NoRun where there is none."""
    now, host = time.time() if now is None else now, host or socket.gethostname()[:64]
    lines, progress, report = read_lines(run / NAME), read_progress_file(run), read_object(run / "report.json")
    if not (lines or progress or report or (run / "recipe.yaml").is_file()):
        raise NoRun(f"{run} holds no run: expected the directory that was given to launch/train.py as --output")
    last = lines[-1] if lines else {}
    here = last.get("host", host) == host
    signs = Signs(
        is_held(run / ".lock"),
        process_state(last["pid"], last["began"], now) if here and {"pid", "began"} <= last.keys() else None,
        age_of([run / NAME, run / PROGRESS, *([] if lines else [run / "recipe.yaml"])], now),
        last.get("doing", STARTING), number(progress.get("step_seconds")),
    )  # fmt: skip
    ended = last.get("ended", "")
    state = state_of(bool(report), ended, (run / REQUEUE_MARK).is_file(), signs)
    lives = state in ("running", "hung")
    stages = texts(progress.get("stages")) or list(last.get("steps", {}))
    found = {
        "run": str(run), "state": state, "code": CODES[state], "doing": signs.doing if lives else None,
        "host": last.get("host"), "pid": last.get("pid"), "process": signs.process, "lock_held": signs.held,
        "seconds_since_sign": finite_or_none(signs.age), "ended": ended or None, "stages": stages,
        **progress_figures(progress, signs.age if state == "running" else 0.0),
        "evaluation": last_evaluation(run, stages), "checkpoint": last_checkpoint(run, stages, now),
        "time": summary(lines) if lines else None, "starts": len(lines),
        "stops": sum(line.get("ended") == "stopped" for line in lines),
        "breaks": sum(is_break(line.get("ended", "")) for line in (lines[:-1] if lives else lines)),
        "unreadable_samples": sum(count_lines(path) for path in run.glob("set_aside-*.jsonl")),
        "has_stacks": any(size_of(path) for path in run.glob("stacks/rank-*.txt")), "free_gib": free_gib(run),
        "report": report or None,
    }  # fmt: skip
    return {**found, "wrong": what_is_wrong(found)}


def progress_figures(progress: dict, age: float) -> dict:
    """What progress.json says, and what follows from it. age: seconds that have passed since."""
    losses = [number(loss) for loss in progress.get("losses") or []] if isinstance(progress.get("losses"), list) else []
    left = number(progress.get("seconds_left"))
    names = (
        "learning_rate", "gradient_norm", "tokens_per_second", "samples_per_second", "step_seconds", "pack_fill", "mfu",
        "waiting_for_data_share", "waiting_for_encoders_share", "encoders_share", "memory_gib",
    )  # fmt: skip
    rows = progress.get("ranks")
    return {
        "stage": progress.get("stage"), **{name: whole(progress.get(name)) for name in ("step", "num_steps")},
        "seconds_left": None if left is None else max(0.0, left - age), "loss": number(progress.get("loss")),
        "trend": trend(losses), "losses": losses, **{name: number(progress.get(name)) for name in names},
        **{name: whole(progress.get(name)) for name in ("skipped_steps", "quarantined_samples")},
        "ranks": [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else [],
        "slow_ranks": progress.get("slow_ranks") if isinstance(progress.get("slow_ranks"), list) else [],
    }  # fmt: skip


def trend(losses: Sequence[float | None]) -> dict | None:
    """Of the last losses, the later half beside the earlier: {"word": "falling", "rising" or "flat", "now", "before",
    "steps": of a half}. Flat is what two standard errors of the difference cannot tell from noise. None for fewer than
    8, or where one is not finite."""
    half = len(losses) // 2
    if half < 4 or any(loss is None for loss in losses):
        return None
    before, now = losses[-2 * half : -half], losses[-half:]
    error = math.sqrt((stdev(before) ** 2 + stdev(now) ** 2) / half)
    change = fmean(now) - fmean(before)
    word = "flat" if abs(change) <= 2 * error else "falling" if change < 0 else "rising"
    return {"word": word, "now": fmean(now), "before": fmean(before), "steps": half}


def last_evaluation(run: Path, stages: Sequence[str]) -> dict | None:
    """{"stage", "step", "held_out_loss", ...} of the latest stage that has one."""
    for stage in reversed(stages):
        for line in reversed(tail(run / stage / "evaluations.jsonl")):
            try:
                found = json.loads(line)
                if isinstance(found["step"], int):
                    return {
                        "stage": stage,
                        **{name: number(value) for name, value in found.items()},
                        "step": found["step"],
                    }
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return None


def last_checkpoint(run: Path, stages: Sequence[str], now: float) -> dict | None:
    """{"stage", "step", "path", "seconds_ago", "gib"} of the latest stage that has one."""
    for stage in reversed(stages):
        named = [path for path in (run / stage).glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        if named:
            path = max(named, key=lambda path: int(path.name.removeprefix("step-")))
            size = sum(map(size_of, path.glob("*"))) / 2**30
            age = finite_or_none(age_of([path / "checkpoint.json"], now))
            step = int(path.name.removeprefix("step-"))
            return {"stage": stage, "step": step, "path": str(path), "seconds_ago": age, "gib": size}
    return None


def tail(path: Path, num_bytes: int = 2**16) -> list[str]:
    """The last lines of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def free_gib(run: Path) -> float | None:
    try:
        found = os.statvfs(run)
        return found.f_bavail * found.f_frsize / 2**30
    except OSError:
        return None


def texts(value) -> list[str]:
    """Names of stages: those of directories, and of none outside."""
    return [text for text in value if isinstance(text, str) and text.isidentifier()] if isinstance(value, list) else []


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------------------------------------- command


def show(run: Path, as_json: bool) -> int:
    try:
        found = read_status(run)
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_RUN
    print(json.dumps(found) if as_json else text_of(found), flush=True)
    return found["code"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/status.py", description="Where a run is, and what is wrong with it. Nothing is written.",
        epilog=f"Exit codes: {FINISHED} finished, {RUNNING} running, {REQUEUE} stopped and saved, {HUNG} hung, "
        f"{FAILED} dead, {NO_RUN} no run there.",
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="what launch/train.py was given as --output")
    parser.add_argument("--json", action="store_true", help="one line of JSON, for scripts")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again and again, until the run has finished")
    args, code = parser.parse_args(argv), RUNNING
    try:
        while True:
            if args.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")
            code = show(args.run, args.json)
            if not args.watch or code in (FINISHED, NO_RUN):
                return code
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return code
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
