"""A run that was made of something else is not continued in silence: the difference is named, or permitted on
purpose."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.forked_ranks import ForkedRank
from commands import environment
from safetensors.torch import load_file, save_file
from shard_server import serving

from proteingpt.demo.llm import write_tiny_llm
from proteingpt.data.shards import ShardSet
from proteingpt.training.checkpoint import checkpoints, newest_valid, read_progress, sha256

ZERO2 = str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")
SETTINGS = [
    "--ds_config", ZERO2, "--evaluation.num_proteins", "2", "--align.max_steps", "2", "--instruct.max_steps", "4",
    "--instruct.samples_per_step", "16", "--checkpoint.every_steps", "2", "--output", "run",
]  # fmt: skip


def execute(argv: list[str], folder: Path, env: dict | None = None) -> tuple[int, str]:
    """(exit code, what it wrote) of one rank, in a process of its own: DeepSpeed starts once in a process."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    code = ForkedRank(argv, {**place, **(env or {})}, folder, log).wait(120)
    return code, log.read_text()


@pytest.fixture(scope="module")
def begun(tmp_path_factory, demo_assets):
    """(folder, its run that has ended before its report, the arguments)."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(demo_assets, folder / "assets")
    where = ["--demo.directory", "assets", "--demo.num_proteins", "20", "--data", "assets", "--llm", "assets/llm"]
    where += ["--encoders.esm2", "assets/esm2_demo.pt", "--encoders.esm_if1", "assets/esm_if1_demo.pt"]
    code, said = execute([*SETTINGS, *where], folder)
    assert code == 0, said
    (folder / "run/report.json").unlink()
    for path in checkpoints(folder / "run/instruct")[:1]:
        shutil.rmtree(path)  # so that there is something left to train
    return folder, [*SETTINGS, *where]


@pytest.fixture
def again(begun, tmp_path):
    """again(*more): the same command in a copy of the run; (exit code, stderr)."""
    folder, argv = begun
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return lambda *more, env=None: execute([*argv, *more], tmp_path, env)


def test_another_encoder_is_named_and_permitted_on_purpose(again, tmp_path):
    """The same file name, other bytes."""
    with open(tmp_path / "assets/esm2_demo.pt", "ab") as file:
        file.write(b"\0")
    code, said = again()
    assert code == 1 and "esm2 has changed (was " in said and "--allow-changed" in said and said.count("error:") == 1
    code, said = again("--allow-changed", "esm2")
    assert code == 0, said
    assert "goes on from" in said
    first, second = (read_progress(path).identity["esm2"] for path in reversed(checkpoints(tmp_path / "run/instruct")))
    assert first != second, "what was permitted is not noted"


def test_other_data_and_another_tokenizer_are_named(again, tmp_path, demo_assets):
    shards = ShardSet(demo_assets, "train")
    texts = sorted(turn.question for i in range(len(shards)) for turn in shards.read_text(i)[1])
    shutil.rmtree(tmp_path / "assets/llm")
    write_tiny_llm(tmp_path / "assets/llm", texts, seed=3, width=32, vocab_size=290)
    code, said = again()
    assert code == 1 and "tokenizer has changed" in said and "llm has changed" in said and "data has" not in said


def test_another_recipe_is_named_and_permitted_on_purpose(again, tmp_path):
    code, said = again("--instruct.init_lr", "0.001")
    assert code == 1 and "instruct.init_lr: was 0.002, is 0.001" in said
    assert again("--instruct.init_lr", "0.001", "--allow-changed", "instruct.init_lr")[0] == 0
    assert "instruct.init_lr: was 0.002, is 0.001" in (tmp_path / "run/changes.txt").read_text()
    assert "init_lr: 0.001" in (tmp_path / "run/recipe.yaml").read_text()


def test_what_is_kept_may_change_without_asking_and_the_best_is_kept_and_exported(again, tmp_path):
    more = ("--checkpoint.keep_last", "1", "--checkpoint.keep_best", "loss", "--evaluation.every_steps", "1")
    code, said = again(*more, "--allow-changed", "evaluation.every_steps")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "run/instruct/evaluations.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["held_out_loss"] for line in lines}
    best = json.loads((tmp_path / "run/report.json").read_text())["best"]
    assert losses[best["step"]] == best["loss"] == min(losses.values())
    kept = {4, best["step"]}
    assert {path.name for path in (tmp_path / "run/instruct").glob("step-*")} == {f"step-{step:08d}" for step in kept}
    assert (Path(tmp_path) / best["model"] / "projector.safetensors").is_file()


def test_a_finished_stage_whose_last_evaluation_was_cut_off_makes_it_again(again, tmp_path):
    """As a kill leaves it between the stage's last save and its evaluation: a finished stage, and no line of it."""
    notes = tmp_path / "run/align/evaluations.jsonl"
    before = notes.read_text()
    notes.unlink()
    code, said = again()
    assert code == 0, said
    assert notes.read_text() == before and json.loads(before)["step"] == 2


