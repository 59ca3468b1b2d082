"""The run without faults, that the others are held to."""

import pytest
from fault_runs import NUM_STEPS, FaultRun


@pytest.fixture(scope="session")
def fault_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def calm(fault_folder):
    run = FaultRun(fault_folder, "calm").finish()
    assert [step for step, _ in run.curve()] == list(range(1, NUM_STEPS + 1))
    return run
