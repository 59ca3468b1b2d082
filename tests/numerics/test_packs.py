"""A pack's loss and gradients are the sums over its questions, each asked alone.

The definition is written out here: ids joined by hand, protein rows projected by hand, one ordinary causal sequence a
question, transformers' own (eager) attention, cross-entropy over the answer's tokens. transformers rounds norms and
softmax to fp32 whatever the model's precision, so for fp64 the definition brings its own softmax, and both sides use
torch's RMSNorm.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM

from proteingpt.config import ModelConfig
from proteingpt.data.collate import Group, collate
from proteingpt.demo.llm import FAMILIES, write_tiny_llm
from proteingpt.model.assemble import build_model
from proteingpt.protein import Protein

STRUCTURE_WIDTH, SEQUENCE_WIDTH = 12, 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
EXAMPLES = 15


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention in the precision of its input: (1, H, T, D) -> (1, T, H, D). Query head h reads key head
    h // (H / number of key heads)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("plain_for_packs", plain_attention)


def use_exact_norms(llm):
    for name, module in list(llm.named_modules()):
        if "RMSNorm" in type(module).__name__:
            norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            llm.set_submodule(name, norm)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Large weights, so that attention is far from uniform and who sees whom shows in the loss."""
    texts = ["What is the main secondary structure of this protein? helix"]
    return {
        family: write_tiny_llm(
            tmp_path_factory.mktemp(family), texts, family=family, width=32, vocab_size=280, initializer_range=0.15
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def models(directories):
    """models(family, dtype): (ProteinGPT that trains in full, an LLM of the same weights for the definition)."""

    @functools.cache
    def load(family: str, dtype: torch.dtype):
        config = ModelConfig(llm=str(directories[family]), train="full")
        model = build_model(config, STRUCTURE_WIDTH, SEQUENCE_WIDTH, dtype, seed=4)
        attention = "plain_for_packs" if dtype == torch.float64 else "eager"
        alone = AutoModelForCausalLM.from_pretrained(directories[family], dtype=dtype, attn_implementation=attention)
        if dtype == torch.float64:
            use_exact_norms(model.llm)
            use_exact_norms(alone)
        return model, alone

    return load


# ------------------------------------------------------------------------------------------------- groups and rows


def make_group(number: int, shape, seed: int) -> Group:
    """shape: (residues, ids before the protein, ((question ids, answer ids), ...)), as counts."""
    residues, before, branches = shape
    rng = np.random.default_rng((seed, number))
    protein = Protein(f"p{number}", "A", "G" * residues, rng.normal(size=(residues, 3, 3)).astype(np.float32))

    def ids(count: int) -> list[int]:
        return rng.integers(3, 262, count).tolist()

    return Group(protein.key, protein, ids(before), [(ids(question), ids(answer)) for question, answer in branches])


def make_rows(groups, dtype):
    """What encoders give: two lists of (residues + 2, width), one for each group's protein."""
    rows = ([], [])
    for number, group in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        for kind, width in zip(rows, (STRUCTURE_WIDTH, SEQUENCE_WIDTH)):
            kind.append(torch.randn(len(group.protein) + 2, width, generator=generator, dtype=torch.float64).to(dtype))
    return rows


branch_shapes = st.tuples(st.integers(0, 5), st.integers(1, 4))
branches = st.lists(branch_shapes, min_size=1, max_size=4).map(tuple)
group_shapes = st.tuples(st.integers(1, 5), st.integers(0, 3), branches)
packs = st.tuples(st.lists(group_shapes, min_size=1, max_size=3), st.integers(0, 1000)).map(
    lambda drawn: [make_group(number, shape, drawn[1]) for number, shape in enumerate(drawn[0])]
)
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --------------------------------------------------------------------------------------------------- both sides


def packed(model, groups, rows=None) -> dict[str, torch.Tensor]:
    """The trainer's way: {"loss", every parameter's gradient}."""
    model.zero_grad()
    loss = model(collate(groups), *(rows or make_rows(groups, model.llm.dtype)))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def one_at_a_time(model, llm, groups) -> dict[str, torch.Tensor]:
    """The definition, with the projector's weights and the other copy of the LLM."""
    linear = model.projector
    for part in (linear, llm):
        part.zero_grad()
    table = llm.get_input_embeddings().weight
    structure_rows, sequence_rows = make_rows(groups, table.dtype)
    total = torch.zeros((), dtype=torch.float64)
    for group, structure, sequence in zip(groups, structure_rows, sequence_rows):
        for question, answer in group.branches:
            embeddings = torch.cat(
                [
                    table[group.prefix_ids],
                    structure @ linear.structure.weight.T + linear.structure.bias,
                    sequence @ linear.sequence.weight.T + linear.sequence.bias,
                    table[question],
                    table[answer],
                ]
            )
            logits = llm(inputs_embeds=embeddings[None]).logits[0]
            answered = logits[-len(answer) - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(answered, torch.tensor(answer), reduction="sum")
            loss.backward()
            total += loss.detach()
    gradients = {f"projector.{name}": p.grad.clone() for name, p in linear.named_parameters()}
    return {"loss": total, **gradients, **{f"llm.{name}": p.grad.clone() for name, p in llm.named_parameters()}}


def errors(found, wanted) -> dict[str, float]:
    """Relative error of each tensor, in the Euclidean norm. A gradient below 1e-6 of the largest counts as that."""
    largest = max(float(value.double().norm()) for name, value in wanted.items() if name != "loss")
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].double() - value.double()).norm())
        / max(float(value.double().norm()), 0.0 if name == "loss" else 1e-6 * largest)
        for name, value in wanted.items()
    }


