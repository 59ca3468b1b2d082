"""FlexAttention's rule, blocks and kernel, against a walk over the pairs and against torch's SDPA.

A CPU has the kernel's forward pass only, so its gradient is taken where torch runs the operator's own mathematics,
under the same compilation (backend aot_eager), once torch's check that forbids it is lifted.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from proteingpt.model import attention, flex
from proteingpt.model.flex import BLOCK, count_blocks, dense, listed, make_block_mask, make_sight, padded_length, rule


def row(drawn) -> tuple[list[int], torch.Tensor]:
    """[(prefix, branch lengths), ...] -> (group_starts, branch_ids)."""
    starts, ids = [0], []
    for prefix, lengths in drawn:
        ids += [0] * prefix + [number for number, n in enumerate(lengths, start=1) for _ in range(n)]
        starts.append(len(ids))
    return starts, torch.tensor(ids)


def test_what_each_token_sees_by_hand():
    """Two prefix tokens, branches of one and two; another group; and two tokens of padding, which see themselves."""
    sight = make_sight([0, 5, 6], torch.tensor([0, 0, 1, 2, 2, 0]), length=8)
    assert sight.prefix_begin.tolist() == [0, 0, 0, 0, 0, 5, 6, 6]
    assert sight.prefix_end.tolist() == [2, 2, 2, 2, 2, 6, 8, 8]
    assert sight.branch_begin.tolist() == [0, 0, 2, 3, 3, 5, 6, 6]


def test_a_row_is_padded_to_whole_blocks_and_to_two_of_them():
    assert [padded_length(n) for n in (1, 256, 257, 4096, 4097)] == [256, 256, 384, 4096, 4224]


shapes = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 3), max_size=4)), min_size=1, max_size=4)


@given(shapes, st.integers(0, 5))
def test_the_rule_is_that_of_each_group_alone(drawn, padding):
    """group_mask, which is checked by hand, on the diagonal, and nothing elsewhere."""
    starts, ids = row(drawn)
    made = dense(rule(make_sight(starts, ids, len(ids) + padding)), 0, len(ids) + padding, len(ids) + padding, "cpu")
    wanted = torch.zeros_like(made)
    for begin, end in zip(starts, starts[1:]):
        wanted[begin:end, begin:end] = attention.group_mask(ids[begin:end])
    wanted[len(ids) :, len(ids) :] = torch.ones(padding, padding).tril().bool()
    assert torch.equal(made, wanted)


large_shapes = st.lists(
    st.tuples(st.integers(1, 400), st.lists(st.integers(1, 150), max_size=5)), min_size=1, max_size=3
)


@settings(max_examples=10)
@given(large_shapes, st.sampled_from([1, 40_000, 2**24]))
def test_blocks_are_those_of_the_whole_square(drawn, entries_at_once):
    """Counted pair by pair from the dense mask, however many rows are looked at at once; and all blocks that have
    anything are listed once, the whole ones apart."""
    starts, ids = row(drawn)
    length = padded_length(len(ids))
    sees = rule(make_sight(starts, ids, length))
    square = dense(sees, 0, length, length, "cpu")
    counts = square.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).sum((2, 3))
    before, flex.ENTRIES_AT_ONCE = flex.ENTRIES_AT_ONCE, entries_at_once
    try:
        some, whole = count_blocks(sees, length, "cpu")
        mask = make_block_mask(starts, ids)
    finally:
        flex.ENTRIES_AT_ONCE = before
    assert torch.equal(some, counts > 0) and torch.equal(whole, counts == BLOCK**2)
    assert mask.shape == (1, 1, length, length)
    for q, row_counts in enumerate(counts.tolist()):
        partly = mask.kv_indices[0, 0, q, : mask.kv_num_blocks[0, 0, q]].tolist()
        wholly = mask.full_kv_indices[0, 0, q, : mask.full_kv_num_blocks[0, 0, q]].tolist()
        assert partly == [k for k, count in enumerate(row_counts) if 0 < count < BLOCK**2]
        assert wholly == [k for k, count in enumerate(row_counts) if count == BLOCK**2]


def test_blocks_are_listed_first_and_in_order():
    count, order = listed(torch.tensor([[False, True, True], [False, False, False], [True, False, True]]))
    assert count.tolist() == [[[2, 0, 2]]] and count.dtype == order.dtype == torch.int32
    assert order[0, 0, 0, :2].tolist() == [1, 2] and order[0, 0, 2, :2].tolist() == [0, 2]


def test_a_dense_mask_is_bounded_also_where_calls_cost_more():
    """Off the CPU, groups up to 4,096 tokens have one mask, 16 M entries; above, the largest is a branch's."""
    ids = torch.tensor([0] * 5000 + [1] * 10 + [2] * 20 + [0] * 30 + [1] * 5)
    layout = attention.make_layout([0, 5030, 5065], ids.to("meta"), dense_tokens=10**9)
    assert [tuple(part.mask.shape) for part in layout.parts] == [(5030, 5030), (35, 35)]
    limit = attention.DENSE_TOKENS_ELSEWHERE
    layout = attention.make_layout([0, 5030, 5065], ids, dense_tokens=limit)
    assert [part.mask if part.mask is None else tuple(part.mask.shape) for part in layout.parts] == [
        None, (10, 5010), (20, 5020), (35, 35),
    ]  # fmt: skip
    assert limit**2 <= 2**24


