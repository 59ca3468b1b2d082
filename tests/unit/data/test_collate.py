"""Packs against rows written by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.collate import Group, branch_length, collate
from proteingpt.protein import Protein, prefix_length


def protein(length: int, name: str = "1abc") -> Protein:
    return Protein(name, "A", "A" * length, np.zeros((length, 3, 3), np.float32))


# One residue takes 2 * (1 + 2) = 6 rows: structure and sequence, each with its BOS and EOS row.
TWO_QUESTIONS = Group("1abc_A", protein(1), [1, 80], [([10, 11], [20, 21, 22]), ([12], [23])])
ONE_QUESTION = Group("2xyz_B", protein(2, "2xyz"), [1], [([13, 14, 15], [24, 25])])


@pytest.fixture
def pack():
    return collate([TWO_QUESTIONS, ONE_QUESTION])


def test_tokens_by_hand(pack):
    """The last answer token is a target but never read."""
    first = [1, 80] + [0] * 6 + [10, 11, 20, 21] + [12]
    second = [1] + [0] * 8 + [13, 14, 15, 24]
    assert pack.token_ids.tolist() == first + second
    assert pack.group_starts == [0, 13, 26]
    assert pack.num_tokens == 26


def test_positions_go_on_from_the_end_of_the_prefix_on_each_branch(pack):
    first = [0, 1, 2, 3, 4, 5, 6, 7] + [8, 9, 10, 11] + [8]
    second = [0, 1, 2, 3, 4, 5, 6, 7, 8] + [9, 10, 11, 12]
    assert pack.position_ids.tolist() == first + second


def test_branch_ids_by_hand(pack):
    first = [0] * 8 + [1] * 4 + [2]
    second = [0] * 9 + [1] * 4
    assert pack.branch_ids.tolist() == first + second


def test_protein_rows_have_their_places_in_the_order_of_the_proteins(pack):
    assert pack.protein_positions.tolist() == [2, 3, 4, 5, 6, 7] + [14, 15, 16, 17, 18, 19, 20, 21]
    assert [p.id for p in pack.proteins] == ["1abc", "2xyz"] and pack.keys == ["1abc_A", "2xyz_B"]


def test_labels_are_the_answers_each_predicted_by_what_stands_before_it(pack):
    assert pack.targets.tolist() == [20, 21, 22] + [23] + [24, 25]
    # 11 (at 9) gives 20, 20 (at 10) gives 21, 21 gives 22; 12 (at 12) gives 23; 15 (at 13 + 12) gives 24, 24 gives 25.
    assert pack.predict_positions.tolist() == [9, 10, 11] + [12] + [24, 25]
    assert pack.weights.tolist() == [1.0] * 6
    assert pack.num_answer_tokens == 6


def test_types(pack):
    for name in ("token_ids", "position_ids", "branch_ids", "protein_positions", "predict_positions", "targets"):
        assert getattr(pack, name).dtype == torch.int64
    assert pack.weights.dtype == torch.float32


def test_without_a_question_the_last_row_of_the_protein_predicts_the_answer():
    """Stage 1 of the published code: [BOS] protein caption. Two branches share the position that predicts them."""
    pack = collate([ONE_QUESTION, Group("1abc_A", protein(1), [1], [([], [30, 31, 32]), ([], [33])])])
    begin = 13
    assert pack.token_ids.tolist()[begin:] == [1] + [0] * 6 + [30, 31]
    assert pack.branch_ids.tolist()[begin:] == [0] * 7 + [1, 1]
    assert pack.position_ids.tolist()[begin:] == list(range(7)) + [7, 8]
    assert pack.targets.tolist()[2:] == [30, 31, 32, 33]
    assert pack.predict_positions.tolist()[2:] == [begin + 6, begin + 7, begin + 8, begin + 6]


def test_an_answer_without_tokens_is_our_fault():
    with pytest.raises(AssertionError, match="1abc_A"):
        collate([Group("1abc_A", protein(1), [1], [([10], [])])])


def test_silenced_is_the_same_work_with_no_say_in_the_loss(pack):
    silent = pack.silenced()
    assert silent.num_answer_tokens == 0 and silent.weights.tolist() == [0.0] * 6
    for name, value in vars(pack).items():
        if name != "weights":
            assert getattr(silent, name) is value
    assert pack.weights.tolist() == [1.0] * 6


def test_to_moves_tensors_and_keeps_the_rest(pack):
    moved = pack.to("meta")
    assert all(v.device.type == "meta" for v in vars(moved).values() if isinstance(v, torch.Tensor))
    assert moved.group_starts == [0, 13, 26] and moved.keys == pack.keys and moved.proteins is pack.proteins


ids = st.lists(st.integers(1, 99), max_size=5)
branches = st.lists(st.tuples(ids, ids.filter(len)), min_size=1, max_size=4)
groups = st.lists(st.tuples(st.integers(1, 9), ids, branches), min_size=1, max_size=4)


@given(groups)
def test_a_group_is_as_long_as_the_plan_expects(drawn):
    made = [Group("k", protein(length), prefix, turns) for length, prefix, turns in drawn]
    lengths = [
        len(prefix) + prefix_length(length) + sum(branch_length(len(asked), len(answer)) for asked, answer in turns)
        for length, prefix, turns in drawn
    ]
    pack = collate(made)
    assert pack.num_tokens == sum(lengths)
    assert np.diff(pack.group_starts).tolist() == lengths
    assert len(pack.protein_positions) == sum(2 * (len(g.protein) + 2) for g in made)
    assert pack.num_answer_tokens == sum(len(a) for g in made for _, a in g.branches)


@given(groups)
def test_read_along_one_branch_a_pack_is_the_question_on_its_own(drawn):
    """The definition: what a branch sees, in order, is prefix, question and answer, at positions 0, 1, 2, ..., and each
    answer token is predicted by the token just before it."""
    made = [Group("k", protein(length), prefix, turns) for length, prefix, turns in drawn]
    pack = collate(made)
    tokens, positions, owner = pack.token_ids.tolist(), pack.position_ids.tolist(), pack.branch_ids.tolist()
    predicted = iter(zip(pack.predict_positions.tolist(), pack.targets.tolist()))
    for begin, end, group in zip(pack.group_starts, pack.group_starts[1:], made):
        rows = [0] * (2 * (len(group.protein) + 2))
        for number, (question, answer) in enumerate(group.branches, start=1):
            seen = [i for i in range(begin, end) if owner[i] in (0, number)]
            whole = group.prefix_ids + rows + question + answer
            assert [tokens[i] for i in seen] == whole[:-1]
            assert [positions[i] for i in seen] == list(range(len(whole) - 1))
            for offset in range(len(whole) - len(answer), len(whole)):
                assert next(predicted) == (seen[offset - 1], whole[offset])
    assert next(predicted, None) is None


@given(groups, groups)
def test_a_group_reads_the_same_whatever_else_is_in_the_pack(before, after):
    one, other = ([Group("k", protein(n), prefix, turns) for n, prefix, turns in drawn] for drawn in (before, after))
    alone, together = collate(other), collate(one + other)
    begin = together.group_starts[len(one)]
    for name in ("token_ids", "position_ids", "branch_ids"):
        assert getattr(together, name).tolist()[begin:] == getattr(alone, name).tolist()
    count = len(alone.targets)
    assert together.targets.tolist()[-count:] == alone.targets.tolist()
    assert [p - begin for p in together.predict_positions.tolist()[-count:]] == alone.predict_positions.tolist()
