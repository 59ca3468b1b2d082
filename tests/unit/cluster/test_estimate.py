"""Arithmetic of the estimate, counted by hand; and the command, on shapes that take no time."""

import json
import re
from dataclasses import astuple, replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.cluster import command
from proteingpt.cluster.calibrate import (
    Calibration,
    CalibrationError,
    Line,
    fit_line,
    read_calibration,
    write_calibration,
)
from proteingpt.cluster.encoders import encoder_shape
from proteingpt.cluster.estimate import GIB, Choice, Estimator, Outcome, alternatives, largest_that_fits
from proteingpt.cluster.shapes import (
    NAMED,
    Flops,
    ShapeError,
    Pairs,
    attention_flops,
    llm_config,
    pack_pairs,
    step_flops,
)
from proteingpt.cluster.spec import ClusterError, parse_cluster
from proteingpt.cluster.tables import table
from proteingpt.cluster.times import Rate, Traffic, step_seconds, traffic
from proteingpt.cluster.work import DataSet, make_pack, scaled_lengths, stage_work
from proteingpt.config import EncodersConfig, RunConfig, StageConfig, from_dict, parse_command, read_recipe
from proteingpt.model.flops import matrix_flops
from proteingpt.protein import PrefixLength

# ---------------------------------------------------------------------------------------------------------- the cluster


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
    device = {"count": 4, "name": "MI300X", "gib": 192, "tflops": 1307, "mfu": 0.3}
    path.write_text(yaml.safe_dump({"link_gbps": 300, "devices": [device]}))
    cluster = parse_cluster(str(path))
    assert cluster.link_gbps == 300
    assert cluster.kinds[0].flops == pytest.approx(0.3 * 1307e12)
    assert "given" in cluster.kinds[0].source


@pytest.mark.parametrize("text", ["", "2H100", "H100", "0xH100-80", "2xH100-0"])
def test_a_cluster_that_is_none_is_refused(text):
    with pytest.raises(ClusterError):
        parse_cluster(text)


NO_CLUSTERS = ["[]", "{", "link_gbps: 3", "devices: []", "devices: [{name: H100}]"]
NO_CLUSTERS += ["devices: [{name: H100, gib: 80, color: red}]"]


@pytest.mark.parametrize("text", NO_CLUSTERS)
def test_a_file_that_is_no_cluster_is_refused(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match="cluster.yaml"):
        parse_cluster(str(path))


# ------------------------------------------------------------------------------------------------------- FLOPs and work


def test_sizes_of_named_shapes_are_the_published_ones():
    """Llama 2's, Llama 3's and Mistral's parameters, less norms and input embeddings."""
    published = {
        "vicuna-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
        "mistral-7b": 7_241_732_096,
    }  # fmt: skip
    for name, parameters in published.items():
        config = llm_config(name)
        norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
        embeddings = config.vocab_size * config.hidden_size
        assert matrix_flops(config, 1, 1, passes=1, head_passes=1) == parameters - norms - embeddings


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
    assert sum(pack_pairs(pack)) == counted
    starts = zip(pack.group_starts, pack.group_starts[1:])
    prefixes = [(pack.branch_ids[begin:end] == 0).sum().item() for begin, end in starts]
    assert pack_pairs(pack).prefix == sum(n * (n + 1) // 2 for n in prefixes)
    assert attention_flops(llm_config("tiny"), counted) == 12 * counted * 64 * 2


def test_passes_over_the_weights():
    """Frozen 2 + 2, trained 2 + 2 + 2, and 2 more for what is computed again; the head of few answers is not."""
    config = llm_config("tiny")
    counted = {
        (train, checkpointing): step_flops(config, 1000, 0, Pairs(0, 0), train, checkpointing)
        for train in ("projector", "full") for checkpointing in (False, True)
    }  # fmt: skip
    assert all(flops[1:] == (0, 0) for flops in counted.values())
    unit = counted["projector", False].matrix / 4
    passes = {key: flops.matrix / unit for key, flops in counted.items()}
    assert passes == {("projector", False): 4, ("projector", True): 6, ("full", False): 6, ("full", True): 8}


def stage(**changes) -> StageConfig:
    plain = dict(
        template="paper", epochs=3, samples_per_step=4, questions_per_group=1, max_answer_tokens=100, warmup_steps=0,
        warmup_lr=0.0, init_lr=1e-4, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    return StageConfig(**{**plain, **changes})


def alike(number: int, stands_for: float, residues=100, questions=8) -> DataSet:
    return DataSet(np.full(number, residues), stands_for, [[(24, 4)] * questions] * number, [250] * number, "by hand")


def test_steps_and_tokens_of_a_stage():
    """1,000 proteins of 8 questions, 4 a step, 3 epochs: 6,000 steps. A question alone: 6 before it, 2 x 102 rows, 24 +
    4
    - 1."""
    work = stage_work(alike(50, 1000), "instruct", stage(), 0, PrefixLength(), 4096)
    assert (work.num_steps, work.steps_per_epoch) == (6000, 2000)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 204 + 27}
    assert work.mean("answers") == 16
    assert work.asked == (1, 24, 4)


def test_questions_that_share_a_prefix():
    grouped = stage(samples_per_step=8, questions_per_group=8)
    work = stage_work(alike(50, 1000), "instruct", grouped, 0, PrefixLength(), 4096)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 204 + 8 * 27}
    assert work.largest.num_tokens == 426


