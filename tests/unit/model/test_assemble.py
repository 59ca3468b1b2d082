"""From directories to a model and back, for LLMs with and without tied embeddings."""

import dataclasses
import json
import shutil

import pytest
import torch
from exported import SEQUENCE_WIDTH, STRUCTURE_WIDTH, WIDTH, changed, make_info
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from proteingpt.config import ModelConfig
from proteingpt.demo.llm import FAMILIES
from proteingpt.model import assemble
from proteingpt.model.assemble import ModelError


@pytest.fixture
def copy(directories, tmp_path):
    """A copy of the tiny llama that a test may damage."""
    return shutil.copytree(directories["llama"], tmp_path / "llm")


def build(directory, train="full", dtype=torch.float32, seed=3, init_from=None):
    config = ModelConfig(llm=str(directory), train=train, init_from=init_from and str(init_from))
    return assemble.build_model(config, STRUCTURE_WIDTH, SEQUENCE_WIDTH, dtype, seed)


# ------------------------------------------------------------------------------------------------- what is refused


def test_an_llm_that_is_not_set_or_not_there_is_named(tmp_path):
    for load in (assemble.check_llm, assemble.load_tokenizer, assemble.llm_config):
        with pytest.raises(ModelError, match="--llm DIR"):
            load(None)
        with pytest.raises(ModelError, match=f"{tmp_path}/none holds no config.json"):
            load(f"{tmp_path}/none")


def test_a_directory_without_weights_is_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"{copy} is no causal LM"):
        assemble.load_llm(str(copy), torch.float32)


def test_weights_cut_short_are_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{copy} is no causal LM"):
        assemble.load_llm(str(copy), torch.float32)


def test_a_model_of_unknown_kind_is_named(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ModelError, match="abacus"):
        assemble.load_llm(str(copy), torch.float32)


def test_a_missing_tensor_is_an_error_and_not_a_random_one(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors, model.layers.1.mlp.up_proj.weight"):
        assemble.load_llm(str(copy), torch.float32)


def test_a_directory_without_a_tokenizer_is_named(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match=f"{copy} holds no tokenizer"):
        assemble.load_tokenizer(str(copy))


def test_a_tokenizer_without_an_end_token_is_refused(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        assemble.load_tokenizer(str(copy))


# ---------------------------------------------------------------------------------------------------- building one


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_llm_is_the_files(directories, family):
    """Against transformers' own loading; and in bf16 as well as in fp32."""
    wanted = AutoModelForCausalLM.from_pretrained(directories[family], dtype=torch.float32).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        found = build(directories[family], dtype=dtype).llm.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value.to(dtype)) for name, value in wanted.items())


def test_what_trains_is_what_was_asked(directories):
    projector = {f"projector.{part}.{kind}" for part in ("structure", "sequence") for kind in ("weight", "bias")}
    assert set(assemble.trainable_names(build(directories["llama"], "projector"))) == projector
    full = build(directories["llama"], "full")
    assert set(assemble.trainable_names(full)) == {name for name, _ in full.named_parameters()} > projector


def test_the_projector_is_drawn_from_the_seed_and_from_nothing_else(directories):
    torch.manual_seed(1)
    first = build(directories["llama"], seed=3).projector.state_dict()
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(2)), "the global generator has moved"
    again, other = (build(directories["llama"], seed=seed).projector.state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_context_ends_where_a_sliding_window_would_begin_to_slide():
    assert assemble.context_length(LlamaConfig(max_position_embeddings=100)) == 100
    assert assemble.context_length(MistralConfig(max_position_embeddings=100, sliding_window=32)) == 32
    assert assemble.context_length(MistralConfig(max_position_embeddings=100, sliding_window=None)) == 100
    assert assemble.context_length(MistralConfig(max_position_embeddings=100, sliding_window=400)) == 100
    qwen = dict(max_position_embeddings=100, sliding_window=32, num_hidden_layers=2, max_window_layers=0)
    assert assemble.context_length(Qwen2Config(use_sliding_window=False, **qwen)) == 100
    assert assemble.context_length(Qwen2Config(use_sliding_window=True, **qwen)) == 32


# ------------------------------------------------------------------------------------------------------ set_weights


def test_saved_weights_must_match_in_name_and_in_shape(directories):
    model = build(directories["llama"], "projector")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: before[name] + 1 for name in assemble.trainable_names(model)}
    bias, matrix = "projector.structure.bias", "projector.sequence.weight"
    lacking = {name: value for name, value in weights.items() if name != bias}
    for wrong, said in (
        (lacking, f"missing.*{bias}"),
        ({**weights, "llm.lm_head.weight": before["llm.lm_head.weight"]}, "not trained here.*llm.lm_head.weight"),
        ({**weights, bias: torch.ones(1)}, rf"{bias} is \(1,\), wanted \({WIDTH},\)"),  # which would broadcast
        ({**weights, matrix: torch.ones(WIDTH, 7)}, rf"{matrix} is \({WIDTH}, 7\)"),
    ):
        with pytest.raises(ModelError, match=said):
            assemble.set_weights(model, wrong)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assemble.set_weights(model, weights)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


