"""The user's command as it stands in the README, in a subprocess, and what it leaves behind."""

import json
import re
import shlex

import pytest
from commands import execute, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_pages import custom_scalars_page, hparams_page

from proteingpt.training.curves import CURVES

COMMAND = "deepspeed launch/train.py --ds_config ds_configs/zero2.json"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the literal command: (folder, finished process, report)."""
    folder = workplace(tmp_path_factory.mktemp("demo"))
    process = execute(COMMAND, folder, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process, json.loads((folder / "runs/demo/report.json").read_text())


def test_the_demo_learns_what_a_blind_model_cannot_know(demo):
    _, _, report = demo
    assert report["accuracy"] >= report["blind_accuracy"] + 0.15


def test_it_says_first_that_it_is_the_demo_and_names_the_real_recipes(demo):
    _, process, _ = demo
    said = next(line for line in process.stderr.splitlines() if "[WARNING]" not in line)
    assert "This is the demo" in said and "paper-align" in said and "released-instruct" in said


def test_the_report_is_printed_and_agrees_with_report_json(demo):
    folder, process, report = demo
    assert f"{report['accuracy']:.1%} of {report['num_questions']} held-out questions" in process.stdout
    assert f"{report['blind_accuracy']:.1%}" in process.stdout
    assert report["steps"] == sum(report["steps_by_stage"].values()) and set(report["steps_by_stage"]) == {
        "align",
        "instruct",
    }
    predictions = [json.loads(line) for line in (folder / "runs/demo/predictions.jsonl").read_text().splitlines()]
    right = sum(p["prediction"].strip().lower() == p["answer"].strip().lower() for p in predictions)
    assert right / report["num_questions"] == pytest.approx(report["accuracy"])


def test_progress_shows_step_loss_rate_and_time_left(demo):
    _, process, _ = demo
    assert re.search(
        r"instruct \d+/\d+  loss \d+\.\d+  lr \S+  [\d,]+ tokens/s  .* left", process.stderr + process.stdout
    )


def test_the_printed_command_asks_the_model(demo):
    folder, process, report = demo
    printed = re.search(r"ask it +(python launch/chat.py .*)", process.stdout)[1]
    assert shlex.split(printed)[-1] == report["example_question"]
    asked = execute(printed, folder)
    assert asked.returncode == 0, asked.stderr
    predictions = [json.loads(line) for line in (folder / "runs/demo/predictions.jsonl").read_text().splitlines()]
    answers = {p["answer"] for p in predictions if p["question"] == report["example_question"]}
    assert asked.stdout.strip() in answers


def test_tensorboard_holds_every_promised_curve_and_some_texts(demo):
    folder, _, report = demo
    for stage in ("align", "instruct"):
        events = EventAccumulator(str(folder / "runs/demo/tensorboard" / stage))
        events.Reload()
        tags = events.Tags()
        # A CPU has no data sheet, and so no MFU; align asks no questions.
        absent = {tag for tag in CURVES if "mfu" in tag}
        absent |= {f"learning/held_out_{score}" for score in ("accuracy", "blind_accuracy", "lift") if stage == "align"}
        found = {tag.removesuffix("/rank_0") for tag in tags["scalars"]}
        assert found == CURVES.keys() - absent
        assert any(tag.startswith("answer_") for tag in tags["tensors"])
        assert [e.step for e in events.Scalars("learning/loss")] == list(range(1, report["steps_by_stage"][stage] + 1))


def test_its_pages_answer_the_three_questions_and_hold_settings_beside_scores(demo):
    folder, _, report = demo
    page = custom_scalars_page(folder / "runs/demo/tensorboard")
    assert list(page) == ["Is it learning?", "Is it fast?", "Is it healthy?"]
    settings, metrics, status = hparams_page(folder / "runs/demo/tensorboard")["instruct"]
    assert (settings["recipe"], settings["init_lr"], settings["zero_stage"]) == ("demo", pytest.approx(0.002), 2)
    assert metrics["learning/held_out_accuracy"] == pytest.approx(report["accuracy"])
    assert metrics["learning/held_out_lift"] == pytest.approx(report["accuracy"] - report["blind_accuracy"])
    assert status == "STATUS_SUCCESS"


def test_its_status_says_that_it_is_finished_and_what_it_came_to(demo):
    folder, _, report = demo
    shown = execute("python launch/status.py runs/demo", folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"runs/demo: finished, {report['steps']:,} steps in ")
    blind, lift = report["blind_accuracy"], report["accuracy"] - report["blind_accuracy"]
    assert f"accuracy {report['accuracy']:.1%}, blind {blind:.1%}, lift {100 * lift:+.1f} points" in shown.stdout


def test_a_finished_run_only_shows_its_report_again(demo):
    folder, first, report = demo
    again = execute(COMMAND, folder)
    assert again.returncode == 0
    assert f"{report['accuracy']:.1%} of {report['num_questions']}" in again.stdout
    assert "tokens/s" not in again.stderr + again.stdout
    assert json.loads((folder / "runs/demo/report.json").read_text()) == report


def test_another_recipe_in_the_same_place_is_refused_by_naming_the_difference(demo):
    folder, _, _ = demo
    process = execute(f"{COMMAND} --instruct.init_lr 0.5", folder)
    assert process.returncode != 0
    assert "instruct.init_lr: was 0.002, is 0.5" in process.stderr


SHORT = "--demo.num_proteins 20 --align.max_steps 3 --instruct.max_steps 3 --evaluation.num_proteins 4"


OFFLOAD = [pytest.param(name, marks=pytest.mark.nightly) for name in ("zero2_offload", "zero3_offload")]


@pytest.mark.parametrize("config", ["zero1", "zero3", *OFFLOAD])
def test_every_ready_configuration_runs_the_demo(config, tmp_path):
    folder = workplace(tmp_path)
    launcher = "torchrun --nproc-per-node 2 --standalone" if config == "zero3" else "deepspeed"
    process = execute(f"{launcher} launch/train.py --ds_config ds_configs/{config}.json {SHORT}", folder)
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((folder / "runs/demo/report.json").read_text())
    assert report["steps_by_stage"] == {"align": 3, "instruct": 3}
    assert report["num_questions"] == 4 * 8


def test_help_explains_itself(tmp_path):
    process = execute("python launch/train.py --help", workplace(tmp_path))
    assert process.returncode == 0
    assert (
        "--instruct.samples_per_step" in process.stdout
        and "question/answer pairs in an optimizer step" in process.stdout
    )
