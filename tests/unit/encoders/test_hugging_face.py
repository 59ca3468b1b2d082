"""ESM-2 from a Hugging Face directory gives the rows of transformers' own model."""

import json

import pytest
import torch
from row_errors import relative_error
from safetensors.torch import load_file, save_file
from transformers import EsmConfig, EsmForMaskedLM

from proteingpt.encoders import load_esm2
from proteingpt.encoders.esm2 import tokens_of
from proteingpt.encoders.weights import BadCheckpoint

# How transformers 5.23 writes the frequencies of all layers.
SHARED = "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory as `save_pretrained` writes it, with sharp attention and frequencies rounded to fp16."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    model = EsmForMaskedLM(config).eval()
    for name, value in model.state_dict().items():
        if name.endswith(("query.weight", "key.weight")):
            value.mul_(20)
        if name.endswith("inv_freq"):
            value.copy_(value.half())
    directory = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    """copied(change): a copy of the directory, its tensors changed in place by change(tensors)."""

    def copy(change=lambda tensors: None):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        return tmp_path

    return copy


def to_published(tensors):
    """As the published directories are, which are older: frequencies with each layer, norms with weight and bias."""
    inv_freq = tensors.pop(SHARED)
    for name in list(tensors):
        tensors[name.replace("gamma", "weight").replace("beta", "bias")] = tensors.pop(name)
    for layer in range(3):
        tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = inv_freq.clone()


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_rows_are_those_of_transformers(saved, copied, make_protein, backend):
    model = EsmForMaskedLM.from_pretrained(saved).esm.eval()
    proteins = [make_protein(length) for length in (1, 40, 300)]
    directories = {"as now": saved, "as published": copied(to_published)}
    for directory in directories.values():
        for protein, found in zip(proteins, load_esm2(str(directory), backend=backend).encode(proteins), strict=True):
            ids = torch.tensor([tokens_of(protein.sequence)])
            with torch.no_grad():
                wanted = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            assert relative_error(found, wanted) < 5e-6


def test_frequencies_are_read_from_the_directory(saved, copied, make_protein):
    def change(tensors):
        to_published(tensors)
        for name in tensors:
            if name.endswith("inv_freq"):
                tensors[name] *= 0.9

    protein = make_protein(60)
    rows = [load_esm2(str(directory)).encode([protein])[0] for directory in (saved, copied(change))]
    assert relative_error(*rows) > 1e-3


def test_weights_in_several_files(saved, copied, make_protein):
    tensors = load_file(copied() / "model.safetensors")
    directory, wanted = copied(), load_esm2(str(saved)).encode([make_protein(9)])[0]
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_esm2(str(directory)).encode([make_protein(9)])[0], wanted)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="has no model-00002-of-00002.safetensors"):
        load_esm2(str(directory))


def test_the_fingerprint_is_that_of_all_that_decides_the_rows(saved, copied):
    same, before = load_esm2(str(copied())).fingerprint, load_esm2(str(saved)).fingerprint
    assert same == before and len(before) == 64
    assert load_esm2(str(copied(lambda tensors: tensors["lm_head.bias"].add_(1)))).fingerprint != before


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(SHARED), "inv_freq is missing"),
        (lambda t: t.pop("esm.encoder.layer.1.output.dense.bias"), "layers.1.fc2.bias is missing"),
        (lambda t: t.update({"esm.encoder.layer.3.output.dense.bias": torch.ones(64)}), "layers.3.fc2.bias is not"),
        (lambda t: t.update({"esm.something": torch.ones(1)}), "something is not part"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied, change, reason):
    with pytest.raises(BadCheckpoint, match=reason):
        load_esm2(str(copied(change)))


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"model_type": "bert"}, "is of model type 'bert'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before is True"),
        ({"num_hidden_layers": None}, r"encoder_layers = None \(wanted int\)"),
    ],
)
def test_another_model_is_refused(copied, values, reason):
    directory = copied()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(BadCheckpoint, match=reason):
        load_esm2(str(directory))


def test_files_that_are_broken_or_absent_are_named(copied):
    directory = copied()
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="config.json cannot be read"):
        load_esm2(str(directory))
    (directory / "config.json").write_text(config)
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(BadCheckpoint, match="model.safetensors cannot be read"):
        load_esm2(str(directory))
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(BadCheckpoint, match="has no model.safetensors"):
        load_esm2(str(directory))
