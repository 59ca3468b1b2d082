"""The model card: data, recipe, metrics and the blind baseline, and what is not known said so."""

import json

from proteingpt.data.prompts import TEMPLATES
from proteingpt.evaluation.card import card_text, write_card
from proteingpt.model.assemble import ModelInfo

INFO = ModelInfo(
    llm="models/vicuna", esm2="esm2_t36_3B_UR50D", esm_if1="esm_if1", esm2_fingerprint="ab" * 32,
    esm_if1_fingerprint="",
    weights_dir="weights", encoder_dtype="bfloat16", structure_width=512, sequence_width=2560,
    template=TEMPLATES["released", "instruct"], stage="instruct",
)  # fmt: skip
REPORT = {
    "recipe": "fast-instruct", "steps": 30, "steps_by_stage": {"align": 10, "instruct": 20}, "loss": 0.5,
    "num_proteins": 64,
    "accuracy": 0.75, "blind_accuracy": 0.7, "num_questions": 900,
}  # fmt: skip
MANIFEST = {
    "totals": {"train": {"num_samples": 8, "num_turns": 90, "num_residues": 999}},
    "options": {"split": "cluster"},
}


def test_every_accuracy_stands_beside_the_blind_one():
    text = card_text(INFO, REPORT, "model: {train: projector}\n", {"shards/pdb": MANIFEST})
    assert "| this model | 75.0% |" in text and "commonest training answer | 70.0% |" in text and "+5.0 points" in text
    assert "train: 8 proteins, 90 questions, 999 residues" in text and "split: `cluster`" in text
    assert "models/vicuna`, frozen" in text and "sha256 " + "ab" * 8 in text and "train: projector" in text


def test_what_is_not_known_is_said():
    report = {**REPORT, "accuracy": None, "blind_accuracy": None}
    text = card_text(INFO, report, "model: {train: full}\n", {"shards/pdb": None})
    assert "not measured" in text and "models/vicuna`, trained" in text
    assert "`shards/pdb`\n  - could not be read" in text
    assert "names no shards" in card_text(INFO, report, "model: {train: lora}\n", {})


def test_a_mixture_is_named_with_its_weights():
    recipe = "model: {train: lora}\ndata: {mixture: {shards/pdb: 1.0, shards/afdb: 0.5}}\n"
    text = card_text(INFO, REPORT, recipe, {"shards/pdb": MANIFEST, "shards/afdb": MANIFEST})
    assert "- `shards/pdb`, weight 1\n" in text and "- `shards/afdb`, weight 0.5\n" in text
    assert "with LoRA adapters" in text


def test_it_lies_with_the_model(tmp_path):
    values = {**vars(INFO), "template": vars(INFO.template)}
    (tmp_path / "model.json").write_text(json.dumps(values))
    (tmp_path / "recipe.yaml").write_text("recipe: fast-instruct\n")
    write_card(tmp_path, REPORT, str(tmp_path / "absent"))
    assert (tmp_path / "README.md").read_text().count("fast-instruct") >= 2