# ----------------------------------------------------------------------------------------------------------- export


def logits_of(model) -> torch.Tensor:
    """Of a protein of three residues between some words, by transformers' eager attention."""
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randn(5, width, generator=generator) for width in (STRUCTURE_WIDTH, SEQUENCE_WIDTH)]
    token_ids = torch.arange(3, 23)
    model.llm.set_attn_implementation("eager")
    with torch.no_grad():
        embedded = model.embed(token_ids, torch.arange(4, 14), [rows[0]], [rows[1]])
        return model.llm(inputs_embeds=embedded[None]).logits


@pytest.mark.parametrize("train", ["projector", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_the_model(directories, tmp_path, family, train):
    """To the bit; with the LLM's own directory out of reach where it was trained, and named where it was not."""
    source = shutil.copytree(directories[family], tmp_path / "source")
    model = build(source, train)
    untrained = logits_of(model)
    weights = changed(model)
    wanted = logits_of(model)
    assert not torch.allclose(untrained, wanted)
    tokenizer = assemble.load_tokenizer(str(source))
    assemble.export(tmp_path / "model", weights, make_info(source), tokenizer, torch.float32)
    if train == "full":
        shutil.rmtree(source)
    loaded, again, info = assemble.load_exported(tmp_path / "model", torch.float32, torch.device("cpu"))
    assert torch.equal(logits_of(loaded), wanted)
    assert info == make_info(source)
    assert again.get_vocab() == tokenizer.get_vocab() and again.eos_token_id == tokenizer.eos_token_id
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert (tmp_path / "model" / "llm").exists() == (train == "full")


PROJECTORS = {
    "mlp": {"projector": "mlp", "projector_width": 24},
    "resampler": {"projector": "resampler", "projector_tokens": 5},
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_model_json_says_which_projector_it_is(directories, tmp_path, kind):
    """The resampler's five tokens are as many as the rows here, so that the same positions serve."""
    config = ModelConfig(llm=str(directories["llama"]), train="projector", **PROJECTORS[kind])
    model = assemble.build_model(config, STRUCTURE_WIDTH, SEQUENCE_WIDTH, torch.float32, 3)
    weights, wanted = changed(model), logits_of(model)
    info = dataclasses.replace(make_info(directories["llama"]), **PROJECTORS[kind])
    assemble.export(tmp_path, weights, info, assemble.load_tokenizer(info.llm), torch.float32)
    loaded, _, found = assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
    assert found == info and torch.equal(logits_of(loaded), wanted)
    with pytest.raises(ModelError, match="does not fit this LLM, model.projector"):
        build(directories["llama"], "projector", init_from=tmp_path)
    again = dataclasses.replace(config, init_from=str(tmp_path))
    again = assemble.build_model(again, STRUCTURE_WIDTH, SEQUENCE_WIDTH, torch.float32, 4)
    assert torch.equal(logits_of(again), wanted)


def test_a_model_json_from_before_there_was_a_choice_is_linear(directories, tmp_path):
    model = build(directories["llama"], "projector")
    weights, wanted = changed(model), logits_of(model)
    info = make_info(directories["llama"])
    assemble.export(tmp_path, weights, info, assemble.load_tokenizer(info.llm), torch.float32)
    values = json.loads((tmp_path / "model.json").read_text())
    old = {name: value for name, value in values.items() if not name.startswith("projector")}
    assert len(values) - len(old) == 3
    (tmp_path / "model.json").write_text(json.dumps(old))
    loaded, _, _ = assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
    assert torch.equal(logits_of(loaded), wanted)


def test_a_frozen_llm_that_was_trained_before_is_the_one_that_is_named(directories, tmp_path):
    """The projector learned before an LLM that an earlier run had trained in full: not before the one it came from."""
    first = build(directories["llama"], "full")
    tokenizer = assemble.load_tokenizer(str(directories["llama"]))
    assemble.export(tmp_path / "one", changed(first), make_info(directories["llama"]), tokenizer, torch.float32)
    config = ModelConfig(llm=str(directories["llama"]), train="projector", init_from=str(tmp_path / "one"))
    second = build(directories["llama"], "projector", init_from=tmp_path / "one")
    weights, wanted = changed(second), logits_of(second)
    assemble.export(tmp_path / "two", weights, make_info(assemble.base_llm(config)), tokenizer, torch.float32)
    loaded, _, _ = assemble.load_exported(tmp_path / "two", torch.float32, torch.device("cpu"))
    assert torch.equal(logits_of(loaded), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tied_embeddings_stay_tied(directories, tmp_path, family):
    model = build(directories[family])
    tokenizer = assemble.load_tokenizer(str(directories[family]))
    assemble.export(tmp_path, changed(model), make_info(directories[family]), tokenizer, torch.bfloat16)
    llm = assemble.load_exported(tmp_path, torch.bfloat16, torch.device("cpu"))[0].llm
    tied = llm.get_input_embeddings().weight.data_ptr() == llm.get_output_embeddings().weight.data_ptr()
    assert tied == (family == "qwen2")
    assert llm.dtype == torch.bfloat16


@pytest.mark.parametrize("train", ["projector", "full"])
def test_a_run_can_start_from_an_exported_model(directories, tmp_path, train):
    first = build(directories["qwen2"], train)
    weights = changed(first)
    tokenizer = assemble.load_tokenizer(str(directories["qwen2"]))
    assemble.export(tmp_path, weights, make_info(directories["qwen2"]), tokenizer, torch.float32)
    second = build(directories["qwen2"], "full", seed=99, init_from=tmp_path)
    assert torch.equal(logits_of(second), logits_of(first))


def test_what_is_no_exported_model_is_refused_by_name(directories, tmp_path):
    with pytest.raises(ModelError, match="holds no model.json"):
        assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
    with pytest.raises(ModelError, match="holds no projector.safetensors.*align"):
        assemble.check_init_from(ModelConfig(train="full", init_from=str(tmp_path)))
    assemble.check_init_from(ModelConfig(train="full"))
    model, info = build(directories["llama"]), make_info(directories["llama"])
    tokenizer = assemble.load_tokenizer(info.llm)
    other = dataclasses.replace(info, structure_width=STRUCTURE_WIDTH + 1)
    assemble.export(tmp_path, changed(model), other, tokenizer, torch.float32)
    with pytest.raises(ModelError, match="projector.safetensors does not fit"):
        assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
    path = tmp_path / "projector.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match="projector.safetensors is broken"):
        assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
    values = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, "format": 7}))
    with pytest.raises(ModelError, match="format 7"):
        assemble.read_info(tmp_path)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda d: (d / "projector.safetensors").unlink(), "projector.safetensors is broken"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer holds no tokenizer that can be loaded"),
        (lambda d: (d / "model.json").write_text('{"format": 1, "ll'), "model.json is damaged"),
        (lambda d: (d / "model.json").write_text('{"format": 1, "newer": 2}'), "model.json is damaged, or of another"),
    ],
)
def test_a_model_directory_of_which_a_part_was_lost_says_which(directories, tmp_path, damage, says):
    info = make_info(directories["llama"])
    weights = changed(build(directories["llama"]))
    assemble.export(tmp_path, weights, info, assemble.load_tokenizer(info.llm), torch.float32)
    damage(tmp_path)
    with pytest.raises(ModelError, match=says):
        assemble.load_exported(tmp_path, torch.float32, torch.device("cpu"))
