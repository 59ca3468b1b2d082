"""The maps from rows to the LLM's width, against the same written out for one protein at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.model.projector import Projector
from proteingpt.protein import PrefixLength

STRUCTURE_WIDTH, SEQUENCE_WIDTH, INNER, WIDTH, TOKENS = 6, 10, 128, 8, 3
KINDS = {"linear": {}, "mlp": {"inner_width": INNER}, "resampler": {"num_tokens": TOKENS, "inner_width": INNER}}


def make(kind: str, **changes) -> Projector:
    torch.manual_seed(1)
    options = {"structure_width": STRUCTURE_WIDTH, "sequence_width": SEQUENCE_WIDTH, **KINDS[kind], **changes}
    return Projector(llm_width=WIDTH, kind=kind, **options).double()


def make_rows(lengths):
    generator = torch.Generator().manual_seed(2)
    widths = (STRUCTURE_WIDTH, SEQUENCE_WIDTH)
    return tuple([torch.randn(n, w, generator=generator, dtype=torch.float64) for n in lengths] for w in widths)


def linear(module, rows):
    return rows @ module.weight.T + module.bias


def attend(layer, tokens, rows):
    """One layer of a resampler, a head and a query at a time. Heads are 64 wide."""
    def normed(norm, values):
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    queries = linear(layer.query, normed(layer.token_norm, tokens))
    keys_values = linear(layer.key_value, normed(layer.row_norm, rows))
    keys, values = keys_values[:, :INNER], keys_values[:, INNER:]
    seen = torch.zeros_like(queries)
    for head in (slice(0, 64), slice(64, 128)):
        for i in range(len(tokens)):
            weights = (keys[:, head] @ queries[i, head] / 8).softmax(0)  # 8: the root of 64
            seen[i, head] = weights @ values[:, head]
    tokens = tokens + linear(layer.merge, seen)
    return tokens + mlp(layer.mlp, normed(layer.mlp_norm, tokens)), normed


def mlp(module, rows):
    inner = linear(module.first, rows)
    return linear(module.second, inner * (1 + torch.erf(inner / 2**0.5)) / 2)


def one(part, kind, rows):
    """What one encoder's rows of one protein become."""
    if kind == "linear":
        return linear(part, rows)
    if kind == "mlp":
        return mlp(part, rows)
    tokens, inside = part.queries, linear(part.inside, rows)
    for layer in part.layers:
        tokens, normed = attend(layer, tokens, inside)
    return linear(part.outside, normed(part.norm, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_proteins_together_are_each_alone_and_so_are_their_gradients(kind):
    projector = make(kind)
    structure, sequence = make_rows((5, 1, 9))
    found = projector(structure, sequence)
    parts = (projector.structure, projector.sequence)
    wanted = torch.cat([one(part, kind, r) for rows in zip(structure, sequence) for part, r in zip(parts, rows)])
    assert found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    parameters = list(projector.parameters())
    ours, theirs = (torch.autograd.grad((out * weights).sum(), parameters) for out in (found, wanted))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) and b.any() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_positions_are_those_that_prompts_reserve(kind, residues):
    projector, length = make(kind), PrefixLength(2, KINDS[kind].get("num_tokens"))
    rows = make_rows([n + 2 for n in residues])
    assert len(projector(*rows)) == sum(map(length, residues))
    assert all(length(n) == 2 * (TOKENS if kind == "resampler" else n + 2) for n in residues)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_without_rows_takes_no_positions(kind):
    projector = make(kind)
    structure, sequence = make_rows((4,))
    found = projector([structure[0][:0]], sequence)
    assert projector.positions(0) == 0
    assert torch.allclose(found, one(projector.sequence, kind, sequence[0]), rtol=1e-10, atol=1e-12)
    assert len(projector([structure[0][:0]], [sequence[0][:0]])) == 0
    only = make(kind, structure_width=0)
    assert only.structure is None and len(only(structure, sequence)) == projector.positions(4)


def test_the_published_map_keeps_its_names():
    """Checkpoints and exported models of before hold these."""
    names = {name for name, _ in make("linear").named_parameters()}
    assert names == {f"{part}.{kind}" for part in ("structure", "sequence") for kind in ("weight", "bias")}


def test_the_inner_width_is_the_llms_unless_it_is_given():
    assert make("mlp", inner_width=None).structure.first.weight.shape == (WIDTH, STRUCTURE_WIDTH)
    assert make("mlp").structure.second.weight.shape == (WIDTH, INNER)
