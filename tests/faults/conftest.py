"""The run without faults, that the others are held to; and a small disk."""

import subprocess

import pytest
from fault_runs import NUM_STEPS, FaultRun


@pytest.fixture
def disk_of(tmp_path):
    """disk_of("4m"): a folder on a disk of that size, of its own."""
    folder = tmp_path / "small"

    def mount(size: str):
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def fault_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def calm(fault_folder):
    run = FaultRun(fault_folder, "calm").finish()
    assert [step for step, _ in run.curve()] == list(range(1, NUM_STEPS + 1))
    return run
