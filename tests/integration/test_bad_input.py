"""What a user gets wrong ends with one sentence: what was found, what was wanted, what to do. Nothing is lost."""

import json
from pathlib import Path

import pytest
from commands import execute, workplace

from proteingpt.distributed import stop
from proteingpt.training.run import main

ZERO2 = str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Runs launch/train.py's main in this process; returns (exit code, what it wrote to stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["--ds_config", ZERO2, *arguments])
        return code, capfd.readouterr().err

    yield run
    stop()


def test_an_unknown_recipe_field_is_named_with_its_nearest(train, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {train: projector}\nalign: {samples_per_stp: 4}\n")
    code, said = train("--recipe", str(recipe))
    assert code == 1
    assert said == "error: align.samples_per_stp is not a recipe field; did you mean align.samples_per_step?\n"


def test_a_key_that_stands_in_recipe_and_json_names_both(train, tmp_path):
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    code, said = train("--ds_config", str(both))
    assert code == 1
    assert "optimizer" in said and str(both) in said and "align.init_lr" in said


def test_missing_weights_say_which_file_where_and_from_whence(train, tmp_path, demo_assets):
    code, said = train(
        "--recipe", "paper-align", "--data", str(demo_assets), "--llm", str(demo_assets / "llm"),
        "--encoders.weights_dir", "elsewhere",
    )  # fmt: skip
    assert code == 1
    assert "esm2_t36_3B_UR50D.pt" in said and "elsewhere" in said
    assert "https://dl.fbaipublicfiles.com/fair-esm/models/esm2_t36_3B_UR50D.pt" in said


def test_an_empty_shard_directory_says_how_to_build_shards(train, tmp_path):
    (tmp_path / "empty").mkdir()
    code, said = train("--data", "empty", "--demo.num_proteins", "20")
    assert code == 1
    assert "empty" in said and "launch/build_shards.py" in said


def test_paths_that_a_real_recipe_needs_are_asked_for(train, demo_assets):
    assert "--data" in train("--recipe", "paper-align", "--output", "a")[1]
    assert "--llm" in train("--recipe", "paper-align", "--data", str(demo_assets), "--output", "b")[1]


def test_instruct_without_align_says_what_to_train_first(train, demo_assets):
    code, said = train(
        "--recipe", "paper-instruct", "--data", str(demo_assets), "--llm", str(demo_assets / "llm"),
        "--encoders.esm2", str(demo_assets / "esm2_demo.pt"), "--encoders.esm_if1", str(demo_assets / "esm_if1_demo.pt"),
    )  # fmt: skip
    assert code == 1
    assert "model.init_from" in said and "runs/paper-align/model" in said and "align" in said


def test_fp16_on_a_cpu_is_refused_before_anything_loads(train, tmp_path):
    config = tmp_path / "fp16.json"
    config.write_text(json.dumps({"fp16": {"enabled": True}}))
    code, said = train("--ds_config", str(config))
    assert code == 1 and "fp16" in said and "CPU" in said
    assert not (tmp_path / "runs").exists()


def test_more_ranks_than_samples(tmp_path):
    folder = workplace(tmp_path)
    process = execute(
        "torchrun --nproc-per-node 9 --standalone launch/train.py --ds_config ds_configs/zero2.json "
        "--demo.num_proteins 10",
        folder,
    )
    assert process.returncode != 0
    assert "9 ranks but only 8 training samples" in process.stderr
