"""Where the time went, over all starts of a run: RUN/goodput.jsonl, a line for each start of its processes.

Rank 0 rewrites its own line in place after each step, a write of 1 kB without a sync: what a SIGKILL leaves is whole
but for the step under way. Durations are monotonic; the wall clock only dates the starts, and may be wrong.
"""

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("proteingpt")

LINE_BYTES = 1024
USEFUL, REPLAYED, WAITING, SAVING, EVALUATING = (
    "useful_steps",
    "replayed_steps",
    "waiting_for_data",
    "saving",
    "evaluating",
)
STARTING = "starting"  # with what is left: loading, exporting
STEPPING = "training"
PARTS = (USEFUL, REPLAYED, WAITING, SAVING, EVALUATING, STARTING)
NAME = "goodput.jsonl"


class Ledger:
    """Of this start, after those before. enabled: on rank 0 alone. age: seconds that the process had lived before."""

    def __init__(
        self, directory: Path, num_ranks: int, enabled: bool, age: float = 0.0,
        clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self.clock, self.path, self.enabled = clock, directory / NAME, enabled
        self.earlier = read_lines(self.path) if enabled else []
        self.furthest = furthest_steps(self.earlier)
        self.began = clock() - age
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.counts = {"useful_steps": 0, "replayed_steps": 0, "saves": 0, "failed_saves": 0}
        self.steps: dict[str, int] = {}
        # What it is doing is for those who look while it does: a step is brief, an evaluation may not be.
        self.line = {
            "began": wall_clock() - age, "ranks": num_ranks, "pid": os.getpid(), "host": socket.gethostname()[:64],
            "doing": STARTING, "ended": "",
        }  # fmt: skip
        self.descriptor, self.warned = None, False
        self.write()

    def step(self, stage: str, step: int, seconds: float, waiting_seconds: float):
        """A step ended, `step` being the number done; one that had been done already, by an earlier start or before the
        run went back, is a replay."""
        replayed = step <= max(self.furthest.get(stage, 0), self.steps.get(stage, 0))
        self.seconds[WAITING] += waiting_seconds
        self.seconds[REPLAYED if replayed else USEFUL] += seconds - waiting_seconds
        self.counts["replayed_steps" if replayed else "useful_steps"] += 1
        self.steps[stage] = max(step, self.steps.get(stage, 0))
        self.line["doing"] = STEPPING
        self.write()

    @contextmanager
    def spending(self, part: str):
        began, doing = self.clock(), self.line["doing"]
        self.line["doing"] = part
        self.write()
        try:
            yield
        finally:
            self.seconds[part] += self.clock() - began
            self.line["doing"] = doing
            self.write()

    def between_stages(self):
        """It loads or exports, which may take longer than any step."""
        self.line["doing"] = STARTING
        self.write()

    def count(self, name: str):
        self.counts[name] += 1

    def end(self, how: str):
        """how: "finished", "stopped", or what it ended with."""
        self.line["ended"] = re.sub(r"[^ -~]", "?", how)[:150]  # as JSON at most twice as long
        self.write()

    def now(self) -> dict:
        """This start's line."""
        alive = self.clock() - self.began
        spent = sum(seconds for part, seconds in self.seconds.items() if part != STARTING)
        seconds = {**self.seconds, STARTING: max(0.0, alive - spent)}
        rounded = {part: round(value, 3) for part, value in seconds.items()}
        return {**self.line, "alive": round(alive, 3), "seconds": rounded, **self.counts, "steps": self.steps}

    def summary(self) -> dict:
        return summary([*self.earlier, self.now()])

    def write(self):
        """A disk that is full must not end a training: said once."""
        if not self.enabled:
            return
        try:
            if self.descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                self.offset = -(-os.fstat(self.descriptor).st_size // LINE_BYTES) * LINE_BYTES
            os.pwrite(self.descriptor, padded(self.now()), self.offset)
        except OSError as error:
            if not self.warned:
                log.warning("%s cannot be written (%s): where time goes is not recorded", self.path, error.strerror)
            self.warned = True

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def padded(line: dict) -> bytes:
    text = json.dumps(line, allow_nan=False).encode()
    assert len(text) < LINE_BYTES, f"a ledger line of {len(text)} bytes"
    return text.ljust(LINE_BYTES - 1) + b"\n"


def read_lines(path: Path) -> list[dict]:
    """The lines of a ledger, oldest first; what was torn is passed over."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    lines = []
    for start in range(0, len(content), LINE_BYTES):
        try:
            line = json.loads(content[start : start + LINE_BYTES])
            if {"alive", "seconds", "steps"} <= line.keys():
                lines.append(line)
        except (ValueError, AttributeError, RecursionError):
            continue
    return lines


def furthest_steps(lines: list[dict]) -> dict[str, int]:
    furthest: dict[str, int] = {}
    for line in lines:
        for stage, step in line["steps"].items():
            furthest[stage] = max(step, furthest.get(stage, 0))
    return furthest


def summary(lines: list[dict]) -> dict:
    """Totals over all starts. seconds: that the processes lived; goodput: the share of useful steps in it. Down time
    between two starts is not in it: whether it was a fault or a weekend, nobody here knows."""
    seconds = {part: round(sum(line["seconds"].get(part, 0.0) for line in lines), 3) for part in PARTS}
    total = sum(line["alive"] for line in lines)
    names = ("useful_steps", "replayed_steps", "saves", "failed_saves")
    counts = {name: sum(line.get(name, 0) for line in lines) for name in names}
    return {
        "goodput": round(seconds[USEFUL] / total, 4) if total else 0.0,
        "seconds": round(total, 3),
        "starts": len(lines),
        "seconds_by_part": seconds,
        **counts,
    }


def summary_text(totals: dict) -> str:
    """One line for the end of a run."""
    shares = [
        f"{part.replace('_', ' ')} {totals['seconds_by_part'][part] / max(totals['seconds'], 1e-9):.1%}"
        for part in PARTS
        if part != USEFUL
    ]
    return f"{totals['goodput']:.1%} in useful steps ({', '.join(shares)}; {totals['starts']} start(s))"


def process_age(pid: int | str = "self") -> float:
    """Seconds that a process has lived: imports are a part of starting. 0 where that cannot be seen."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):  # not Linux
        return 0.0
