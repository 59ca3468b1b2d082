"""Launchers that are signalled or killed: their ranks save, leave, and can be started again. The real launchers."""

import os
import re
import signal
import socket
import subprocess
import time

import pytest
from commands import environment, execute, workplace

from proteingpt.training.ledger import NAME, read_lines
from proteingpt.training.restarts import free_port

pytestmark = pytest.mark.nightly
TRAIN = (
    "launch/train.py --ds_config ds_configs/zero2.json --demo.num_proteins 20 --evaluation.num_proteins 2 "
    "--align.max_steps 2 --instruct.max_steps 400 --instruct.epochs 1000 --instruct.samples_per_step 16 "
    "--checkpoint.every_steps 20"
)


def steps_done(folder) -> int:
    lines = read_lines(folder / "runs/demo" / NAME)
    return lines[-1]["steps"].get("instruct", 0) if lines else 0


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def descendants(pid: int) -> list[int]:
    return [pid, *(other for child in children(pid) for other in descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begin(command: str, folder, log) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(
            command.split(), cwd=folder, env=environment(), stdout=file, stderr=file, start_new_session=True
        )


# The `deepspeed` command, and its per-node launcher below it.
CASES = [
    ("deepspeed", 0, signal.SIGTERM), ("deepspeed", 0, signal.SIGKILL), ("deepspeed", 1, signal.SIGTERM),
    ("deepspeed", 1, signal.SIGUSR1), ("deepspeed", 1, signal.SIGKILL),
    ("python", 0, signal.SIGTERM), ("python", 0, signal.SIGUSR1), ("python", 0, signal.SIGKILL),
]  # fmt: skip


@pytest.mark.parametrize("launcher, depth, number", CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_a_launcher_that_is_signalled_or_killed_leaves_a_saved_run_and_no_orphans(tmp_path, launcher, depth, number):
    folder, log = workplace(tmp_path), tmp_path / "log"
    command = (
        f"deepspeed --num_gpus 2 --master_port {free_port()} {TRAIN}"
        if launcher == "deepspeed"
        else f"python {TRAIN} --ranks 2"
    )
    process = begin(command, folder, log)
    family = []
    try:
        deadline = time.monotonic() + 120
        while steps_done(folder) < 5:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        family = descendants(process.pid)
        os.kill(family[depth], number)
        process.wait(60)
        deadline = time.monotonic() + 30
        while any(is_alive(pid) for pid in family) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in family if is_alive(pid)], log.read_text()[-3000:]
    finally:
        for pid in family or [process.pid]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    said = log.read_text()
    assert (folder / "runs/demo/requeue").is_file(), said[-3000:]
    step = int(re.search(r"saved after step (\d+) of stage instruct", said)[1])
    assert (folder / f"runs/demo/instruct/step-{step:08d}").is_dir() and step < 400


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port, began = other.getsockname()[1], time.monotonic()
        done = execute(f"deepspeed --num_gpus 2 --master_port {port} {TRAIN}", workplace(tmp_path))
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert done.stderr.count("error:") == 1
    assert f"error: port {port} of 127.0.0.1 is in use" in done.stderr and "MASTER_PORT" in done.stderr
