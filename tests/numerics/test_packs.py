"""A pack's loss and gradients are the sums over its questions, each asked alone (one_question.py), in every precision,
for every family of LLMs and by every way to the attention."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_question import (
    LLMS,
    SCALE,
    SEQUENCE_WIDTH,
    STRUCTURE_WIDTH,
    TOLERANCE,
    WAYS,
    assert_close,
    by,
    load,
    make_group,
    make_rows,
    one_at_a_time,
    packed,
    together,
    write_llm,
)

from proteingpt.config import ModelConfig
from proteingpt.data.collate import collate
from proteingpt.demo.llm import FAMILIES
from proteingpt.model import protein_gpt
from proteingpt.model.assemble import build_model
from proteingpt.model.attention import AttentionError, make_layout

EXAMPLES = 10


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    texts = ["What is the main secondary structure of this protein? helix"]
    kept = {name: write_llm(tmp_path_factory.mktemp("llm"), name, texts) for name in LLMS}
    scale = SCALE[torch.bfloat16]
    return kept | {(name, "bf16"): write_llm(tmp_path_factory.mktemp("llm"), name, texts, scale) for name in LLMS}


@pytest.fixture(scope="module")
def models(directories):
    """models(name, dtype): (ProteinGPT that trains in full, an LLM of the same weights for the definition)."""
    return functools.cache(
        lambda name, dtype: load(directories[(name, "bf16") if dtype == torch.bfloat16 else name], dtype)
    )


branch_shapes = st.tuples(st.integers(0, 5), st.integers(1, 4))
branches = st.lists(branch_shapes, min_size=1, max_size=4).map(tuple)
group_shapes = st.tuples(st.integers(1, 5), st.integers(0, 3), branches)
packs = st.tuples(st.lists(group_shapes, min_size=1, max_size=3), st.integers(0, 1000)).map(
    lambda drawn: [make_group(number, shape, drawn[1]) for number, shape in enumerate(drawn[0])]
)
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LLMS)
@few
@given(groups=packs, way=st.sampled_from(WAYS))
def test_a_pack_is_the_sum_of_its_questions(models, name, dtype, groups, way):
    """Below fp64 with every module as transformers has it."""
    model, alone = models(name, dtype)
    with by(model, way):
        found = packed(model, groups)
    wanted = one_at_a_time(model, alone, groups)
    if dtype == torch.bfloat16:
        found, wanted = together(found), together(wanted)
    assert_close(found, wanted, TOLERANCE[dtype])


# A question-less group (stage align), an empty system prompt, branches of one token, and branches of unlike lengths.
SHAPES = [(4, 1, ((0, 3), (0, 2))), (2, 0, ((5, 1), (1, 1), (3, 4))), (5, 3, ((2, 3),))]


@pytest.fixture
def groups():
    return [make_group(number, shape, seed=1) for number, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_groups_together_changes_nothing(models, family, groups):
    model, _ = models(family, torch.float64)
    rows = zip(*make_rows(groups, torch.float64))
    apart = [packed(model, [group], ([structure], [sequence])) for group, (structure, sequence) in zip(groups, rows)]
    total = {name: sum(one[name] for one in apart) for name in apart[0]}
    assert_close(packed(model, groups), total, TOLERANCE[torch.float64])


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_longer_than_the_sliding_window_is_refused_and_one_within_is_not(models, way):
    """17 + 15 tokens and 17 + 16, where 32 are seen; a pack of many such samples may be longer."""
    model, _ = models("mistral with a window", torch.float32)
    within, beyond = (make_group(0, (5, 3, ((10, 3), (last, 3))), seed=1) for last in (13, 14))
    with by(model, way):
        packed(model, [within, within])
        with pytest.raises(AttentionError, match="sliding window of 32 tokens and was given a sample of 33"):
            packed(model, [within, beyond])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_head_in_chunks_gives_the_same_and_holds_fewer_logits(models, groups, monkeypatch, name, dtype):
    """With a head of its own and one tied to the embeddings. Three answer tokens at a time, of 13."""
    model, _ = models(name, dtype)
    wanted, whole = packed(model, groups), largest_saved(model, groups, dtype)
    monkeypatch.setattr(protein_gpt, "LOGITS_BYTES", 3 * 4 * model.llm.config.vocab_size)
    assert_close(packed(model, groups), wanted, {torch.float64: 1e-12, torch.float32: 1e-6}[dtype])
    assert largest_saved(model, groups, dtype) < whole
    logits = model.llm(inputs_embeds=torch.zeros(1, 2, 32, dtype=dtype), **alone_layout()).logits
    assert logits.shape[-1] == model.llm.config.vocab_size, "the head is itself again"


def alone_layout():
    return {"layout": make_layout([0, 2], torch.tensor([0, 0])), "use_cache": False}


def largest_saved(model, groups, dtype) -> int:
    """Elements of all tensors as wide as the vocabulary that a forward keeps for its backward."""
    width, kept = model.llm.config.vocab_size, {}

    def pack(tensor):
        if tensor.ndim and tensor.shape[-1] == width:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(collate(groups), *make_rows(groups, dtype))
    del loss
    return sum(kept.values())


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
