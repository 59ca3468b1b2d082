"""Shared-prefix attention against masks written by hand and a dense softmax written anew."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, LlamaConfig

from proteingpt.model.attention import (
    NAME,
    AttentionError,
    check_positions,
    group_mask,
    make_layout,
    shared_prefix_attention,
)


def test_the_mask_of_a_group_by_hand():
    """Two prefix tokens p, then branches of two tokens (a) and two (b). Row: who sees; column: what is seen."""
    rows = [
        # p p a a b b
        "1 0 0 0 0 0",
        "1 1 0 0 0 0",
        "1 1 1 0 0 0",
        "1 1 1 1 0 0",
        "1 1 0 0 1 0",
        "1 1 0 0 1 1",
    ]
    wanted = [[cell == "1" for cell in row.split()] for row in rows]
    assert group_mask(torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == wanted


def test_a_prefix_alone_is_causal_and_the_mask_is_boolean():
    mask = group_mask(torch.zeros(3, dtype=torch.int64))
    assert mask.dtype == torch.bool and mask.tolist() == [[True, False, False], [True, True, False], [True] * 3]


def told(layout) -> list:
    return [(p.begin, p.end, p.spans, p.mask if p.mask is None else p.mask.int().tolist()) for p in layout.parts]


def test_small_groups_have_one_mask_each():
    assert told(make_layout([0, 3, 5], torch.tensor([0, 1, 2, 0, 1]))) == [
        (0, 3, ((0, 3),), [[1, 0, 0], [1, 1, 0], [1, 0, 1]]),
        (3, 5, ((3, 5),), [[1, 0], [1, 1]]),
    ]


def test_large_groups_are_read_prefix_by_prefix_and_branch_by_branch():
    """Branch 2 has no token of its own: its one answer token is predicted from the prefix."""
    assert told(make_layout([0, 5, 6], torch.tensor([0, 0, 1, 3, 3, 0]), dense_tokens=0)) == [
        (0, 2, ((0, 2),), None),
        (2, 3, ((0, 2), (2, 3)), [[1, 1, 1]]),
        (3, 5, ((0, 2), (3, 5)), [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (5, 6, ((5, 6),), None),
    ]


def dense_attention(query, key, value, group_starts, branch_ids, scaling):
    """(1, H, T, D) -> (1, T, H, D) with the whole T x T mask, pair by pair, and a softmax by its formula."""
    tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
    group = [sum(start <= i for start in group_starts[1:]) for i in range(tokens)]
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            allowed[i, j] = group[i] == group[j] and (branch_ids[j] == 0 or branch_ids[j] == branch_ids[i])
    heads = []
    for h in range(query.shape[1]):
        scores = (query[0, h] @ key[0, h // repeats].T * scaling).masked_fill(~allowed, -math.inf)
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ value[0, h // repeats])
    return torch.stack(heads, dim=1)[None]


def random_inputs(seed: int, heads: int, key_heads: int, tokens: int, width: int):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, n, tokens, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    ]


shapes = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=3)), min_size=1, max_size=3)


@settings(max_examples=40)
@given(
    shapes,
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 99),
    st.sampled_from([0, 5, 100]),
)
def test_it_is_dense_attention_under_the_whole_mask(drawn, heads, scaling, seed, dense_tokens):
    """Values and gradients, in fp64, grouped-query heads as well. drawn: (prefix, branch lengths) of each group."""
    starts, branch_ids = [0], []
    for prefix, lengths in drawn:
        branch_ids += [0] * prefix + [number for number, n in enumerate(lengths, start=1) for _ in range(n)]
        starts.append(len(branch_ids))
    query, key, value = random_inputs(seed, *heads, len(branch_ids), width=4)
    layout = make_layout(starts, torch.tensor(branch_ids), dense_tokens)
    made, weights = shared_prefix_attention(None, query, key, value, scaling=scaling, layout=layout)
    wanted = dense_attention(query, key, value, starts, branch_ids, 4**-0.5 if scaling is None else scaling)
    assert weights is None and made.shape == (1, len(branch_ids), heads[0], 4)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    direction = torch.randn(made.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    inputs = (query, key, value)
    gradients = zip(torch.autograd.grad(made, inputs, direction), torch.autograd.grad(wanted, inputs, direction))
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_nothing_leaks_between_branches_or_groups():
    """What a token does not see may be anything, however large: nothing changes here, to the last bit."""
    query, key, value = (x.detach() for x in random_inputs(3, 2, 2, 7, 4))
    layout = make_layout([0, 4, 7], torch.tensor([0, 1, 2, 2, 0, 0, 1]))
    before, _ = shared_prefix_attention(None, query, key, value, layout=layout)
    key[:, :, 1], value[:, :, 1] = 1e9, 1e9  # the first branch of the first group
    after, _ = shared_prefix_attention(None, query, key, value, layout=layout)
    same = [i for i in range(7) if i != 1]
    assert torch.equal(before[:, same], after[:, same]) and not torch.equal(before[:, 1], after[:, 1])


def test_a_model_that_does_not_hand_the_layout_on_is_found_at_once():
    query, key, value = random_inputs(0, 1, 1, 2, 4)
    with pytest.raises(AssertionError, match="Linear does not hand"):
        shared_prefix_attention(torch.nn.Linear(1, 1), query, key, value)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias"])
def test_an_attention_of_another_kind_is_refused_rather_than_ignored(name):
    query, key, value = random_inputs(0, 1, 1, 2, 4)
    layout = make_layout([0, 2], torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=f"Linear asks for {name}"):
        shared_prefix_attention(torch.nn.Linear(1, 1), query, key, value, layout=layout, **{name: torch.ones(1)})
    shared_prefix_attention(torch.nn.Linear(1, 1), query, key, value, layout=layout, **{name: None})


def test_gemma_2_which_caps_its_scores_is_refused():
    """Ignored, its logits were off by half of their size."""
    config = Gemma2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_implementation=NAME,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    layout = make_layout([0, 3], torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="Gemma2Attention asks for softcap"):
        model(input_ids=torch.tensor([[1, 2, 3]]), layout=layout, use_cache=False)


def test_it_is_known_to_transformers_by_its_name():
    assert AttentionInterface()[NAME] is shared_prefix_attention


def test_positions_that_depend_on_the_longest_sample_are_refused():
    """longrope turns all positions of a row once one sample is long; Llama 3.1's scaling turns each by itself."""
    scaled = {"factor": 8.0, "original_max_position_embeddings": 32}
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaled}
    check_positions(LlamaConfig(rope_parameters=llama3))
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, **scaled}
    with pytest.raises(AttentionError, match="LlamaConfig has longrope positions"):
        check_positions(LlamaConfig(rope_parameters=longrope))
