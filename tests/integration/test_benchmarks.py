"""Benchmarks for a GPU run at tiny size on a CPU, so that they work once there is one; and their FLOPs are counted right."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# FLOPs of the matrix products of a step, by torch's own counter: of linear maps (mm, addmm), not of attention (bmm).
COUNT = """
import json, torch
from torch.utils.flop_counter import FlopCounterMode
from benchmarks import step
model = step.build(step.TINY, torch.device("cpu"))
pack = step.make_pack(700, 512)
rows = [[torch.randn(len(p) + 2, width, dtype=torch.bfloat16) for p in pack.proteins] for width in step.WIDTHS]
with FlopCounterMode(display=False) as counter:
    model(pack, *rows).backward()
by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
config = model.llm.config
print(json.dumps({
    "counted": by_operator,
    "claimed": step.matrix_flops(config, pack.num_tokens, len(pack.targets)),
    "rows": sum(len(rows) for rows in rows[0]), "tokens": pack.num_tokens, "width": config.hidden_size,
}))
"""


def last_json(*command: str) -> dict:
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_step_runs_at_tiny_size():
    figures = last_json(
        sys.executable, "-m", "benchmarks.step", "--tokens", "300", "500", "800", "--checkpointing", "off", "on",
        "--steps", "1",
    )  # fmt: skip
    assert figures["ratio"] is None, "a CPU's peak is in no table"
    assert figures["checkpointing"].keys() == {"off", "on"}
    for results in figures["checkpointing"].values():
        assert [0.9 < result["tokens"] / wanted <= 1 for result, wanted in zip(results, (300, 500, 800))] == [True] * 3
        assert all(r["tokens_per_second"] > 0 and r["predicted_peak_bytes"] > 0 and r["answer_tokens"] for r in results)


def test_the_flops_of_the_step_are_those_that_torch_counts():
    """4 per parameter and token, beside the projector, whose weights have gradients and whose input has none."""
    told = last_json(sys.executable, "-c", COUNT)
    projector = 2 * 2 * told["rows"] * (512 + 2560) * told["width"]
    assert told["counted"]["aten.mm"] + told["counted"]["aten.addmm"] == told["claimed"] + projector
    assert told["tokens"] <= 700