def test_descriptions_are_cut_and_long_proteins_left_out():
    data = replace(alike(50, 1000), residues=np.array([100] * 25 + [3000] * 25))
    work = stage_work(data, "align", stage(), 0, PrefixLength(), 4096)
    assert work.steps_per_epoch == 125  # 500 of them, 4 a step
    assert {pack.answers for packs in work.steps for pack in packs} == {100}


def test_the_longest_protein_of_all_must_fit_though_no_step_that_was_looked_at_has_it():
    """By hand: 6 before it, 2 x 902 rows, and a question of 24 + 4 - 1 tokens; with three in a group, or cropped."""
    data = replace(alike(50, 1000), every_length=np.array([100, 900, 3000]))
    cases = ((1, None, 900, False), (3, None, 900, False), (1, 500, 100, False), (1, 500, 500, True))
    for asked, most, length, crop in cases:
        work = stage_work(data, "instruct", stage(questions_per_group=asked), 0, PrefixLength(), 4096, most, crop)
        assert work.largest.num_tokens == 6 + 2 * (length + 2) + asked * 27
        assert {pack.residues for packs in work.steps for pack in packs} == {100}


def test_one_encoder_has_half_the_rows():
    work = stage_work(alike(50, 1000), "instruct", stage(), 0, PrefixLength(1), 4096)
    assert {pack.tokens for packs in work.steps for pack in packs} == {6 + 102 + 27}


@given(st.floats(50, 600), st.integers(200, 2000))
def test_lengths_have_the_mean_that_was_asked_for(mean, number):
    assert scaled_lengths(number, mean, 0).mean() == pytest.approx(mean, rel=0.01)


# ----------------------------------------------------------------------------------------------------------------- time

FREE = Traffic(0.0, 0.0, 1.0)


def test_a_step_takes_as_long_as_its_slowest_rank():
    """Three packs on ranks of 200 and 100 FLOP/s: two go to the fast one."""
    rates = [Rate(200.0, 0.0, 0.0, ""), Rate(100.0, 0.0, 0.0, "")]
    assert step_seconds([10] * 3, [Flops(1000.0)] * 3, [0.0] * 3, rates, [2.0, 1.0], [None] * 2, FREE, 0.0) == 10.0
    assert step_seconds([10] * 3, [Flops(1000.0)] * 3, [0.0] * 3, rates, [1.0, 1.0], [None] * 2, FREE, 0.0) == 10.0
    assert step_seconds([10] * 4, [Flops(1000.0)] * 4, [0.0] * 4, rates, [1.0, 1.0], [None] * 2, FREE, 0.0) == 20.0


