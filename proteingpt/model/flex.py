"""Shared-prefix attention by FlexAttention: one compiled kernel over the whole row, for GPUs.

A token sees two stretches of the row, none behind itself: its group's prefix, and its own branch. So the rule is three
numbers a token, and which blocks of the T x T square have anything to compute is a small table, made once for a pack.
Chosen: rows padded to whole blocks and shapes dynamic, so that one compilation serves every length. Given up: torch has
no FlexAttention backward pass on a CPU; there the same rule is a dense T x T mask, for tests.

Legend: T tokens, a multiple of BLOCK; N = T / BLOCK; H query heads; D head width.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's own; kernels for a GPU are fastest, and least surprising, on whole blocks
SHORTEST = 2 * BLOCK  # below, FlexAttention takes its kernels for decoding, and dynamo makes a special case of N = 1
ENTRIES_AT_ONCE = 2**24  # of the T x T square, while its blocks are counted: never all of it


@dataclass(frozen=True)
class Sight:
    """Token q sees k <= q with prefix_begin[q] <= k < prefix_end[q] or branch_begin[q] <= k. int32 (T,) each."""

    prefix_begin: torch.Tensor
    prefix_end: torch.Tensor
    branch_begin: torch.Tensor


def padded_length(num_tokens: int) -> int:
    """Tokens of the row in whole blocks."""
    return max(SHORTEST, -(-num_tokens // BLOCK) * BLOCK)


def make_sight(group_starts: list[int], branch_ids: torch.Tensor, length: int) -> Sight:
    """group_starts, branch_ids (T',): as in a Pack. length: T; what is behind T' is a group of its own, which nobody
    else sees. Waits for no device: a GPU goes on with what it was given before."""
    starts = torch.tensor([*group_starts, length])
    sizes = starts.diff()
    device = branch_ids.device
    group = torch.arange(len(sizes)).repeat_interleave(sizes).to(device, non_blocking=True)
    begin = starts[:-1].to(device, non_blocking=True)[group]
    branch = F.pad(branch_ids, (0, length - len(branch_ids)))
    place = torch.arange(length, device=device)
    prefix_tokens = torch.zeros(len(sizes), dtype=torch.int64, device=device).index_add_(0, group, (branch == 0).long())
    is_first = (place == begin) | (branch != branch.roll(1))
    branch_begin = torch.where(is_first, place, 0).cummax(0).values
    return Sight(begin.int(), (begin + prefix_tokens[group]).int(), branch_begin.int())


def rule(sight: Sight):
    """The mask as FlexAttention asks for it: f(batch, head, query position, key position) -> bool."""
    prefix_begin, prefix_end, branch_begin = sight.prefix_begin, sight.prefix_end, sight.branch_begin

    def sees(batch, head, q, k):
        on_prefix = (k >= prefix_begin[q]) & (k < prefix_end[q])
        return (k <= q) & (on_prefix | (k >= branch_begin[q]))

    return sees


def dense(sees, begin: int, end: int, length: int, device) -> torch.Tensor:
    """bool (end - begin, length): what tokens begin .. end - 1 see."""
    return sees(0, 0, torch.arange(begin, end, device=device)[:, None], torch.arange(length, device=device)[None])


def count_blocks(sees, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(any, all): bool (N, N): whether a block of queries sees something, or everything, of a block of keys."""
    rows = max(BLOCK, ENTRIES_AT_ONCE // length // BLOCK * BLOCK)
    some, whole = [], []
    for begin in range(0, length, rows):
        seen = dense(sees, begin, min(begin + rows, length), length, device)
        blocks = seen.view(-1, BLOCK, length // BLOCK, BLOCK)
        some.append(blocks.any(3).any(1))
        whole.append(blocks.all(3).all(1))
    return torch.cat(some), torch.cat(whole)


def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (N, N) -> how many blocks each row has, int32 (1, 1, N), and which, first of all, int32 (1, 1, N, N)."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def make_block_mask(group_starts: list[int], branch_ids: torch.Tensor) -> BlockMask:
    """For a row padded to `padded_length`. Blocks seen whole are listed apart: the kernel asks no rule there."""
    length, device = padded_length(len(branch_ids)), branch_ids.device
    sees = rule(make_sight(group_starts, branch_ids, length))
    some, whole = count_blocks(sees, length, device)
    partly, wholly = listed(some & ~whole), listed(whole)
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def attend(query, key, value, block_mask: BlockMask, scale: float | None) -> torch.Tensor:
    """query (1, H, T, D), key and value (1, H or fewer, T, D) -> (1, H, T, D)."""
    # Rotary positions or norms may leave them in another precision than the values, which SDPA and the kernel refuse.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        length = query.shape[2]
        mask = dense(block_mask.mask_mod, 0, length, length, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return compiled()(query, key, value, block_mask, scale)


def kernel(query, key, value, block_mask: BlockMask, scale: float | None) -> torch.Tensor:
    torch._check(query.shape[2] % BLOCK == 0)  # known beforehand, the kernel checks no bounds
    return flex_attention(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@functools.cache
def compiled(backend: str = "inductor"):
    """The kernel, compiled once for all lengths. An error where it cannot be: uncompiled, it would be T x T."""
    return torch.compile(kernel, backend=backend, dynamic=True, fullgraph=True)
