"""The loop's small decisions, by hand. What it does over ranks is in tests/numerics and tests/faults."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from proteingpt.config import RunConfig, from_dict, read_recipe
from proteingpt.data.collate import Group, collate
from proteingpt.data.loader import Work
from proteingpt.protein import Protein
from proteingpt.training.loop import Agreed, Local, clean_rows, is_out_of_memory, pack_fill, read_by, silence


def protein(name: str, length: int) -> Protein:
    return Protein(name, "A", "A" * length, np.zeros((length, 3, 3), np.float32))


@pytest.fixture
def pack():
    """Two proteins with two and one answers, of 2, 1 and 3 tokens."""
    first = Group("one", protein("one", 3), [1, 2], [([5, 6], [7, 8]), ([5], [9])])
    second = Group("two", protein("two", 2), [1, 2], [([], [4, 4, 4])])
    return collate([first, second])


@pytest.mark.parametrize(
    "keys, weights",
    [
        ((), [1, 1, 1, 1, 1, 1]),
        (("one",), [0, 0, 0, 1, 1, 1]),
        (("two",), [1, 1, 1, 0, 0, 0]),
        (("one", "two"), [0] * 6),
        (("another",), [1] * 6),
    ],
)
def test_quarantined_samples_lose_the_weight_of_their_answers_and_no_other(pack, keys, weights):
    """Also where a first answer token is predicted from the end of the prefix, which is the group's own."""
    silent = silence(pack, frozenset(keys))
    assert silent.weights.tolist() == weights and silent.keys == pack.keys
    assert silent.weights.dtype == pack.weights.dtype
    assert torch.equal(silent.token_ids, pack.token_ids) and pack.weights.tolist() == [1] * 6


def test_their_rows_become_zeros_since_no_weight_silences_a_nan():
    good, bad = torch.ones(4, 2), torch.full((3, 2), math.nan)
    structure, sequence = clean_rows(([good, bad], [good, good]), ["one", "two"], frozenset(["two"]))
    assert structure[0] is good and structure[1].shape == bad.shape and not structure[1].any()
    assert sequence[0] is good and not sequence[1].any()
    rows = ([good, bad], [good, good])
    assert clean_rows(rows, ["one", "two"], frozenset(["three"])) is rows


def test_the_samples_of_a_bad_forward_are_named_and_no_others(pack):
    other = collate([Group("three", protein("three", 2), [1], [([2], [3])])])
    for losses, norms, named in (
        ([1.0, 2.0], [0.1, 0.1], []),
        ([math.nan, 2.0], [math.nan, 0.1], ["one", "two"]),
        ([1.0, math.inf], [0.1, 0.1], ["three"]),
        ([1.0, 2.0], [0.1, math.nan], ["three"]),
    ):
        assert Local([pack, other], losses, norms).bad_samples() == named


def test_what_a_rank_repeats_in_silence_it_has_not_read(pack):
    """Twenty-eight tokens, counted by hand: two before each protein, its L + 2 rows of two encoders, then each question
    with its answer but for the answer's last token, which nothing follows."""
    num_tokens = (2 + 10 + 3 + 1) + (2 + 8 + 2)
    assert pack.num_tokens == num_tokens
    assert read_by(Work([pack, pack.silenced()], True, 6, 3, 2)) == (num_tokens, 6)
    assert read_by(Work([pack.silenced()], True, 6, 3, 2)) == (0, 0)


def test_packs_are_as_full_as_their_tokens_fill_the_room_of_the_whole_step(pack):
    agreed = Agreed(1.0, num_tokens=900, num_bad=0, num_out_of_memory=0, num_failed=0)
    item = Work([pack], True, 6, 3, num_packs=3)
    stage = from_dict(RunConfig, read_recipe("fast-align")).align
    assert pack_fill(agreed, item, replace(stage, tokens_per_pack=400)) == pytest.approx(900 / 1200)
    assert (
        pack_fill(agreed, item, replace(stage, tokens_per_step=None, samples_per_step=64, tokens_per_pack=None)) is None
    )


def raised(action) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def test_what_is_out_of_memory():
    """The allocators' own words: torch's on a CPU, Python's, and the class that torch has for GPUs."""
    assert is_out_of_memory(raised(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert is_out_of_memory(raised(lambda: bytearray(2**62)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(raised(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not is_out_of_memory(KeyError("memory"))
