"""Benchmarks run at tiny size, so that they work on a machine that is worth it; and what they count is counted
right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mixed_devices import figures_of as figures_of_blocks
from benchmarks.mixed_devices import simulate, until
from benchmarks.saving import stall_share
from proteingpt.data.shares import efficiency

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


@pytest.fixture
def figures_of(monkeypatch, capsys):
    """The JSON line of a benchmark that runs in this process."""

    def run(name: str, *options: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *options])
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_a_shared_prefix_is_counted_once(figures_of):
    """Of one protein with 29 questions: alone each reads P + q tokens, in a pack all read P + 29 q."""
    figures = figures_of("shared_prefix", "--proteins", "1", "--width", "32", "--layers", "1")
    alone, packed = (figures[f"{way}_tokens_per_question"] for way in ("one_by_one", "packed"))
    prefix = (alone - packed) * 29 / 28
    assert prefix == pytest.approx(round(prefix)) and 0 < prefix < alone
    assert figures["ratio"] > 0 and figures["token_ratio"] == pytest.approx(alone / packed)


def test_the_loader_reads_what_webdataset_reads(figures_of):
    """It compares the samples before it times them."""
    figures = figures_of("loader", "--proteins", "30")
    assert figures["ratio"] > 0 and 0 <= figures["waiting_share"] < 1
    assert all(figures[f"{way}_packs_per_second"] > 0 for way in ("thread", "process"))


def test_an_epoch_is_planned(figures_of):
    figures = figures_of("plan", "--proteins", "400", "--turns", "300", "--samples", "2000", "--window", "2000")
    assert figures["ratio"] == pytest.approx(5 / figures["slowest_seconds"])
    assert 0.9 < figures["fill_at_4096"] <= 1 and 0.9 < figures["balance"]["share_of_the_sum"] <= 1
    assert [found["samples"] for found in figures["memory"]["sets"]] == [500, 2000]
    assert figures["index_turns_per_second"].keys() == {"recurring", "different"}


@pytest.mark.nightly
def test_two_unlike_ranks_run_alone_and_together():
    figures = last_json(sys.executable, "-m", "benchmarks.mixed_devices", "--blocks", "2", "--packs", "6")
    assert len(figures["ratio_by_block"]) == 2 and figures["ratio"] > 0 and 0 < figures["limit"] <= 1
    fast, slow = figures["alone_tokens_per_second"]
    assert slow < fast and figures["measured_slow_over_fast"] < 1, "the handicap is felt, and seen by the trainer"
    assert len(figures["not_computing_share"]) == 2 and len(figures["simulated"]) == 4


def test_speeds_of_two_that_ran_at_the_same_time_by_hand():
    """In two blocks: 90 tokens in 3 s and 30 in 1 s alone, beside 35 in 3.5 s and 5 in 0.5 s; together 70 in 2 s."""
    fast, slow = [[1, 2, 30], [2, 3, 30], [3, 4, 30]], [[0.5, 4, 35]]
    assert until([*fast, [4, 5, 30]], slow[-1][1]) == fast and until(fast, 0.5) == fast[:1]
    first = [fast, slow, [[6, 7, 40], [7.5, 8, 30]], [[9, 10, 20]]]
    second = [fast[:1], [[1, 1.5, 5]], fast[:1], fast[:1]]
    told = {"pack_tokens": [[10] * 4], "speeds": [30.0, 11.0], "waiting_share": 0.0, "not_computing": [0.1, 0.2]}
    figures = figures_of_blocks([first], told)
    assert figures["alone_tokens_per_second"] == [30.0, 10.0] and figures["ratio"] == 35 / 40
    assert figures["equal_split"] == 20 / 40 == figures["equal_split_limit"]
    assert figures["limit"] == pytest.approx(1.0)  # three packs and one: each takes a second
    figures = figures_of_blocks([first, second], told)
    assert figures["ratio"] == (70 + 30) / (2 + 1) / 40 and figures["ratio_by_block"] == [35 / 40, 30 / 40]


def test_the_simulator_without_noise_reaches_what_whole_packs_allow():
    assert simulate([2.0, 1.0], 3, noise=0.0) == pytest.approx(1.0)
    assert simulate([2.0, 1.0], 2, noise=0.0) == pytest.approx(2 / 3)  # one each, or both on the fast one: a second
    speeds = [10_643.0] * 2 + [3_679.0] * 2
    assert simulate(speeds, 64, noise=0.0) == pytest.approx(efficiency(64, speeds))
    assert simulate(speeds, 64, noise=0.03) < efficiency(64, speeds)


def test_what_a_save_costs_by_hand():
    """Of 600 s: 1 s held; and of 4 s of writing, in which steps of 2 s take 4, half."""
    assert stall_share(held=1.0, slowed=4.0, quiet=2.0, writing=4.0) == pytest.approx(3 / 600)
    assert stall_share(held=1.0, slowed=1.9, quiet=2.0, writing=4.0) == pytest.approx(1 / 600)


@pytest.mark.nightly
def test_saving_is_measured_at_tiny_size():
    figures = last_json(sys.executable, "-m", "benchmarks.saving", "--widths", "64", "--steps", "1", "--saves", "1")
    (found,) = figures["sizes"]
    assert found["state_bytes"] == 3 * 4 * (512 + 2560 + 2) * 64 and found["held_seconds"] > 0 and figures["ratio"] > 0
