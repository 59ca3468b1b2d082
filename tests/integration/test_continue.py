"""A run that is killed goes on from its last checkpoint: nothing is skipped, and what is trained again is said."""

import json
import os
import re
import signal
import subprocess
import time

from commands import environment, execute, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


COMMAND = (
    "python launch/train.py --ds_config ds_configs/zero2.json --demo.num_proteins 20 --evaluation.num_proteins 4 "
    "--align.max_steps 4 --instruct.samples_per_step 16 --instruct.max_steps 40 --checkpoint.every_steps 3"
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
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "runs/demo/report.json").exists(), "it ended before it could be killed"
    kept = sorted(path.name for path in instruct.glob("step-*"))

    again = execute(COMMAND, folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "stage align is finished already" in again.stderr
    resumed = int(re.search(r"stage instruct goes on from .*step-(\d+)", again.stderr)[1])
    assert f"step-{resumed:08d}" >= kept[-1], "it went back further than its last checkpoint"
    assert json.loads((folder / "runs/demo/report.json").read_text())["steps_by_stage"] == {"align": 4, "instruct": 40}
    events = EventAccumulator(str(folder / "runs/demo/tensorboard/instruct"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 41))