def assert_close(found, wanted, tolerance: float):
    far = {name: error for name, error in errors(found, wanted).items() if not error <= tolerance}
    assert not far, f"relative errors above {tolerance}: {far}"


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(groups=packs)
def test_a_pack_is_the_sum_of_its_questions_in_fp64(models, family, groups):
    model, alone = models(family, torch.float64)
    assert_close(packed(model, groups), one_at_a_time(model, alone, groups), TOLERANCE[torch.float64])


# A question-less group (stage align), an empty system prompt, branches of one token, and branches of unlike lengths.
SHAPES = [(4, 1, ((0, 3), (0, 2))), (2, 0, ((5, 1), (1, 1), (3, 4))), (5, 3, ((2, 3),))]


@pytest.fixture
def groups():
    return [make_group(number, shape, seed=1) for number, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_too_with_every_module_as_transformers_has_it(models, family, groups):
    model, alone = models(family, torch.float32)
    assert_close(packed(model, groups), one_at_a_time(model, alone, groups), TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_the_two_differ_by_no_more_than_its_rounding(models, family, groups):
    """Of all gradients together: single ones of either side are rounded by more than this."""
    model, alone = models(family, torch.bfloat16)
    found, wanted = packed(model, groups), one_at_a_time(model, alone, groups)
    assert_close(together(found), together(wanted), TOLERANCE[torch.bfloat16])


def together(side) -> dict[str, torch.Tensor]:
    gradients = torch.cat([side[name].flatten() for name in sorted(side) if name != "loss"])
    return {"loss": side["loss"], "gradients": gradients}


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_groups_together_changes_nothing(models, family, groups):
    model, _ = models(family, torch.float64)
    rows = zip(*make_rows(groups, torch.float64))
    apart = [packed(model, [group], ([structure], [sequence])) for group, (structure, sequence) in zip(groups, rows)]
    total = {name: sum(one[name] for one in apart) for name in apart[0]}
    assert_close(packed(model, groups), total, TOLERANCE[torch.float64])


def test_a_question_is_not_seen_by_its_neighbours(models, groups):
    """In the other direction: were the definition to let questions see each other, it would be far from the pack."""
    model, alone = models("llama", torch.float64)
    group = groups[1]
    (question, answer), (next_question, next_answer) = group.branches[:2]
    behind = (question + answer + next_question, next_answer)
    joined = dataclasses.replace(group, branches=[(question, answer), behind])
    apart = dataclasses.replace(group, branches=group.branches[:2])
    seen, unseen = (one_at_a_time(model, alone, [g])["loss"] for g in (joined, apart))
    assert abs(float(seen - unseen)) > 1e-3 * float(unseen)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_nothing_and_saves_memory(directories, models, family, groups):
    plain, _ = models(family, torch.float32)
    config = ModelConfig(llm=str(directories[family]), train="full", activation_checkpointing=True)
    recomputing = build_model(config, STRUCTURE_WIDTH, SEQUENCE_WIDTH, torch.float32, seed=4)
    plain.train()
    recomputing.train()
    wanted, found = packed(plain, groups), packed(recomputing, groups)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert saved_bytes(recomputing, groups) < 0.6 * saved_bytes(plain, groups)


def saved_bytes(model, groups) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(collate(groups), *make_rows(groups, torch.float32))
    del loss
    return sum(kept.values())


def test_structure_rows_come_first_then_sequence_rows_in_the_places_kept_for_them(models, groups):
    """Two proteins in one row of tokens; everything else is the embedding of its id."""
    model, _ = models("llama", torch.float64)
    structure, sequence = make_rows(groups[:2], torch.float64)
    pack = collate(groups[:2])
    with torch.no_grad():
        embedded = model.embed(pack.token_ids, pack.protein_positions, structure, sequence)
    first, second = groups[:2]
    table, linear = model.llm.get_input_embeddings().weight, model.projector
    wanted = []
    for group, s, q in zip((first, second), structure, sequence):
        wanted += [table[group.prefix_ids]]
        wanted += [s @ linear.structure.weight.T + linear.structure.bias]
        wanted += [q @ linear.sequence.weight.T + linear.sequence.bias]
        wanted += [table[question + answer[:-1]] for question, answer in group.branches]
    assert torch.allclose(embedded, torch.cat(wanted), rtol=1e-12, atol=1e-14)
    with pytest.raises((RuntimeError, IndexError)):
        model.embed(pack.token_ids, pack.protein_positions, [s[:-1] for s in structure], [s[:-1] for s in sequence])


def test_a_silenced_pack_has_no_say_but_touches_every_weight(models, groups):
    """An idle rank's: its loss and gradients are zero, and none is missing, or ranks would wait for each other."""
    model, _ = models("llama", torch.float32)
    model.zero_grad()
    loss = model(collate(groups).silenced(), *make_rows(groups, torch.float32))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
