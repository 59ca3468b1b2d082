"""What people watch: TensorBoard, and one progress line. Only rank 0 has one that writes.

Neither may end a training: where the disk takes no curves, that is said, and tried again each minute.
"""

import logging
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time as wall_clock
from statistics import median

import torch
from torch.utils.tensorboard import SummaryWriter

from proteingpt.training.ledger import Ledger

from proteingpt.training.balance import Exchanged

log = logging.getLogger("proteingpt")

CLEAR_LINE = "\x1b[2K"  # on a terminal: no rest of a progress line stands behind what is written next
TRY_AGAIN_SECONDS = 60.0
LINE_EVERY_SECONDS = 5.0  # where the output is a file; on a terminal the line is redrawn at each step
RANKS_SHOWN = 16


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, over all ranks. loss: nats per answer token; seconds: wall time of the step;
    encoder_seconds: of the frozen encoders on this rank, hidden behind the step (as on a GPU) or not."""

    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_samples: int
    seconds: float
    waiting_seconds: float
    encoder_seconds: float = 0.0


class Monitor:
    """Of one stage, in a TensorBoard run of its own, so that stages lie over each other on one chart.

    A resumed stage takes back what was drawn beyond its checkpoint: those steps are trained again.
    """

    def __init__(
        self, directory: Path, stage: str, first_step: int, num_steps: int, enabled: bool, ledger: Ledger | None = None
    ):
        self.stage, self.first_step, self.num_steps, self.ledger = stage, first_step, num_steps, ledger
        self.directory, self.enabled = directory / stage, enabled
        self.writer, self.failed_at = None, None
        self.begun, self.shown = time.monotonic(), 0.0
        self.write(lambda writer: None, purge_step=first_step + 1)

    def write(self, action: Callable[[SummaryWriter], None], purge_step: int | None = None):
        """Do it, if the disk lets us. The writer is a thread, whose error is raised by a later call."""
        if not self.enabled or (self.failed_at is not None and time.monotonic() - self.failed_at < TRY_AGAIN_SECONDS):
            return
        try:
            if self.writer is None:
                put_before_now(self.directory, wall_clock())
                self.writer = SummaryWriter(self.directory, purge_step=purge_step)
            action(self.writer)
            self.failed_at = None
        except OSError as error:
            log.warning("TensorBoard's files cannot be written (%s): the training goes on without curves", error)
            self.failed_at = time.monotonic()
            self.drop_writer()

    def drop_writer(self):
        writer, self.writer = self.writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError:
            pass

    def step(self, step: int, report: StepReport):
        """step: the number of steps done, so that a run of n steps ends at x = n."""
        if self.ledger is not None:
            self.ledger.step(self.stage, step, report.seconds, report.waiting_seconds)
        if not self.enabled:
            return
        values = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.grad_norm,
            "tokens_per_second": report.num_tokens / report.seconds,
            "samples_per_second": report.num_samples / report.seconds,
            "step_seconds": report.seconds,
            "waiting_for_data_share": report.waiting_seconds / report.seconds,
            "encoders_share": report.encoder_seconds / report.seconds,
            "memory_gib": memory_bytes() / 2**30,
        }
        self.scalars(step, values)
        self.show(step, report)

    def ranks(self, step: int, exchanged: Exchanged):
        """Speeds and waiting shares: of each rank, or of the extremes where there are too many to look at."""
        for name, values in (("speed", exchanged.speeds), ("not_computing_share", exchanged.waiting)):
            shown = dict(enumerate(values))
            if len(values) > RANKS_SHOWN:
                shown = {"min": min(values), "median": median(values), "max": max(values)}
            self.scalars(step, {f"{name}/rank_{rank}": value for rank, value in shown.items()})
        self.scalars(step, {"speed/ranks_that_stay_slow": len(exchanged.slow)})
        if exchanged.slow:
            said = ", ".join(f"rank {rank}: {exchanged.speeds[rank]:.0f} tokens/s" for rank in exchanged.slow)
            self.write(lambda writer: writer.add_text("slow_ranks", said, step))

    def scalars(self, step: int, values: dict[str, float]):
        def add(writer: SummaryWriter):
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self.write(add)

    def texts(self, step: int, texts: list[str]):
        def add(writer: SummaryWriter):
            for number, text in enumerate(texts):
                writer.add_text(f"answer_{number}", text, step)
            writer.flush()

        self.write(add)

    def goodput(self, step: int):
        """Where the time went so far, in shares of it."""
        if self.enabled and self.ledger is not None:
            totals = self.ledger.summary()
            shares = {f"time/{part}": s / max(totals["seconds"], 1e-9) for part, s in totals["seconds_by_part"].items()}
            self.scalars(step, {**shares, "time/goodput": totals["goodput"]})

    def show(self, step: int, report: StepReport):
        now = time.monotonic()
        last = step == self.num_steps
        if not (last or sys.stderr.isatty() or now - self.shown >= LINE_EVERY_SECONDS):
            return
        self.shown = now
        left = (now - self.begun) / max(1, step - self.first_step) * (self.num_steps - step)
        line = (
            f"{self.stage} {step}/{self.num_steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"{report.num_tokens / report.seconds:,.0f} tokens/s  {duration(left)} left"
        )
        end = "\n" if last or not sys.stderr.isatty() else "\r"
        try:
            print(f"{CLEAR_LINE}{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)
        except OSError:  # a log file on a full disk, a terminal that was closed
            pass

    def close(self):
        self.drop_writer()


def put_before_now(directory: Path, now: float):
    """TensorBoard reads event files in the order of the times in their names. Where a clock that was ahead has been set
    back, older files would come last: they get earlier names, in their order."""
    named = [(re.match(r"events\.out\.tfevents\.(\d+)\.(.*)", path.name), path) for path in directory.glob("events.out.*")]
    files = sorted((int(match[1]), match[2], path) for match, path in named if match)
    if files and files[-1][0] >= int(now):
        for number, (_, rest, path) in enumerate(files):
            path.rename(path.with_name(f"events.out.tfevents.{max(0, int(now) - len(files) + number):010d}.{rest}"))


def memory_bytes() -> int:
    """Peak memory of this rank: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
