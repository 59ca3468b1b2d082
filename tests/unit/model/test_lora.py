"""Adapters in every family: what they are, and the same on disk as peft itself reads it."""

import dataclasses
import json
import shutil

import peft
import pytest
import torch
from exported import SEQUENCE_WIDTH, STRUCTURE_WIDTH, changed, make_info
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from proteingpt.config import LoraConfig, ModelConfig
from proteingpt.demo.llm import FAMILIES
from proteingpt.model import assemble, lora
from proteingpt.model.assemble import ModelError

LORA = LoraConfig(rank=3, alpha=9.0)
LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def build(directory, config: LoraConfig = LORA, train="lora", dtype=torch.float32, init_from=None, seed=3):
    lora_config = config if train == "lora" else LoraConfig()
    config = ModelConfig(llm=str(directory), train=train, lora=lora_config, init_from=init_from and str(init_from))
    return assemble.build_model(config, STRUCTURE_WIDTH, SEQUENCE_WIDTH, dtype, seed)


def logits_of(llm) -> torch.Tensor:
    llm.set_attn_implementation("eager")
    with torch.no_grad():
        return llm(torch.arange(3, 23)[None]).logits


def by_hand(directory, weights) -> torch.Tensor:
    """Logits of the family's own LLM with alpha / rank * B A added to its weights."""
    llm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            a, b = (weights.get(f"llm.{name.removesuffix('.weight')}.lora_{part}.default.weight") for part in "AB")
            if a is not None:
                parameter += 9.0 / 3 * b @ a
    return logits_of(llm)


def export(source, weights, place, config: LoraConfig = LORA):
    assemble.export(place, weights, make_info(source), assemble.load_tokenizer(str(source)), torch.float32, config)
    return place


@pytest.fixture(params=list(FAMILIES))
def trained(request, directories):
    """(family's directory, trained weights, logits of the model that has them)."""
    model = build(directories[request.param])
    weights = changed(model)
    return directories[request.param], weights, logits_of(model.llm)


# ------------------------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_attention_and_mlp_get_one_and_nothing_else_trains(directories, family):
    names = {name for name in assemble.trainable_names(build(directories[family])) if name.startswith("llm.")}
    adapted = {f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEAR}
    assert names == {f"llm.{name}.lora_{part}.default.weight" for name in adapted for part in "AB"}


def test_adapters_are_the_definition(trained):
    directory, weights, logits = trained
    assert torch.allclose(logits, by_hand(directory, weights), atol=1e-5)
    assert not torch.allclose(logits, by_hand(directory, {}), atol=1e-2)


def test_untrained_adapters_change_nothing_and_are_drawn_from_the_seed(directories):
    first, again, other = (build(directories["llama"], seed=seed) for seed in (3, 3, 4))
    assert torch.equal(logits_of(first.llm), by_hand(directories["llama"], {}))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    drawn = [lora.adapters(model.llm)[name] for model in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_targets_rank_and_precision_are_settings(directories):
    model = build(directories["qwen2"], LoraConfig(rank=5, targets=("q_proj", "v_proj")), dtype=torch.bfloat16)
    found = lora.adapters(model.llm)
    assert lora.target_modules(found) == ["q_proj", "v_proj"] and len(found) == 2 * 2 * 2
    assert all(5 in parameter.shape and parameter.dtype == torch.bfloat16 for parameter in found.values())


@pytest.mark.parametrize("targets", [("no_such_layer",), ("lm_head",), ("embed_tokens", "q_proj")])
def test_targets_that_are_no_layers_of_attention_or_mlp_are_refused(directories, targets):
    with pytest.raises(ModelError, match="model.lora.targets is"):
        build(directories["llama"], LoraConfig(targets=targets))


# ------------------------------------------------------------------------------------------------------------ on disk


def test_an_exported_adapter_is_one_that_peft_loads(trained, tmp_path):
    directory, weights, logits = trained
    place = export(directory, weights, tmp_path / "model")
    assert not (place / "llm").exists()
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, place / "adapter")
    assert torch.allclose(logits_of(loaded.base_model.model), logits, atol=1e-6)
    assert loaded.peft_config["default"].base_model_name_or_path == str(directory)


def test_an_exported_model_is_the_model(trained, tmp_path):
    directory, weights, logits = trained
    for config in (LORA, dataclasses.replace(LORA, merge_on_export=True)):
        place = export(directory, weights, tmp_path / str(config.merge_on_export), config)
        model, _, _ = assemble.load_exported(place, torch.float32, torch.device("cpu"))
        assert torch.allclose(logits_of(model.llm), logits, atol=1e-5)
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model.projector.structure.weight, weights["projector.structure.weight"])


def test_a_merged_one_is_an_ordinary_llm(trained, tmp_path):
    directory, weights, logits = trained
    place = export(directory, weights, tmp_path / "model", dataclasses.replace(LORA, merge_on_export=True))
    assert not (place / "adapter").exists()
    llm = AutoModelForCausalLM.from_pretrained(place / "llm", dtype=torch.float32)
    assert torch.allclose(logits_of(llm), logits, atol=1e-5)


def test_training_goes_on_from_an_exported_model(trained, tmp_path):
    """By adapters, in full with them added in, and from a merged one with new ones."""
    directory, weights, logits = trained
    place = export(directory, weights, tmp_path / "model")
    merged = export(directory, weights, tmp_path / "merged", dataclasses.replace(LORA, merge_on_export=True))
    on = build(directory, init_from=place)
    assert all(torch.equal(p, weights[name]) for name, p in on.named_parameters() if p.requires_grad)
    for model in (on, build(directory, train="full", init_from=place), build(directory, init_from=merged)):
        assert torch.allclose(logits_of(model.llm), logits, atol=1e-5)
    full = build(directory, train="full", init_from=place)
    wanted = {f"llm.{name}" for name, _ in AutoModelForCausalLM.from_pretrained(directory).named_parameters()}
    assert {name for name in assemble.trainable_names(full) if name.startswith("llm.")} == wanted
    assert assemble.base_llm(ModelConfig(train="lora", llm=str(directory), init_from=str(merged))) == str(
        merged / "llm"
    )


def test_what_does_not_fit_is_named(directories, tmp_path):
    weights = changed(build(directories["llama"]))
    place = export(directories["llama"], weights, tmp_path / "model")
    with pytest.raises(ModelError, match="does not fit.*other model.lora settings"):
        build(directories["llama"], LoraConfig(rank=4), init_from=place)
    with pytest.raises(ModelError, match="train lora goes on with it"):
        assemble.check_init_from(ModelConfig(train="projector", init_from=str(place)))
    saved = load_file(place / "adapter" / lora.WEIGHTS_FILE)
    save_file(dict(list(saved.items())[1:]), place / "adapter" / lora.WEIGHTS_FILE)
    with pytest.raises(ModelError, match="does not fit: 1 tensors"):
        assemble.load_exported(place, torch.float32, torch.device("cpu"))
    path = place / "adapter" / lora.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ModelError, match="another kind of adapter"):
        assemble.load_exported(place, torch.float32, torch.device("cpu"))
    shutil.rmtree(place / "adapter")
    path.parent.mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        assemble.load_exported(place, torch.float32, torch.device("cpu"))
