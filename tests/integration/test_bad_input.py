"""What a user gets wrong ends with one sentence: what was found, what was wanted, what to do. Nothing is lost."""

import json
from pathlib import Path

import pytest
from commands import execute, workplace

from proteingpt.distributed import stop
from proteingpt.inference.chat import main as chat
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
        stop()  # a process of its own ends here
        return code, capfd.readouterr().err

    return run


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


def test_a_tracker_that_cannot_be_had_is_said_before_anything_is_made(train, tmp_path, monkeypatch):
    """Without its package, or with it and without a key, which it would ask for at the terminal."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = train("--track", "wandb", "--output", "runs/tracked")
    assert code == 1 and said.startswith("error: track is 'wandb', but ")
    assert not (tmp_path / "shards").exists() and not (tmp_path / "runs/tracked/recipe.yaml").exists()


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
        "--encoders.esm2", str(demo_assets / "esm2_demo.pt"),
        "--encoders.esm_if1", str(demo_assets / "esm_if1_demo.pt"),
    )  # fmt: skip
    assert code == 1
    assert "model.init_from" in said and "runs/paper-align/model" in said and "align" in said


def test_fp16_on_a_cpu_is_refused_before_anything_loads(train, tmp_path):
    config = tmp_path / "fp16.json"
    config.write_text(json.dumps({"fp16": {"enabled": True}}))
    code, said = train("--ds_config", str(config))
    assert code == 1 and "fp16" in said and "CPU" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_more_ranks_than_samples(tmp_path):
    folder = workplace(tmp_path)
    process = execute(
        "torchrun --nproc-per-node 9 --standalone launch/train.py --ds_config ds_configs/zero2.json "
        "--demo.num_proteins 10",
        folder,
    )
    assert process.returncode != 0
    assert "9 ranks but only 8 training samples" in process.stderr


def ask_about(structure: Path, chain: str, capsys) -> tuple[int, str]:
    code = chat(["--model", "none", "--structure", str(structure), "--chain", chain, "--question", "What is it?"])
    return code, capsys.readouterr().err


def test_a_structure_without_the_chain_asked_for_names_the_chains_it_has(demo_assets, capsys):
    code, said = ask_about(demo_assets / "example.pdb", "B", capsys)
    assert code == 1 and "'B'" in said and "the polypeptide chains are: A" in said


def test_a_truncated_mmcif_is_refused_by_name(tmp_path, capsys):
    whole = (
        "data_1XYZ\n#\n"
        + "".join(f"_a{n}.id 1\n#\n" for n in range(9))
        + "loop_\n_atom_site.id\n_atom_site.Cartn_x\n1 2.0\n2"
    )
    (tmp_path / "cut.cif").write_text(whole)
    code, said = ask_about(tmp_path / "cut.cif", "A", capsys)
    assert code == 1 and "cut.cif" in said


def test_a_failed_start_does_not_bind_the_run_directory(train, demo_assets):
    """The first, wrong, command is corrected in the same --output: nothing has been learned there."""
    wrong = ("--recipe", "paper-align", "--output", "run", "--data", str(demo_assets))
    assert train(*wrong)[0] == 1
    code, said = train(*wrong, "--llm", str(demo_assets / "llm"), "--encoders.weights_dir", "elsewhere")
    assert "begun with another recipe" not in said and "esm2_t36_3B_UR50D.pt" in said


def test_a_misspelt_option_is_answered_with_the_nearest(train):
    assert train("--align.epohcs", "3") == (1, "error: --align.epohcs is not an option; did you mean --align.epochs?\n")


@pytest.mark.parametrize(
    "content, named", [({"bf16": True}, "bf16"), ({"activation_checkpointing": {}}, "activation_checkpointing")]
)
def test_a_json_that_cannot_be_meant_is_refused_before_anything_loads(train, tmp_path, content, named):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    code, said = train("--ds_config", str(tmp_path / "ds.json"))
    assert code == 1 and said.startswith("error: ") and named in said and not (tmp_path / "runs").exists()
