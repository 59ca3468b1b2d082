"""Runs of launch/train.py on two forked ranks, to which a test does something while they train."""

import json
import os
import time
from pathlib import Path

import torch
from benchmarks.forked_ranks import ForkedRank
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.training import restarts
from proteingpt.training.checkpoint import checkpoints
from proteingpt.training.ledger import NAME, read_lines

REPOSITORY = Path(__file__).parents[1]
NUM_STEPS, EVERY = 60, 10
SETTINGS = {
    "--ds_config": REPOSITORY / "ds_configs" / "zero2.json", "--demo.num_proteins": 20, "--evaluation.num_proteins": 2,
    "--evaluation.every_steps": 25, "--align.max_steps": 2, "--instruct.max_steps": NUM_STEPS,
    "--instruct.samples_per_step": 16, "--checkpoint.every_steps": EVERY, "--devices.balance": "equal",
}  # fmt: skip


class FaultRun:
    """A run in FOLDER/OUTPUT, whose files outlive its ranks. more: settings, by option."""

    def __init__(self, folder: Path, output: str, more: dict | None = None):
        self.folder, self.directory, self.log = folder, folder / output, folder / f"{output}.log"
        settings = {**SETTINGS, "--output": self.directory, **(more or {})}
        self.argv = [str(part) for pair in settings.items() for part in pair]
        self.ranks: list[ForkedRank] = []

    def begin(self, num_ranks: int = 2):
        port = restarts.free_port()
        self.ranks = [self.fork(restarts.environment(rank, num_ranks, port)) for rank in range(num_ranks)]
        return self

    def fork(self, env: dict) -> ForkedRank:
        inherited = {name: value for name, value in env.items() if name not in os.environ or os.environ[name] != value}
        return ForkedRank(self.argv, inherited, self.folder, self.log)

    def steps_done(self, stage: str = "instruct") -> int:
        lines = read_lines(self.directory / NAME)
        return lines[-1]["steps"].get(stage, 0) if lines else 0

    def wait_for(self, condition, timeout: float = 90):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it never came to that\n{self.said[-3000:]}"
            assert all(rank.poll() is None for rank in self.ranks), f"it ended before\n{self.said[-3000:]}"
            time.sleep(0.005)

    def wait_for_step(self, step: int):
        self.wait_for(lambda: self.steps_done() >= step)

    def codes(self, timeout: float = 60) -> list[int]:
        """Exit codes; whoever lives on after the timeout is ended, and the test fails."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.wait(max(0.1, deadline - time.monotonic()))
        codes = [rank.poll() for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        assert None not in codes, f"{codes}: somebody hangs\n{self.said[-3000:]}"
        return codes

    def finish(self):
        """Started once more, it completes."""
        assert self.begin().codes(timeout=120) == [0, 0], self.said[-3000:]
        return self

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    @property
    def report(self) -> dict:
        return json.loads((self.directory / "report.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(checkpoints(self.directory / "instruct")[0] / "weights.safetensors")

    def curve(self, tag: str = "learning/loss") -> list[tuple[int, float]]:
        reader = EventAccumulator(str(self.directory / "tensorboard" / "instruct"))
        reader.Reload()
        return [(event.step, event.value) for event in reader.Scalars(tag)]


def assert_same_run(found: FaultRun, calm: FaultRun):
    """Every loss, every evaluation and the final weights, to the bit."""
    assert found.curve() == calm.curve()
    assert found.curve("learning/held_out_loss") == calm.curve("learning/held_out_loss")
    weights = calm.weights()
    assert found.weights().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.weights().items())
