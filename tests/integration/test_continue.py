"""A run that is killed goes on from its last checkpoint: nothing is skipped, and what is trained again is said."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from commands import environment, execute, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.training.status import read_status

# A tracker that is real, if it is installed, and needs no server.
TRACK = " --track mlflow" if importlib.util.find_spec("mlflow") else ""
COMMAND = (
    "MLFLOW_ALLOW_FILE_STORE=true MLFLOW_TRACKING_URI=mlruns python launch/train.py --ds_config ds_configs/zero2.json "
    "--demo.num_proteins 20 --evaluation.num_proteins 4 --align.max_steps 4 --instruct.samples_per_step 16 "
    "--instruct.max_steps 40 --checkpoint.every_steps 3" + TRACK
)


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path):
    folder = workplace(tmp_path)
    instruct = folder / "runs/demo/instruct"
    process = subprocess.Popen(
        COMMAND, shell=True, cwd=folder, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(instruct.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    living = read_status(folder / "runs/demo")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while read_status(folder / "runs/demo")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)  # the shell is gone; the kernel may still be taking down what it had started, thread by thread
    dead = execute("python launch/status.py runs/demo --json", folder)
    assert not (folder / "runs/demo/report.json").exists(), "it ended before it could be killed"
    kept = sorted(path.name for path in instruct.glob("step-*"))

    assert (living["state"], living["stage"], living["num_steps"]) == ("running", "instruct", 40)
    assert living["lock_held"] and living["process"] == "alive" and living["wrong"] == []
    found = json.loads(dead.stdout)
    assert (dead.returncode, found["state"]) == (70, "dead")
    assert f"goes on from step {int(kept[-1].removeprefix('step-'))} of instruct" in found["wrong"][0]

    again = execute(COMMAND, folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "stage align is finished already" in again.stderr
    resumed = int(re.search(r"stage instruct goes on from .*step-(\d+)", again.stderr)[1])
    assert f"step-{resumed:08d}" >= kept[-1], "it went back further than its last checkpoint"
    assert json.loads((folder / "runs/demo/report.json").read_text())["steps_by_stage"] == {"align": 4, "instruct": 40}
    events = EventAccumulator(str(folder / "runs/demo/tensorboard/instruct"))
    events.Reload()
    assert [event.step for event in events.Scalars("learning/loss")] == list(range(1, 41))
    finished = read_status(folder / "runs/demo")
    assert (finished["state"], finished["starts"], finished["breaks"]) == ("finished", 2, 1)
    if TRACK:
        assert set(range(resumed + 1, 41)) <= steps_in_mlflow(folder)


def steps_in_mlflow(folder: Path) -> set[int]:
    """Of the loss of the stage's run, from its own files: a line of time, value and step for each."""
    run = json.loads((folder / "runs/demo/trackers.json").read_text())["mlflow instruct"]
    (path,) = folder.glob(f"mlruns/*/{run}/metrics/learning/loss")
    return {int(line.split()[2]) for line in path.read_text().splitlines()}
