"""Which data an evaluation takes: those of the training, unless the command line says otherwise."""

import pytest
import yaml

from proteingpt.evaluation.command import check, data_of, make_parser
from proteingpt.evaluation.predictions import EvaluationError

MIXTURE = {"shards/pdb": 1.0, "shards/afdb": 0.5}


def data(tmp_path, trained: dict | None, *more):
    if trained is not None:
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({"recipe": "mine", "data": trained, "align": {"of": "no matter"}})
        )
    args = make_parser().parse_args(["--model", str(tmp_path), "--out", "report", *more])
    check(args)
    return data_of(args)


def test_without_anything_said_it_is_as_in_training(tmp_path):
    found = data(tmp_path, {"shards": "shards/pdb", "embeddings": "rows", "max_residues": 600})
    assert (found.shards, found.embeddings, found.max_residues, found.long_proteins) == (
        "shards/pdb",
        "rows",
        600,
        "skip",
    )
    found = data(tmp_path, {"mixture": MIXTURE, "max_residues": 600, "long_proteins": "crop"})
    assert found.mixture == MIXTURE and found.long_proteins == "crop"


def test_other_data_come_without_the_rows_of_the_training(tmp_path):
    trained = {"shards": "shards/pdb", "embeddings": "rows", "max_residues": 600}
    found = data(tmp_path, trained, "--data", "shards/new")
    assert (found.shards, found.embeddings, found.max_residues) == ("shards/new", None, 600)
    found = data(tmp_path, trained, "--data", "shards/a", "shards/b", "--long-proteins", "whole")
    assert found.shards is None and list(found.mixture) == ["shards/a", "shards/b"] and found.max_residues is None
    found = data(tmp_path, {"mixture": MIXTURE}, "--data", "shards/a", "--embeddings", "rows")
    assert (found.shards, found.mixture, found.embeddings) == ("shards/a", None, "rows")


def test_a_model_without_a_recipe_needs_its_data_named(tmp_path):
    assert (
        data(tmp_path, None, "--data", "shards/a", "--max-residues", "9", "--long-proteins", "crop").max_residues == 9
    )
    with pytest.raises(EvaluationError, match="--data is not given, and .*recipe.yaml"):
        data(tmp_path, None)


@pytest.mark.parametrize(
    "trained, more, says",
    [
        ({"shards": "a"}, ("--long-proteins", "crop"), "crop needs --max-residues"),
        ({"shards": "a"}, ("--long-proteins", "whole", "--max-residues", "9"), "leave --max-residues out"),
        ({"shards": "a"}, ("--max-residues", "0"), "--max-residues is 0"),
        ({"shards": "a", "max_residues": 9, "long_proteins": "crop"}, ("--embeddings", "b"), "of whole proteins"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, trained, more, says):
    with pytest.raises(EvaluationError, match=says):
        data(tmp_path, trained, *more)
