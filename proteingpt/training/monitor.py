"""What people watch: TensorBoard, and one progress line. Only rank 0 has one that writes."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

LINE_EVERY_SECONDS = 5.0  # where the output is a file; on a terminal the line is redrawn at each step


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, over all ranks. loss: nats per answer token; seconds: wall time of the step."""

    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_samples: int
    seconds: float
    waiting_seconds: float


class Monitor:
    """Of one stage, in a TensorBoard run of its own, so that stages lie over each other on one chart.

    A resumed stage takes back what was drawn beyond its checkpoint: those steps are trained again.
    """

    def __init__(self, directory: Path, stage: str, first_step: int, num_steps: int, enabled: bool):
        self.stage, self.first_step, self.num_steps = stage, first_step, num_steps
        self.writer = SummaryWriter(directory / stage, purge_step=first_step + 1) if enabled else None
        self.begun, self.shown = time.monotonic(), 0.0

    def step(self, step: int, report: StepReport):
        """step: the number of steps done, so that a run of n steps ends at x = n."""
        if self.writer is None:
            return
        values = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.grad_norm,
            "tokens_per_second": report.num_tokens / report.seconds,
            "samples_per_second": report.num_samples / report.seconds,
            "step_seconds": report.seconds,
            "waiting_for_data_share": report.waiting_seconds / report.seconds,
            "memory_gib": memory_bytes() / 2**30,
        }
        self.scalars(step, values)
        self.show(step, report)

    def scalars(self, step: int, values: dict[str, float]):
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def texts(self, step: int, texts: list[str]):
        if self.writer is not None:
            for number, text in enumerate(texts):
                self.writer.add_text(f"answer_{number}", text, step)
            self.writer.flush()

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
        print(f"\x1b[2K{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)

    def close(self):
        if self.writer is not None:
            self.writer.close()


def memory_bytes() -> int:
    """Peak memory of this rank: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