def test_a_best_checkpoint_that_broke_does_not_keep_a_finished_run_from_its_end(again, tmp_path):
    directory = tmp_path / "run/instruct"
    best = directory / "step-00000001"
    shutil.copytree(checkpoints(directory)[0], best)
    (best / "weights.safetensors").write_bytes(b"torn")
    (directory / "best.json").write_text(json.dumps({"checkpoint": best.name, "metric": "loss", "value": -1.0}))
    code, said = again("--checkpoint.keep_best", "loss")
    assert code == 0 and "the best checkpoint is not exported: checkpoint" in said, said
    assert json.loads((tmp_path / "run/report.json").read_text())["best"] is None


def test_a_start_that_is_refused_takes_its_wish_to_be_started_again_back(again, tmp_path):
    """Or a batch script that asks for RUN/requeue would requeue it for ever."""
    (tmp_path / "run/requeue").write_text("SIGUSR1\n")
    code, said = again("--seed", "12")
    assert code == 1 and "seed" in said
    assert not (tmp_path / "run/requeue").exists()


def test_a_name_that_is_none_is_refused(again):
    code, said = again("--allow-changed", "lr")
    assert code == 1 and "--allow-changed is 'lr'" in said and "tokenizer" in said


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("deep", "huge", "not a number", "directory")]


@pytest.mark.parametrize("edit", ["speeds", *NIGHTLY])
def test_a_hostile_checkpoint_is_passed_over_by_name(again, tmp_path, edit):
    """What somebody else wrote: valid or not, it is only read. The older, sound one is taken."""
    sound = checkpoints(tmp_path / "run/instruct")[0]
    hostile = tmp_path / "run/instruct/step-00000003"
    shutil.copytree(sound, hostile)
    description = json.loads((sound / "checkpoint.json").read_text())
    texts = {
        "speeds": json.dumps({**description, "speeds": [[0, ["__import__('os')"]]]}),
        "deep": "[" * 200_000,
        "huge": json.dumps(description) + " " * 2**25,
        "not a number": json.dumps({**description, "steps_done": float("nan")}),
        "directory": None,
    }
    (hostile / "checkpoint.json").unlink()
    if texts[edit] is None:
        (hostile / "checkpoint.json").mkdir()
    else:
        (hostile / "checkpoint.json").write_text(texts[edit])
    code, said = again()
    assert code == 0 and "step-00000003 is broken: checkpoint.json" in said
    assert newest_valid(tmp_path / "run/instruct").name == "step-00000004"


def test_a_checkpoint_of_another_shape_is_refused_before_it_is_loaded(again, tmp_path):
    path = checkpoints(tmp_path / "run/instruct")[0]
    tensors = load_file(path / "exp_avg.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(7)}, path / "exp_avg.safetensors")
    description = json.loads((path / "checkpoint.json").read_text())
    description["sha256"]["exp_avg.safetensors"] = sha256(path / "exp_avg.safetensors")
    (path / "checkpoint.json").write_text(json.dumps(description))
    code, said = again()
    assert code == 1 and f"in exp_avg.safetensors, {name} is ('F32', (7,))" in said


def test_a_recipe_that_may_not_be_read_is_named(tmp_path):
    """As a user without the right: root reads everything."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {train: projector}\n")
    recipe.chmod(0)
    code = (
        "import os, sys\n"
        "from proteingpt.config import read_recipe, ConfigError\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: read_recipe(sys.argv[1])\n"
        "except ConfigError as error: print(error)"
    )
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    command = [sys.executable, "-c", code, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.stdout == f"recipe {recipe} cannot be read: Permission denied\n", done.stderr


def test_keys_of_the_environment_and_the_signature_of_an_address_are_nowhere_in_a_run(again, tmp_path):
    secrets = {
        name: f"sk-{name.lower()}-0123456789" for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    }
    secrets["signature"] = "s1gnature-0123456789"
    with serving(tmp_path / "assets") as (address, _):
        signed = ("--data", f"{address}?signature={secrets['signature']}", "--allow-changed", "data.shards")
        code, said = again(*signed, env=secrets)
    assert code == 0 and address in said, said
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()) + said.encode()
    assert not [name for name, secret in secrets.items() if secret.encode() in written]