def test_what_else_a_step_takes():
    """Overhead of each forward, encoders, exchange of gradients, and the update of 50 parameters."""
    rates = [Rate(100.0, 1.0, 0.1, "")]
    packs, moved = ([10] * 2, [Flops(100.0)] * 2, [50.0] * 2), Traffic(0.0, 30.0, 10.0)
    assert step_seconds(*packs, rates, [1.0], [None], moved, 50) == 2 * (1 + 1 + 0.5) + 3 + 5
    fused = step_seconds(*packs, rates, [1.0], [20], moved, 50)
    assert fused == 1 + 2 + 1 + 3 + 5


def test_fetching_weights_hides_behind_the_computation_or_the_reverse():
    rates = [Rate(100.0, 0.0, 0.0, "")]
    for fetched, seconds in ((50.0, 10.0), (200.0, 20.0)):
        moved = Traffic(fetched, 0.0, 10.0)
        assert step_seconds([10], [Flops(1000.0)], [0.0], rates, [1.0], [None], moved, 0.0) == seconds


def test_under_zero_3_a_rank_without_packs_runs_the_shortest():
    rates = [Rate(100.0, 0.0, 0.0, "")] * 2
    packs = ([10, 20], [Flops(100.0), Flops(200.0)], [0.0] * 2)
    both = step_seconds(*packs, rates, [1.0, 1e-6], [None] * 2, FREE, 0.0, equal_counts=True)
    assert both == 3.0


def test_bytes_that_go_over_the_link():
    """Four ranks: an all-reduce moves 1.5 of a buffer, a gather 0.75. 16-bit weights, 1,000 frozen and 100 trained."""
    assert traffic(0, 2, 1000, 100, 4, 1.0).of_step == 1.5 * 200
    assert traffic(2, 2, 1000, 100, 4, 1.0).of_step == (1.5 + 0.75) * 200
    assert traffic(2, 2, 1000, 100, 4, 1.0, offloads=True).of_step == (1.5 + 0.75) * 200 + 2 * 50
    sharded = traffic(3, 2, 1000, 100, 4, 1.0)
    assert (sharded.of_step, sharded.of_forward) == (0, 0.75 * (2 * 2200 + 200))
    assert traffic(2, 2, 1000, 100, 1, 20.0) == Traffic(0.0, 0.0, 20e9)


# ---------------------------------------------------------------------------------------------------------- calibration


EACH = st.floats(1e-14, 1e-9)
SHARE = st.floats(0.01, 2)


SIZES = st.lists(st.tuples(st.floats(1e9, 1e12), SHARE, SHARE), min_size=4, max_size=8)


@given(st.tuples(st.floats(1e-4, 1.0), EACH, EACH, EACH), SIZES)
def test_a_line_is_found_again(parts, sizes):
    """What it says of the forwards that it was made of."""
    line, work = Line(*parts), [Flops(matrix, a * matrix, b * matrix) for matrix, a, b in sizes]
    found = fit_line(work, [line.seconds(one) for one in work])
    assert [found.seconds(one) for one in work] == pytest.approx([line.seconds(one) for one in work], rel=1e-3)


def test_attention_has_rates_of_its_own():
    """By hand: 1 s, 2 s for each of matrix products, 3 s for each on a prefix and 5 s for each from a branch."""
    work = [
        Flops(1.0, 0.0, 0.0),
        Flops(2.0, 1.0, 0.0),
        Flops(4.0, 1.0, 1.0),
        Flops(4.0, 4.0, 1.0),
        Flops(5.0, 0.0, 2.0),
    ]
    seconds = [3.0, 8.0, 17.0, 26.0, 21.0]
    assert astuple(fit_line(work, seconds)) == pytest.approx((1.0, 2.0, 3.0, 5.0))
    rate = Rate(1 / 2.0, 1.0, 0.0, "", prefix_cost=3.0 / 2.0, branch_cost=5.0 / 2.0)
    assert [rate.seconds(one) for one in work] == seconds


def test_no_forward_takes_less_than_nothing():
    assert fit_line([Flops(1.0), Flops(2.0)], [1.0, 4.0]).overhead_seconds == 0
    assert fit_line([Flops(3.0)], [6.0]).seconds(Flops(6.0)) == pytest.approx(12.0)
    falling = [Flops(1.0, 1.0), Flops(1.0, 2.0), Flops(2.0, 2.0)]
    assert fit_line(falling, [2.0, 1.9, 4.0]).seconds_per_prefix_flop == 0


