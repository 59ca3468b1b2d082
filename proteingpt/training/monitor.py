"""What people watch of a stage: curves (training/trackers.py), RUN/progress.json, and one progress line. Only rank 0
has one that writes, and nothing here may end a training.
"""

import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from proteingpt.training.balance import Exchanged
from proteingpt.training.ledger import Ledger
from proteingpt.training.progress import KEPT_LOSSES, ProgressFile, duration
from proteingpt.training.tally import RankReport, memory_bytes, mfu_of_all
from proteingpt.training.trackers import TensorBoard

CLEAR_LINE = "\x1b[2K"  # on a terminal: no rest of a progress line stands behind what is written next
LINE_EVERY_SECONDS = 5.0  # where the output is a file; on a terminal the line is redrawn at each step
RANKS_SHOWN = 16
# What stands beside the settings in a table of runs.
METRICS = (
    "learning/held_out_accuracy", "learning/held_out_lift", "learning/held_out_loss", "learning/loss",
    "speed/tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, over all ranks. loss: nats per answer token; seconds: wall time of the step;
    encoder_seconds: of the frozen encoders on this rank, hidden behind the step (as on a GPU) or not;
    encoder_wait_seconds: that the step stood still for them; pack_fill: share of tokens_per_pack that the packs hold,
    None where that is not set."""

    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_samples: int
    seconds: float
    waiting_seconds: float
    encoder_seconds: float = 0.0
    encoder_wait_seconds: float = 0.0
    pack_fill: float | None = None


class Monitor:
    """Of one stage, in a run of its own in each tracker. directory: TensorBoard's, of all stages.

    A resumed stage takes back what was drawn beyond its checkpoint: those steps are trained again. trackers: others,
    with TensorBoard's methods. settings: what stands in a table of runs. absent: tags that this stage will have no
    curve of.
    """

    def __init__(
        self, directory: Path, stage: str, first_step: int, num_steps: int, enabled: bool, ledger: Ledger | None = None,
        *, trackers: list | None = None, settings: dict | None = None, absent: tuple[str, ...] = (),
        progress: ProgressFile | None = None,
    ):  # fmt: skip
        self.stage, self.first_step, self.num_steps, self.ledger = stage, first_step, num_steps, ledger
        self.enabled, self.progress = enabled, progress if enabled else None
        self.trackers = [TensorBoard(directory / stage, first_step, absent), *(trackers or [])] if enabled else []
        self.begun, self.shown = time.monotonic(), 0.0
        self.losses: deque[float] = deque(maxlen=KEPT_LOSSES)
        for tracker in self.trackers:
            if settings:
                tracker.settings(settings, METRICS)
        self.note(True, stage=stage, step=first_step, first_step=first_step, num_steps=num_steps)

    def step(self, step: int, report: StepReport):
        """step: the number of steps done, so that a run of n steps ends at x = n."""
        if self.ledger is not None:
            self.ledger.step(self.stage, step, report.seconds, report.waiting_seconds)
        if not self.enabled:
            return
        values = {
            "learning/loss": report.loss,
            "learning/learning_rate": report.learning_rate,
            "vitals/gradient_norm": report.grad_norm,
            "speed/tokens_per_second": report.num_tokens / report.seconds,
            "speed/samples_per_second": report.num_samples / report.seconds,
            "speed/step_seconds": report.seconds,
            "speed/waiting_for_data_share": report.waiting_seconds / report.seconds,
            "speed/encoders_share": report.encoder_seconds / report.seconds,
            "speed/waiting_for_encoders_share": report.encoder_wait_seconds / report.seconds,
            "vitals/memory_gib": memory_bytes() / 2**30,
        }
        if report.pack_fill is not None:
            values["speed/pack_fill"] = report.pack_fill
        self.scalars(step, values)
        self.losses.append(report.loss)
        last = {tag.partition("/")[2]: value for tag, value in values.items()}
        self.note(step=step, losses=list(self.losses), seconds_left=self.seconds_left(step), **last)
        self.show(step, report)

    def ranks(self, step: int, exchanged: Exchanged):
        """What an exchange has brought to light: of each rank, or of the extremes where there are too many to look
        at."""
        if not self.enabled:
            return
        reports = [report for report in exchanged.told if isinstance(report, RankReport)]
        by_rank = {
            "speed_by_rank/computing_speed": exchanged.speeds,
            "speed_by_rank/agreed_share": exchanged.shares,
            "vitals_by_rank/not_computing_share": exchanged.waiting,
            "speed_by_rank/tokens_per_second": [report.tokens_per_second for report in reports],
            "vitals_by_rank/memory_gib": [report.memory_gib for report in reports],
            "speed_by_rank/mfu": [report.mfu for report in reports],
        }
        values = {"vitals/ranks_that_stay_slow": float(len(exchanged.slow)), "speed/mfu": mfu_of_all(reports)}
        for tag, of_ranks in by_rank.items():
            values |= {f"{tag}/{name}": value for name, value in shown(of_ranks).items()}
        self.scalars(step, {tag: value for tag, value in values.items() if value is not None})
        if exchanged.slow:
            said = ", ".join(f"rank {rank}: {exchanged.speeds[rank]:.0f} tokens/s" for rank in exchanged.slow)
            self.texts(step, {"slow_ranks": said})
        if self.progress is not None:
            self.note(mfu=values["speed/mfu"], ranks=rows_of(exchanged, reports), slow_ranks=exchanged.slow)

    def scalars(self, step: int, values: dict[str, float]):
        for tracker in self.trackers:
            tracker.scalars([(step, values)])

    def texts(self, step: int, texts: dict[str, str]):
        for tracker in self.trackers:
            tracker.texts(step, texts)

    def note(self, now: bool = False, **values):
        """In RUN/progress.json."""
        if self.progress is not None:
            self.progress.note(now, **values)

    def goodput(self, step: int):
        """Where the time went so far, in shares of it."""
        if self.enabled and self.ledger is not None:
            totals = self.ledger.summary()
            shares = {f"time/{part}": s / max(totals["seconds"], 1e-9) for part, s in totals["seconds_by_part"].items()}
            self.scalars(step, {**shares, "time/goodput": totals["goodput"]})

    def seconds_left(self, step: int) -> float:
        """By what this start has needed so far, its evaluations and saves in it."""
        return (time.monotonic() - self.begun) / max(1, step - self.first_step) * (self.num_steps - step)

    def show(self, step: int, report: StepReport):
        now = time.monotonic()
        last = step == self.num_steps
        if not (last or sys.stderr.isatty() or now - self.shown >= LINE_EVERY_SECONDS):
            return
        self.shown = now
        line = (
            f"{self.stage} {step}/{self.num_steps}  loss {report.loss:.4f}  lr {report.learning_rate:.2e}  "
            f"{report.num_tokens / report.seconds:,.0f} tokens/s  {duration(self.seconds_left(step))} left"
        )
        end = "\n" if last or not sys.stderr.isatty() else "\r"
        try:
            print(f"{CLEAR_LINE}{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)
        except OSError:  # a log file on a full disk, a terminal that was closed
            pass

    def close(self, finished: bool = False):
        self.note(True)
        if self.ledger is not None:
            self.ledger.between_stages()
        for tracker in self.trackers:
            tracker.close(finished)


def shown(of_ranks: list) -> dict[str, float]:
    """{rank_0: value, ...}, or the extremes of many; nothing where any is not known."""
    if not of_ranks or any(value is None for value in of_ranks):
        return {}
    if len(of_ranks) > RANKS_SHOWN:
        return {"min": min(of_ranks), "median": median(of_ranks), "max": max(of_ranks)}
    return {f"rank_{rank}": value for rank, value in enumerate(of_ranks)}


def rows_of(exchanged: Exchanged, reports: list[RankReport]) -> list[dict]:
    """A row for each rank, as progress.json keeps them."""
    reports = reports if len(reports) == len(exchanged.speeds) else [None] * len(exchanged.speeds)
    return [
        {
            "computing_speed": exchanged.speeds[rank], "agreed_share": exchanged.shares[rank],
            "not_computing_share": exchanged.waiting[rank], **({**asdict(report), "mfu": report.mfu} if report else {}),
        }
        for rank, report in enumerate(reports)
    ]  # fmt: skip
