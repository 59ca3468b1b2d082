"""Time within modules, without what lies between them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from proteingpt.training import clock as clock_module
from proteingpt.training.clock import Clock

NOW = [0.0]


@pytest.fixture(autouse=True)
def time_of_the_test(monkeypatch):
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: NOW[0]))


def sleep(seconds: float):
    NOW[0] += seconds


class Sleeper(nn.Module):
    """Computes for `inside` seconds."""

    def __init__(self, inside: float):
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.ones(1)), inside

    def forward(self, x):
        sleep(self.inside)
        return x * self.weight


def test_only_what_modules_with_weights_do_counts():
    """What waits for weights that others hold does so in hooks that were there before the clock's, as DeepSpeed's
    are."""
    parts = nn.Sequential(Sleeper(1), nn.Identity(), Sleeper(2))
    parts[0].register_forward_pre_hook(lambda module, inputs: sleep(16))
    parts[2].register_forward_hook(lambda module, inputs, output: sleep(32))
    clock, wall = Clock(torch.device("cpu"), parts), Clock(torch.device("cpu"))
    with wall, clock:
        parts(torch.ones(1))
        sleep(64)
    assert clock.seconds() == 1 + 2 and wall.seconds() == 1 + 2 + 16 + 32 + 64


def test_outside_it_does_not_run_and_each_step_begins_at_nothing():
    part = nn.Sequential(Sleeper(1))
    clock = Clock(torch.device("cpu"), part)
    part(torch.ones(1))
    assert clock.seconds() == 0
    for _ in range(2):
        with clock:
            part(torch.ones(1))
        part(torch.ones(1))
        assert clock.seconds() == 1


def test_an_error_within_leaves_it_usable():
    part = nn.Sequential(nn.Linear(2, 2), Sleeper(3))
    clock = Clock(torch.device("cpu"), part)
    with pytest.raises(RuntimeError), clock:
        part(torch.ones(3))
    with clock:
        part(torch.ones(2))
    assert clock.seconds() == 3