LINES = {"off": Line(0.1, 5e-10, 1e-9, 2e-9), "on": Line(0.2, 1e-9, 0.0, 1e-9)}
CALIBRATION = Calibration("CPU", "tiny", "projector", "bfloat16", 2, 1000, 0.25, LINES)


def test_a_calibration_comes_back_from_its_file(tmp_path):
    write_calibration(CALIBRATION, tmp_path / "cpu.json")
    assert read_calibration(tmp_path / "cpu.json") == CALIBRATION


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', '{"format": 1, "lines": {}}', "[]"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(CalibrationError, match="cpu.json"):
        read_calibration(tmp_path / "cpu.json")


# -------------------------------------------------------------------------------------------------------------- choices


@given(st.integers(0, 2**18), st.floats(0.5, 3.0))
def test_the_largest_forward_is_found(limit, power):
    """Whether memory grows as a line or not."""
    found = largest_that_fits(lambda tokens: tokens**power, limit**power, 2**16)
    assert found == min(limit // 256 * 256, 2**16)


def test_a_line_takes_few_trials():
    tried = []
    assert largest_that_fits(lambda tokens: tried.append(tokens) or 1e9 + 3e6 * tokens, 18e9, 2**16) == 5632
    assert len(tried) <= 5


@given(st.integers(1, 4000), st.integers(1, 40), st.integers(1, 400))
def test_a_pack_for_an_estimate_has_a_protein_and_nearly_as_many_tokens_as_were_asked_for(tokens, turns, answer):
    turn, pack = 24 + answer - 1, make_pack(tokens, 100, turns=turns, answer=answer)
    assert len(pack.proteins) >= 1
    assert pack.num_tokens <= max(tokens, 6 + 6 + turn)
    assert turns == 1 or pack.num_tokens >= tokens - 4 * turn - 12


def test_published_encoders():
    """ESM-2 3B and ESM-IF1: 2560 and 512 columns, 2,839 and 108 million parameters in 16 bits, 5.7 and 1.0 GFLOP and
    6,144 bytes of rows a residue."""
    shape = encoder_shape(from_dict(RunConfig, read_recipe("paper-align")).encoders)
    assert shape.widths == (512, 2560)
    assert shape.number == 2
    assert shape.bytes == pytest.approx(5.678e9 + 0.216e9 + 0.2e9, rel=0.001)
    assert shape.rows_bytes(1) == 6144
    assert shape.flops_per_residue == pytest.approx(6.7e9, rel=0.001)
    assert encoder_shape(EncodersConfig(esm2="none", esm_if1="esm_if1_gvp4_t16_142M_UR50")).widths == (512, 0)


def test_other_choices_change_one_thing_each():
    config = from_dict(RunConfig, read_recipe("fast-align"))
    zero2 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    labels = [choice.label for choice in alternatives(Choice("", config, zero2, cached=False))]
    assert labels == [
        "ZeRO 1", "ZeRO 3", "ZeRO 2, optimizer on the host", "ZeRO 3, optimizer and weights on the host",
        "cached embeddings", "activation checkpointing on", "train: lora", "train: full",
    ]  # fmt: skip


def test_a_table_is_markdown():
    assert table([("a", "bcd"), (1, 2)]) == "| a | bcd |\n|---|-----|\n| 1 | 2   |"


# ---------------------------------------------------------------------------------------------------------- the command

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


PAPERS_GPUS = "2xH100-PCIe-80,2xA100-40"
FROZEN = ("fast-align", "fast-instruct", "paper-align")
FITTING = [
    *((recipe, "zero2", llm) for recipe in FROZEN for llm in ("vicuna-7b", "llama-3-8b")),
    ("paper-instruct", "zero2_offload", "vicuna-7b"),  # it trains the LLM
]


def on_the_papers_gpus(pytestconfig, recipe: str, ds_config: str, llm: str, *more: str) -> Outcome:
    path = str(pytestconfig.rootpath / "ds_configs" / f"{ds_config}.json")
    arguments = ["--recipe", recipe, "--cluster", PAPERS_GPUS, "--ds_config", path, *more]
    options, rest = command.make_parser().parse_known_args(arguments)
    asked = parse_command(["--ds_config", path, "--recipe", recipe, *rest])
    estimator = Estimator(parse_cluster(PAPERS_GPUS), llm_config(llm), command.data_set(options, [asked], llm), [])
    return estimator.outcome(Choice(recipe, asked.config, asked.ds_config, cached=False))


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["paper-align", "paper-instruct", "fast-align", "fast-instruct"])
def test_the_readmes_table_is_what_the_estimate_says(pytestconfig, recipe):
    row = rf"\| `{recipe}`[^|]* \| ([\d.]+) \| ([\d.]+) \|"
    gib, hours = re.search(row, (pytestconfig.rootpath / "README.md").read_text()).groups()
    frozen = ("--model.train", "projector", "--model.activation_checkpointing", "false")
    outcome = on_the_papers_gpus(pytestconfig, recipe, "zero2", "vicuna-7b", *frozen)
    a100 = outcome.kinds[1]
    assert a100.kind.name == "A100" and f"{a100.memory.total / GIB:.1f}" == gib
    assert outcome.hours == pytest.approx(float(hours), abs=0.5)