def test_auto_is_the_kernel_on_a_gpu_and_sdpa_on_a_cpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [attention.choose("auto", device) for device in (gpu, cpu)] == ["flex", "sdpa"]
    assert [attention.choose(way, gpu) for way in ("flex", "sdpa")] == ["flex", "sdpa"]


# ------------------------------------------------------------------------------------------------------ the kernel


def inputs(length: int, seed: int, heads=(4, 2), width: int = 16, grad: bool = False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads[0], heads[1], heads[1])
    return [torch.randn(1, n, length, width, generator=generator, dtype=dtype, requires_grad=grad) for n in sizes]


def reference(query, key, value, starts, ids, scale=None):
    """torch's SDPA, group by group, each under its dense mask; keys repeated for the heads that share them."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], attn_mask=attention.group_mask(ids[a:b]), scale=scale
        )
        for a, b in zip(starts, starts[1:])
    ]
    return torch.cat(parts, dim=2)


@pytest.fixture
def with_backward(monkeypatch, tmp_path):
    """The kernel under torch.compile, with its mathematics by torch instead of by Triton, and with its backward."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    flex.compiled.cache_clear()
    yield flex.compiled("aot_eager")
    flex.compiled.cache_clear()
    torch._dynamo.reset()


def random_row(num_tokens: int, seed: int):
    """About so many tokens, in groups of 29 branches, as of the published questions."""
    generator, drawn, made = torch.Generator().manual_seed(seed), [], 0

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    while made < num_tokens:
        drawn.append((number(2, 200), [number(1, 12) for _ in range(29)]))
        made += drawn[-1][0] + sum(drawn[-1][1])
    return row(drawn)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_the_operator_equals_sdpa_in_values_and_gradients(with_backward, heads):
    for seed, scale in ((0, None), (1, 0.3)):
        starts, ids = random_row(300, seed)
        mask = make_block_mask(starts, ids)
        made = inputs(mask.shape[-1], seed, heads, grad=True, dtype=torch.float64)
        real = [tensor[:, :, : len(ids)] for tensor in made]
        found, wanted = with_backward(*made, mask, scale)[:, :, : len(ids)], reference(*real, starts, ids, scale)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # torch's operator keeps its sums in float32
        direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        for mine, theirs in zip(*(torch.autograd.grad(side, made, direction) for side in (found, wanted))):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_ten_lengths_compile_once(with_backward):
    counters.clear()
    for number, tokens in enumerate((60, 300, 350, 400, 500, 600, 700, 800, 1000, 1200)):
        starts, ids = random_row(tokens, number)
        mask = make_block_mask(starts, ids)
        output = with_backward(*inputs(mask.shape[-1], number, grad=True), mask, None)
        output.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_recomputing_in_the_backward_gives_the_same(with_backward):
    """Block masks have raised CheckpointError under non-reentrant checkpointing; and nothing is compiled anew."""
    starts, ids = random_row(300, seed=4)
    mask = make_block_mask(starts, ids)
    plain, again = (inputs(mask.shape[-1], 4, grad=True) for _ in range(2))
    with_backward(*plain, mask, None).square().sum().backward()
    counters.clear()
    checkpoint(lambda *given: with_backward(*given, mask, None), *again, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, again))
    assert not counters["stats"].get("unique_graphs")


@pytest.mark.nightly
def test_the_compiled_kernel_reads_the_blocks_right(tmp_path, monkeypatch):
    """Compiled to C++, forward only: the one way on a CPU that goes by the table of blocks. Of several lengths."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    flex.compiled.cache_clear()
    with (
        torch.no_grad(),
        torch._inductor.config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False}),
    ):
        for tokens in (60, 900, 1700):
            starts, ids = random_row(tokens, seed=tokens)
            mask = make_block_mask(starts, ids)
            made = inputs(mask.shape[-1], tokens)
            found = flex.compiled()(*made, mask, None)[:, :, : len(ids)]
            torch.testing.assert_close(found, reference(*(t[:, :, : len(ids)] for t in made), starts, ids))
    flex.compiled.cache_clear()
    torch._dynamo.reset()


def test_queries_in_another_precision_follow_the_values():
    starts, ids = row([(3, [2, 2])])
    query, key, value = inputs(256, 0)
    made = flex.attend(query, key, value.bfloat16(), make_block_mask(starts, ids), None)
    assert made.dtype == torch.bfloat16
