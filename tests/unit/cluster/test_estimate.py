"""Arithmetic of the estimate, counted by hand; and the command, on shapes that take no time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.cluster import command
from proteingpt.cluster.calibrate import Calibration, CalibrationError, Line, fit_line, read_calibration, write_calibration
from proteingpt.cluster.encoders import encoder_shape
from proteingpt.cluster.estimate import Choice, alternatives, largest_that_fits, table
from proteingpt.cluster.shapes import NAMED, ShapeError, attention_flops, llm_config, matrix_flops, pack_pairs, step_flops
from proteingpt.cluster.spec import ClusterError, parse_cluster
from proteingpt.cluster.times import Rate, Traffic, step_seconds, traffic
from proteingpt.cluster.work import DataSet, make_pack, scaled_lengths, stage_work
from proteingpt.config import EncodersConfig, RunConfig, StageConfig, from_dict, read_recipe
from proteingpt.protein import PrefixLength

# ------------------------------------------------------------------------------------------------------------ the cluster


def test_a_cluster_in_a_line():
    cluster = parse_cluster("2xH100-80, A100-40")
    assert [(k.count, k.name, k.gib) for k in cluster.kinds] == [(2, "H100", 80), (1, "A100", 40)]
    assert [k.flops for k in cluster.kinds] == [0.46 * 989e12, 0.51 * 312e12]
    assert all("assumed" in k.source and "LLM-Foundry" in k.source for k in cluster.kinds)
    assert [k.label for k in cluster.ranks] == ["H100-80", "H100-80", "A100-40"]
    assert parse_cluster("8xH100-PCIe-80").kinds[0].flops == 0.46 * 756e12
    assert parse_cluster("2xCPU-16").kinds[0].flops is None


def test_a_cluster_in_a_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"link_gbps": 300, "devices": [{"count": 4, "name": "MI300X", "gib": 192, "tflops": 1307, "mfu": 0.3}]}))
    cluster = parse_cluster(str(path))
    assert cluster.link_gbps == 300
    assert cluster.kinds[0].flops == pytest.approx(0.3 * 1307e12)
    assert "given" in cluster.kinds[0].source


@pytest.mark.parametrize("text", ["", "2H100", "H100", "0xH100-80", "2xH100-0"])
def test_a_cluster_that_is_none_is_refused(text):
    with pytest.raises(ClusterError):
        parse_cluster(text)


@pytest.mark.parametrize("text", ["[]", "devices: []", "devices: [{name: H100}]", "devices: [{name: H100, gib: 80, color: red}]", "{", "link_gbps: 3"])
def test_a_file_that_is_no_cluster_is_refused(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match="cluster.yaml"):
        parse_cluster(str(path))


# ---------------------------------------------------------------------------------------------------------- FLOPs and work


def test_sizes_of_named_shapes_are_the_published_ones():
    """Llama 2's 6,738,415,616 parameters, Llama 3's 8,030,261,248 and 70,553,706,496, Mistral's 7,241,732,096, less norms
    and input embeddings."""
    for name, parameters in (("vicuna-7b", 6738415616), ("llama-3-8b", 8030261248), ("llama-3-70b", 70553706496), ("mistral-7b", 7241732096)):
        config = llm_config(name)
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        assert matrix_flops(config, 1, 1, passes=1, head_passes=1) == parameters - norms - config.vocab_size * config.hidden_size


def test_an_llm_that_is_none_is_refused(tmp_path):
    with pytest.raises(ShapeError, match="llama-3-8b"):
        llm_config(str(tmp_path))


def test_pairs_that_see_each_other():
    """Each token counted, one by one, by the definition: all before it on the prefix, and on its own branch."""
    pack = make_pack(500, 100, turns=3)
    counted = 0
    for begin, end in zip(pack.group_starts, pack.group_starts[1:]):
        branch = pack.branch_ids[begin:end].tolist()
        counted += sum(branch[j] in (0, branch[i]) for i in range(len(branch)) for j in range(i + 1))
    assert pack_pairs(pack) == counted
    assert attention_flops(llm_config("tiny"), counted) == 12 * counted * 64 * 2


def test_passes_over_the_weights():
    """Frozen 2 + 2, trained 2 + 2 + 2, and 2 more for what is computed again; the head of few answers is not."""
    config = llm_config("tiny")
    counted = {
        (train, checkpointing): step_flops(config, 1000, 0, 0, train, checkpointing)
        for train in ("projector", "full") for checkpointing in (False, True)
    }  # fmt: skip
    unit = counted["projector", False] / 4
    assert counted == {("projector", False): 4 * unit, ("projector", True): 6 * unit, ("full", False): 6 * unit, ("full", True): 8 * unit}


def stage(**changes) -> StageConfig:
    plain = dict(
        template="paper", epochs=3, samples_per_step=4, questions_per_group=1, max_answer_tokens=100, warmup_steps=0,
        warmup_lr=0.0, init_lr=1e-4, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    return StageConfig(**{**plain, **changes})


def alike(number: int, stands_for: float, residues=100, questions=8) -> DataSet:
    return DataSet(np.full(number, residues), stands_for, [[(24, 4)] * questions] * number, [250] * number, "by hand")


def test_steps_and_tokens_of_a_stage():
    """1,000 proteins of 8 questions, 4 a step, 3 epochs: 6,000 steps. A question alone: 6 before it, 2 x 102 rows, 24 + 4 - 1."""
    work = stage_work(alike(50, 1000), "instruct", stage(), 0, PrefixLength(), 4096)
    assert (work.num_steps, work.steps_per_epoch) == (6000, 2000)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 204 + 27}
    assert work.mean("answers") == 16
    assert work.asked == (1, 24, 4)


def test_questions_that_share_a_prefix():
    work = stage_work(alike(50, 1000), "instruct", stage(samples_per_step=8, questions_per_group=8), 0, PrefixLength(), 4096)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 204 + 8 * 27}
    assert work.largest.num_tokens == 426


def test_descriptions_are_cut_and_long_proteins_left_out():
    data = replace(alike(50, 1000), residues=np.array([100] * 25 + [3000] * 25))
    work = stage_work(data, "align", stage(), 0, PrefixLength(), 4096)
    assert work.steps_per_epoch == 125  # 500 of them, 4 a step
    assert {pack.answers for packs in work.steps for pack in packs} == {100}


def test_one_encoder_has_half_the_rows():
    work = stage_work(alike(50, 1000), "instruct", stage(), 0, PrefixLength(1), 4096)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 102 + 27}


@given(st.floats(50, 600), st.integers(200, 2000))
def test_lengths_have_the_mean_that_was_asked_for(mean, number):
    assert scaled_lengths(number, mean, 0).mean() == pytest.approx(mean, rel=0.01)


# -------------------------------------------------------------------------------------------------------------------- time

FREE = Traffic(0.0, 0.0, 1.0)


def test_a_step_takes_as_long_as_its_slowest_rank():
    """Three packs on ranks of 200 and 100 FLOP/s: two go to the fast one."""
    rates = [Rate(200.0, 0.0, 0.0, ""), Rate(100.0, 0.0, 0.0, "")]
    assert step_seconds([10] * 3, [1000.0] * 3, [0.0] * 3, rates, [2.0, 1.0], [None] * 2, FREE, 0.0) == 10.0
    assert step_seconds([10] * 3, [1000.0] * 3, [0.0] * 3, rates, [1.0, 1.0], [None] * 2, FREE, 0.0) == 10.0
    assert step_seconds([10] * 4, [1000.0] * 4, [0.0] * 4, rates, [1.0, 1.0], [None] * 2, FREE, 0.0) == 20.0


def test_what_else_a_step_takes():
    """Overhead of each forward, encoders, exchange of gradients, and the update of 50 parameters."""
    rates = [Rate(100.0, 1.0, 0.1, "")]
    assert step_seconds([10] * 2, [100.0] * 2, [50.0] * 2, rates, [1.0], [None], Traffic(0.0, 30.0, 10.0), 50) == 2 * (1 + 1 + 0.5) + 3 + 5
    fused = step_seconds([10] * 2, [100.0] * 2, [50.0] * 2, rates, [1.0], [20], Traffic(0.0, 30.0, 10.0), 50)
    assert fused == 1 + 2 + 1 + 3 + 5


def test_fetching_weights_hides_behind_the_computation_or_the_reverse():
    rates = [Rate(100.0, 0.0, 0.0, "")]
    for fetched, seconds in ((50.0, 10.0), (200.0, 20.0)):
        assert step_seconds([10], [1000.0], [0.0], rates, [1.0], [None], Traffic(fetched, 0.0, 10.0), 0.0) == seconds


def test_under_zero_3_a_rank_without_packs_runs_the_shortest():
    rates = [Rate(100.0, 0.0, 0.0, "")] * 2
    both = step_seconds([10, 20], [100.0, 200.0], [0.0] * 2, rates, [1.0, 1e-6], [None] * 2, FREE, 0.0, equal_counts=True)
    assert both == 3.0


def test_bytes_that_go_over_the_link():
    """Four ranks: an all-reduce moves 1.5 of a buffer, a gather 0.75. 16-bit weights, 1,000 frozen and 100 that train."""
    assert traffic(0, 2, 1000, 100, 4, 1.0).of_step == 1.5 * 200
    assert traffic(2, 2, 1000, 100, 4, 1.0).of_step == (1.5 + 0.75) * 200
    assert traffic(2, 2, 1000, 100, 4, 1.0, offloads=True).of_step == (1.5 + 0.75) * 200 + 2 * 50
    sharded = traffic(3, 2, 1000, 100, 4, 1.0)
    assert (sharded.of_step, sharded.of_forward) == (0, 0.75 * (2 * 2200 + 200))
    assert traffic(2, 2, 1000, 100, 1, 20.0) == Traffic(0.0, 0.0, 20e9)


# ------------------------------------------------------------------------------------------------------------- calibration


@given(st.floats(1e-4, 1.0), st.floats(1e9, 1e14), st.lists(st.floats(1e9, 1e12), min_size=2, max_size=6, unique=True))
def test_a_line_is_found_again(overhead, rate, flops):
    if max(flops) / min(flops) < 1.5:
        flops = [flops[0], 2 * flops[0]]
    line = Line(overhead, rate)
    found = fit_line(flops, [line.seconds(f) for f in flops])
    assert [found.seconds(f) for f in flops] == pytest.approx([line.seconds(f) for f in flops], rel=1e-5)


def test_no_forward_takes_less_than_nothing():
    assert fit_line([1.0, 2.0], [1.0, 4.0]).overhead_seconds == 0
    assert fit_line([3.0], [6.0]) == Line(0.0, 0.5)


CALIBRATION = Calibration("CPU", "tiny", "projector", "bfloat16", 2, 1000, 0.25, {"off": Line(0.1, 2e9), "on": Line(0.2, 1e9)})


def test_a_calibration_comes_back_from_its_file(tmp_path):
    write_calibration(CALIBRATION, tmp_path / "cpu.json")
    assert read_calibration(tmp_path / "cpu.json") == CALIBRATION


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1}', "[]"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(CalibrationError, match="cpu.json"):
        read_calibration(tmp_path / "cpu.json")


# ----------------------------------------------------------------------------------------------------------------- choices


@given(st.integers(0, 2**18))
def test_the_largest_forward_is_found(limit):
    found = largest_that_fits(lambda tokens: tokens <= limit, 2**16)
    assert found == min(limit // 256 * 256, 2**16)


def test_published_encoders():
    """ESM-2 3B and ESM-IF1: 2560 and 512 columns, 6.2 GB in 16 bits, 7 GFLOP a residue; 6,144 bytes a residue of rows."""
    shape = encoder_shape(from_dict(RunConfig, read_recipe("paper-align")).encoders)
    assert shape.widths == (512, 2560)
    assert shape.number == 2
    assert shape.bytes == pytest.approx(6.2e9 + 0.2e9, rel=0.01)
    assert shape.rows_bytes(1) == 6144
    assert shape.flops_per_residue == pytest.approx(7.0e9, rel=0.01)
    assert encoder_shape(EncodersConfig(esm2="none", esm_if1="esm_if1_gvp4_t16_142M_UR50")).widths == (512, 0)


def test_other_choices_change_one_thing_each():
    config = from_dict(RunConfig, read_recipe("fast-align"))
    zero2 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    labels = [choice.label for choice in alternatives(Choice("", config, zero2, cached=False))]
    assert labels == [
        "ZeRO 1", "ZeRO 3", "ZeRO 2, optimizer on the host", "ZeRO 3, optimizer and weights on the host", "cached embeddings",
        "activation checkpointing on", "train: lora", "train: full",
    ]  # fmt: skip


def test_a_table_is_markdown():
    assert table([("a", "bcd"), (1, 2)]) == "| a | bcd |\n|---|-----|\n| 1 | 2   |"


# ------------------------------------------------------------------------------------------------------------- the command

LITTLE = ["--recipe", "fast-instruct", "--llm", "tiny", "--proteins", "2000", "--instruct.tokens_per_pack", "1024",
          "--data.max_residues", "400", "--ds_config"]  # fmt: skip


@pytest.fixture
def zero2(pytestconfig):
    return str(pytestconfig.rootpath / "ds_configs" / "zero2.json")


@pytest.mark.nightly
def test_what_fits_and_what_does_not(zero2, capsys):
    """The exit code says which; too little memory comes with what to change."""
    arguments = [*LITTLE, zero2, "--encoders.esm2", "esm2_t6_8M_UR50D"]
    assert command.main([*arguments, "--cluster", "1xH100-80,1xA100-40", "--json"]) == 0
    (fits,) = json.loads(capsys.readouterr().out)
    assert fits["fits"] and fits["advice"] == []
    assert [kind["kind"]["name"] for kind in fits["kinds"]] == ["H100", "A100"]
    assert all(other["gib"] > 0 and other["hours"] > 0 for other in fits["others"])
    assert command.main([*arguments, "--cluster", "1xA100-40,1xA100-1.35"]) == 1
    said = capsys.readouterr().out
    assert "| 1 x A100-1.35" in said and " NO " in said and "GiB too much" in said
    assert "What fits with one change" in said
    assert "assumed: 51% (LLM-Foundry, 7B)" in said


@pytest.mark.nightly
def test_a_calibration_takes_the_place_of_what_is_assumed(zero2, tmp_path, capsys):
    """Half the measured rate, twice the hours, where nothing else takes time."""
    hours = []
    for rate in (2e9, 1e9):
        line = Line(0.0, rate)
        write_calibration(replace(CALIBRATION, update_seconds=0.0, lines={"off": line, "on": line}), tmp_path / "cpu.json")
        arguments = [*LITTLE, zero2, "--cluster", "1xCPU-16", "--calibration", str(tmp_path / "cpu.json"), "--embeddings", "--json"]
        assert command.main(arguments) == 0
        (found,) = json.loads(capsys.readouterr().out)
        hours.append(found["hours"])
        assert "measured" in found["kinds"][0]["rate"]["source"]
    assert hours[1] == pytest.approx(2 * hours[0])


def test_lengths_come_from_shards(demo_assets, zero2, capsys):
    llm = next(str(path.parent) for path in demo_assets.rglob("config.json"))
    arguments = ["--recipe", "demo", "--llm", llm, "--data", str(demo_assets), "--cluster", "2xA100-40", "--ds_config", zero2]
    assert command.main([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert "16 training proteins, texts by the LLM's tokenizer" in found["data"]
    assert [stage["name"] for stage in found["stages"]] == ["align", "instruct"]
    assert found["stages"][0]["num_steps"] == 4  # 16 descriptions a step, 4 epochs


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--cluster", "two"], "COUNTxNAME-GIB"),
        ([], "--cluster"),
        (["--cluster", "1xCPU-16"], "--calibrate"),
        (["--cluster", "1xA100-40", "--llm", "nowhere"], "vicuna-7b"),
        (["--cluster", "1xA100-40", "--instruct.epoch", "3"], "instruct.epochs"),
        (["--cluster", "1xA100-40", "--calibration", "nowhere.json"], "nowhere.json"),
        (["--cluster", "1xA100-40", "--proteins", "0"], "--proteins"),
    ],
)
def test_the_users_errors_are_one_sentence(zero2, capsys, arguments, said):
    assert command.main([*LITTLE, zero2, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_every_named_shape_is_known():
    assert all(llm_config(name).vocab_size for name in NAMED)