@pytest.mark.nightly
@pytest.mark.parametrize("recipe, ds_config, llm", FITTING)
def test_the_recipes_fit_the_papers_gpus(pytestconfig, recipe, ds_config, llm):
    outcome = on_the_papers_gpus(pytestconfig, recipe, ds_config, llm)
    assert outcome.fits, [(found.kind.label, found.memory) for found in outcome.kinds]


def test_the_papers_own_case_by_hand(pytestconfig):
    """Vicuna's 6,738,415,616 and the projector's 12,591,104 parameters in 16 bits; of the latter two moments and fp32
    weights, over four ranks; what a frozen layer keeps (test_memory.py) of the longest protein and its description, and
    little more.

    10 epochs of 105,674 proteins, four a step. A step waits for an A100: 25 TFLOP for a mean protein, 4 FLOPs for each
    of 6.5 billion parameters and 863 tokens and 7 billion a residue in the encoders, at 159 TFLOP/s: 12 hours at most.
    """
    outcome = on_the_papers_gpus(pytestconfig, "paper-align", "zero2", "vicuna-7b")
    found = outcome.kinds[1].memory
    assert found.moment == "forward and backward"
    assert found.weights == 2 * (6_738_415_616 + 12_591_104)
    assert found.optimizer == 12 * 12_591_104 / 4
    longest = scaled_lengths(2048, 300, 0).max()
    tokens = 6 + 2 * (longest + 2) + 4 + 250 - 1
    kept = tokens * 32 * (2 * (6 * 4096 + 3 * 11008) + 4 * (32 + 2))
    assert 1.0 < found.activations / kept < 1.1
    assert outcome.stages[0].num_steps == pytest.approx(10 * 105_674 / 4, rel=0.001)
    assert 8 < outcome.hours < 12


@pytest.mark.nightly
def test_a_calibration_takes_the_place_of_what_is_assumed(zero2, tmp_path, capsys):
    """Half the measured rate, twice the hours, where nothing else takes time."""
    hours = []
    for rate in (2e9, 1e9):
        line = Line(0.0, 1 / rate, 1 / rate, 2 / rate)
        path = tmp_path / "cpu.json"
        write_calibration(replace(CALIBRATION, update_seconds=0.0, lines={"off": line, "on": line}), path)
        arguments = [*LITTLE, zero2, "--cluster", "1xCPU-16", "--calibration", str(path), "--embeddings", "--json"]
        assert command.main(arguments) == 0
        (found,) = json.loads(capsys.readouterr().out)
        hours.append(found["hours"])
        assert "measured" in found["kinds"][0]["rate"]["source"]
    assert hours[1] == pytest.approx(2 * hours[0])


def test_lengths_come_from_shards(demo_assets, zero2, capsys):
    llm = next(str(path.parent) for path in demo_assets.rglob("config.json"))
    arguments = ["--recipe", "demo", "--llm", llm, "--data", str(demo_assets), "--cluster", "2xA100-40"]
    arguments += ["--ds_config", zero2]
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
