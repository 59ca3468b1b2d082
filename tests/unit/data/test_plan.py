"""The plan: what it promises for any data set (hypothesis), and stored orders, so that none ever changes silently."""

import dataclasses
import hashlib
import inspect
import itertools
import math
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proteingpt.config import RunConfig, from_dict, read_recipe
from proteingpt.data.packing import best_fit
from proteingpt.data.plan import (
    QUESTIONS_PER_WINDOW,
    VERSION,
    Cut,
    PlanError,
    Samples,
    Totals,
    hash_keys,
    join,
    num_steps,
    packing_rate,
    plan_window,
    survey,
    windows,
    within_reach,
)


def keys_of(number: int) -> list[str]:
    return [f"{n}abc_A" for n in range(number)]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Shards by number, as Samples, and the number of each of their samples in the whole."""

    shards: list[Samples]
    members: list[np.ndarray]

    @property
    def whole(self) -> Samples:
        """In the order in which samples were given."""
        order = np.argsort(np.concatenate(self.members))
        return take(join(self.shards), order)

    @property
    def shard_of(self) -> dict[int, int]:
        return {int(sample): shard for shard, members in enumerate(self.members) for sample in members}


def take(samples: Samples, chosen) -> Samples:
    chosen = np.asarray(chosen, np.int64)
    bounds = samples.first_turn
    costs = [samples.turn_tokens[bounds[s] : bounds[s + 1]] for s in chosen]
    first_turn = np.concatenate(([0], np.cumsum([len(c) for c in costs], dtype=np.int64)))
    flat = np.concatenate([np.zeros(0, np.int64), *costs])
    return Samples(samples.ids[chosen], samples.prefix_tokens[chosen], first_turn, flat, samples.weights[chosen])


def samples_of(costs, prefixes=None, shards=None, keys=None, weights=None) -> DataSet:
    """costs: of each sample the tokens of its questions. By default a prefix is 10 tokens, all lie in one shard and are
    seen once."""
    whole = Samples(
        ids=hash_keys(keys or keys_of(len(costs))),
        prefix_tokens=np.array(prefixes or [10] * len(costs), np.int64),
        first_turn=np.concatenate(([0], np.cumsum([len(turns) for turns in costs], dtype=np.int64))),
        turn_tokens=np.array([cost for turns in costs for cost in turns], np.int64),
        weights=np.array(weights or [1.0] * len(costs)),
    )
    shards = np.array(shards or [0] * len(costs), np.int64)
    members = [np.flatnonzero(shards == shard) for shard in range(int(shards.max()) + 1)]
    return DataSet([take(whole, chosen) for chosen in members], members)


def totals_of(data: DataSet, cut: Cut) -> Totals:
    columns = (np.array(column, np.int64) for column in zip(*(survey(shard, cut) for shard in data.shards)))
    return Totals(*columns, packing_rate(data.whole, cut))


@dataclasses.dataclass(frozen=True)
class Epoch:
    """All windows of an epoch, one after the other, with the samples numbered as in the whole."""

    windows: list
    members: list[np.ndarray]  # of each window

    @property
    def num_steps(self) -> int:
        return sum(window.num_steps for window in self.windows)

    @property
    def pack_tokens(self) -> np.ndarray:
        return np.concatenate([window.pack_tokens for window in self.windows])

    def find(self, number: int):
        for window, members in zip(self.windows, self.members):
            if number < window.num_steps:
                return window, members, number
            number -= window.num_steps
        raise IndexError(number)

    def step(self, number: int):
        window, members, number = self.find(number)
        return [[(int(members[s]), turns) for s, turns in pack] for pack in window.step(number)]

    def step_tokens(self, number: int):
        window, _, number = self.find(number)
        return window.step_tokens(number)


def plan_epoch(data: DataSet, cut: Cut, epoch: int) -> Epoch:
    made, members = [], []
    for window in windows(totals_of(data, cut), cut, epoch):
        made.append(plan_window(join([data.shards[h] for h in window.shards]), cut, epoch, window.num_steps))
        members.append(np.concatenate([data.members[h] for h in window.shards]))
    return Epoch(made, members)


def counted(turns, **more) -> DataSet:
    """Samples of which only the number of questions matters: each costs one token."""
    return samples_of([[1] * count for count in turns], **more)


def cut_of(seed=42, per_group=3, per_step=5, **more) -> Cut:
    return Cut(seed=seed, questions_per_group=per_group, samples_per_step=per_step, **more)


def plan(turns, epoch=0, keys=None, **cut):
    return plan_epoch(counted(turns, keys=keys), cut_of(**cut), epoch)


def steps_of(made) -> list[list[list[tuple[int, tuple[int, ...]]]]]:
    """Steps of packs of groups."""
    return [made.step(number) for number in range(made.num_steps)]


def groups_of(made) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Steps of groups."""
    return [list(itertools.chain(*step)) for step in steps_of(made)]


def asked_in(made) -> Counter:
    return Counter((sample, turn) for step in groups_of(made) for sample, turns in step for turn in turns)


def named(made, keys):
    return [[[(keys[sample], turns) for sample, turns in pack] for pack in step] for step in steps_of(made)]


def size(groups) -> int:
    return sum(len(turns) for _, turns in groups)


def tokens_in(data: DataSet, group) -> int:
    """Of a group, from the sample's own lists."""
    (sample, turns), samples = group, data.whole
    costs = samples.turn_tokens[samples.first_turn[sample] : samples.first_turn[sample + 1]]
    return int(samples.prefix_tokens[sample]) + sum(int(costs[turn]) for turn in turns)


turn_counts = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any)
seeds = st.integers(0, 2**32)
cuts = st.tuples(st.integers(1, 14), st.integers(0, 40)).map(
    lambda cut: {"per_group": cut[0], "per_step": cut[0] + cut[1]}
)


@st.composite
def data_sets(draw) -> DataSet:
    """Up to 20 samples of up to 10 questions in up to 6 shards, with prefixes and questions of unlike lengths."""
    costs = draw(st.lists(st.lists(st.integers(1, 40), max_size=10), min_size=1, max_size=20).filter(any))
    prefixes = draw(st.lists(st.integers(1, 60), min_size=len(costs), max_size=len(costs)))
    shards = draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))
    return samples_of(costs, prefixes, sorted(shards))


def longest_question(data: DataSet) -> int:
    """Tokens of the longest question behind its prefix: the least a pack must hold."""
    samples = data.whole
    sample = np.repeat(np.arange(len(samples.ids)), samples.num_turns)
    return int((samples.prefix_tokens[sample] + samples.turn_tokens).max())


@st.composite
def planned(draw):
    """(samples, a cut that fits them), by questions or by tokens."""
    samples = draw(data_sets())
    capacity = longest_question(samples) + draw(st.integers(0, 200))
    per_group = draw(st.integers(1, 12))
    by_tokens = draw(st.booleans())
    return samples, Cut(
        seed=draw(seeds),
        questions_per_group=per_group,
        samples_per_step=None if by_tokens else per_group + draw(st.integers(0, 40)),
        tokens_per_step=capacity + draw(st.integers(0, 600)) if by_tokens else None,
        tokens_per_pack=capacity if by_tokens or draw(st.booleans()) else None,
        questions_per_protein=draw(st.none() | st.integers(1, 12)),
        shards_per_window=draw(st.none() | st.integers(1, 6)),
    )


epochs = st.integers(0, 50)


# ----------------------------------------------------------------------------------- what holds for either kind of step


@given(planned(), epochs)
def test_every_question_is_asked_exactly_once_in_an_epoch(given_plan, epoch):
    samples, cut = given_plan
    made = plan_epoch(samples, dataclasses.replace(cut, questions_per_protein=None), epoch)
    counts = samples.whole.num_turns.tolist()
    assert asked_in(made) == Counter((sample, turn) for sample, count in enumerate(counts) for turn in range(count))


@given(planned(), epochs)
def test_a_drawn_epoch_asks_each_protein_as_many_different_questions_as_it_may(given_plan, epoch):
    samples, cut = given_plan
    asked = asked_in(plan_epoch(samples, cut, epoch))
    assert set(asked.values()) == {1}
    limit = cut.questions_per_protein or 10**9
    wanted = {sample: min(count, limit) for sample, count in enumerate(samples.whole.num_turns.tolist()) if count}
    assert Counter(sample for sample, _ in asked) == wanted


@given(planned(), epochs)
def test_no_pack_is_over_its_bound_and_tokens_are_those_of_its_groups(given_plan, epoch):
    samples, cut = given_plan
    made = plan_epoch(samples, cut, epoch)
    for number, step in enumerate(steps_of(made)):
        tokens = [sum(tokens_in(samples, group) for group in pack) for pack in step]
        assert made.step_tokens(number) == tokens
        if cut.tokens_per_pack is None:
            assert all(len(pack) == 1 for pack in step)
        else:
            assert max(tokens) <= cut.tokens_per_pack
    assert made.pack_tokens.tolist() == [t for n in range(made.num_steps) for t in made.step_tokens(n)]


@given(planned())
def test_epochs_have_the_same_number_of_steps_none_of_them_empty(given_plan):
    """Nor is a pack: a step without one would divide by zero answer tokens."""
    samples, cut = given_plan
    for epoch in range(4):
        made = plan_epoch(samples, cut, epoch)
        assert made.num_steps == num_steps(totals_of(samples, cut), cut)
        assert all(step and all(step) for step in steps_of(made))


@given(planned(), epochs)
def test_groups_are_of_one_protein_and_not_over_their_size(given_plan, epoch):
    samples, cut = given_plan
    for step in groups_of(plan_epoch(samples, cut, epoch)):
        assert all(1 <= len(turns) <= cut.questions_per_group for _, turns in step)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 12), st.booleans(), epochs)
def test_no_more_shards_are_open_than_the_window_allows(per_window, num_windows, per_step, by_tokens, epoch):
    """Walking the steps in order, a shard is open from its first use to its last. Shards of four samples of three
    questions: a window holds a step at least."""
    num_shards = per_window * num_windows
    samples = counted([3] * 4 * num_shards, shards=[number // 4 for number in range(4 * num_shards)])
    size = {"tokens_per_step": per_step * 4, "tokens_per_pack": 13} if by_tokens else {"samples_per_step": per_step}
    steps = groups_of(plan_epoch(samples, Cut(7, 3, shards_per_window=per_window, **size), epoch))
    used = defaultdict(list)
    for number, groups in enumerate(steps):
        for sample, _ in groups:
            used[samples.shard_of[sample]].append(number)
    assert len(used) == num_shards
    for number in range(len(steps)):
        assert sum(uses[0] <= number <= uses[-1] for uses in used.values()) <= per_window


totals_lists = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 300)), min_size=1, max_size=40)


@given(totals_lists, cuts, st.none() | st.integers(1, 9), seeds, epochs)
def test_windows_part_shards_and_steps_and_none_has_more_steps_than_questions(columns, cut, per_window, seed, epoch):
    totals = Totals(*(np.array(column, np.int64) for column in zip(*columns)))
    assume(totals.questions.sum() and totals.sizes.sum())
    cut = cut_of(seed=seed, shards_per_window=per_window, **cut)
    made = windows(totals, cut, epoch)
    assert sorted(shard for window in made for shard in window.shards) == list(range(len(columns)))
    bounds = [0, *itertools.accumulate(window.num_steps for window in made)]
    assert [window.first_step for window in made] == bounds[:-1] and bounds[-1] == num_steps(totals, cut)
    for window in made:
        assert 1 <= window.num_steps <= sum(totals.questions[list(window.shards)])


def test_windows_by_hand():
    """Four shards of 3, 1, 4 and 4 steps of ten questions, in windows of one: the step counts of each, whatever the
    order; a window of half a step is joined to the next one, or to the last."""
    totals = Totals(np.array([30, 10, 40, 40]) * 1024, np.array([30, 10, 40, 40]))
    for epoch in range(5):
        made = windows(totals, cut_of(per_step=10, shards_per_window=1), epoch)
        steps = sorted((window.shards, window.num_steps) for window in made)
        assert steps == [((0,), 3), ((1,), 1), ((2,), 4), ((3,), 4)]
    totals, seen = Totals(np.array([5, 15, 20]) * 1024, np.array([5, 15, 20])), set()
    by_order = {
        (0, 1, 2): [((0, 1), 2), ((2,), 2)],
        (0, 2, 1): [((0, 2), 2), ((1,), 2)],
        (1, 0, 2): [((1,), 1), ((0,), 1), ((2,), 2)],
        (1, 2, 0): [((1,), 1), ((2,), 2), ((0,), 1)],
        (2, 0, 1): [((2,), 2), ((0, 1), 2)],
        (2, 1, 0): [((2,), 2), ((1,), 1), ((0,), 1)],
    }
    for epoch in range(60):
        made = windows(totals, cut_of(per_step=10, shards_per_window=1), epoch)
        order = tuple(shard for window in made for shard in window.shards)
        assert [(window.shards, window.num_steps) for window in made] == by_order[order]
        seen.add(order)
    assert seen == set(by_order)


def test_windows_hold_four_million_questions_where_the_recipe_does_not_say():
    """So a plan of any size needs the memory of one window."""
    each = QUESTIONS_PER_WINDOW // 4
    totals = Totals(np.full(10, each * 1024), np.full(10, each))
    made = windows(totals, cut_of(per_step=1000), 0)
    assert [len(window.shards) for window in made] == [4, 4, 2]
    assert len(windows(Totals(totals.sizes[:4], totals.questions[:4]), cut_of(per_step=1000), 0)) == 1


stretches = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=12)


@given(stretches, st.data())
def test_no_stretch_is_given_more_parts_than_it_has_items(rows, data):
    """And nothing is moved where nothing must be."""
    items, wanted = (list(column) for column in zip(*rows))
    assume(sum(items) and sum(wanted))
    parts = data.draw(st.integers(1, sum(items)))
    through = list(itertools.accumulate(wanted))
    ends = np.array([size * parts // through[-1] for size in through])
    moved = within_reach(ends, np.cumsum(items), parts).tolist()
    given_parts = np.diff([0, *moved]).tolist()
    assert moved[-1] == parts and all(0 <= count <= most for count, most in zip(given_parts, items))
    if all(count <= most for count, most in zip(np.diff([0, *ends]), items)):
        assert moved == ends.tolist()


@pytest.mark.parametrize("epoch", range(5))
def test_no_step_reaches_over_the_border_of_two_windows(epoch):
    """Two shards of five questions, a window each: three steps of questions, of which a window has one or two; and four
    packs of two or three questions, each a step."""
    samples = counted([1] * 10, shards=[0] * 5 + [1] * 5)
    by_questions = cut_of(per_group=1, per_step=4, tokens_per_pack=100, shards_per_window=1)
    by_tokens = Cut(42, 1, tokens_per_step=36, tokens_per_pack=35, shards_per_window=1)
    for cut, sizes in ((by_questions, [[5], [2, 3]]), (by_tokens, [[2, 3], [2, 3]])):
        steps = groups_of(plan_epoch(samples, cut, epoch))
        shards = [{samples.shard_of[sample] for sample, _ in step} for step in steps]
        assert all(len(used) == 1 for used in shards)
        made = [sorted(len(step) for step, used in zip(steps, shards) if used == {shard}) for shard in (0, 1)]
        assert sorted(made, key=len) == sizes


@given(planned(), epochs)
def test_windows_change_the_order_only(given_plan, epoch):
    samples, cut = given_plan
    made, whole = (plan_epoch(samples, dataclasses.replace(cut, shards_per_window=w), epoch) for w in (1, None))
    assert asked_in(made) == asked_in(whole) and made.num_steps == whole.num_steps


@given(planned(), epochs, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_how_shards_list_the_samples(given_plan, epoch, random):
    """Without windows, which follow the shards by their nature."""
    samples, cut = given_plan
    cut = dataclasses.replace(cut, shards_per_window=None)
    whole = samples.whole
    bounds = whole.first_turn.tolist()
    costs = [whole.turn_tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])]
    keys, order = keys_of(len(costs)), list(range(len(costs)))
    random.shuffle(order)
    moved = [keys[i] for i in order]
    shuffled = samples_of([costs[i] for i in order], [int(whole.prefix_tokens[i]) for i in order], keys=moved)
    before, after = plan_epoch(samples, cut, epoch), plan_epoch(shuffled, cut, epoch)
    assert named(before, keys) == named(after, moved)


def test_nothing_that_makes_an_epoch_knows_of_devices():
    """So its packs and steps are the same for any number of ranks and any speeds."""
    assert list(inspect.signature(windows).parameters) == ["totals", "cut", "epoch"]
    assert list(inspect.signature(plan_window).parameters) == ["samples", "cut", "epoch", "steps"]
    assert {field.name for kind in (Samples, Totals, Cut) for field in dataclasses.fields(kind)} == {
        "ids", "prefix_tokens", "first_turn", "turn_tokens", "weights", "sizes", "questions", "packs_per_token", "seed",
        "questions_per_group", "samples_per_step", "tokens_per_step", "tokens_per_pack", "questions_per_protein",
        "shards_per_window",
    }  # fmt: skip


@given(st.integers(1, 30), st.integers(2, 12), seeds)
def test_a_question_that_fits_no_pack_is_refused_before_any_epoch(prefix, num_questions, seed):
    """Also one that this epoch does not draw: or a run would stop days later."""
    costs = [[1] * num_questions for _ in range(5)]
    costs[3][num_questions // 2] = 50
    cut = Cut(seed, questions_per_group=2, tokens_per_step=400, tokens_per_pack=prefix + 49, questions_per_protein=1)
    with pytest.raises(PlanError, match=f"tokens_per_pack is {prefix + 49}, .*{prefix} tokens and .* 50"):
        plan_epoch(samples_of(costs, [prefix] * 5), cut, 0)
    plan_epoch(samples_of(costs, [prefix] * 5), dataclasses.replace(cut, tokens_per_pack=prefix + 50), 0)


def test_a_split_without_questions_is_refused():
    for cut in (cut_of(), Cut(1, 3, tokens_per_step=100, tokens_per_pack=50)):
        with pytest.raises(PlanError, match="no question"):
            plan_epoch(counted([0, 0, 0]), cut, 0)


# -------------------------------------------------------------------------------------------- questions_per_protein


def test_another_draw_each_epoch_and_in_the_end_every_question_is_asked():
    """Ten questions, three an epoch: one is left out of 60 epochs with probability 0.7^60 = 5e-10."""
    turns = [10] * 8
    draws = [set(asked_in(plan(turns, epoch, questions_per_protein=3))) for epoch in range(60)]
    assert set.union(*draws) == {(sample, turn) for sample in range(8) for turn in range(10)}
    for one, other in itertools.pairwise(draws):
        # Two draws of 3 of 10 share 0.9 on average.
        assert len(one & other) / 8 < 2


def test_a_drawn_question_is_drawn_as_often_as_any():
    """Chi-squared over 1,000 epochs of one question of ten: 9 degrees of freedom, 27.9 is the 0.1 % point."""
    hits = Counter()
    for epoch in range(1000):
        hits.update(turn for _, turn in asked_in(plan([10], epoch, questions_per_protein=1)))
    assert sum((hits[turn] - 100) ** 2 / 100 for turn in range(10)) < 27.9


# ----------------------------------------------------------------------------------------------- steps of questions


@given(turn_counts, cuts, seeds)
def test_without_a_packs_bound_groups_are_as_few_as_can_be(turns, cut, seed):
    groups = itertools.chain(*groups_of(plan(turns, seed=seed, **cut)))
    wanted = {s: -(-count // cut["per_group"]) for s, count in enumerate(turns) if count}
    assert Counter(sample for sample, _ in groups) == wanted


@given(turn_counts, cuts, seeds)
def test_each_step_is_within_less_than_a_group_of_the_even_share(turns, cut, seed):
    made = plan(turns, seed=seed, **cut)
    share, largest = sum(turns) / made.num_steps, min(cut["per_group"], max(turns))
    assert all(abs(size(step) - share) < largest for step in groups_of(made))


@given(turn_counts, st.integers(1, 40))
def test_single_questions_make_steps_that_differ_by_one_at_most_and_never_exceed_the_recipe(turns, per_step):
    sizes = [size(step) for step in groups_of(plan(turns, per_group=1, per_step=per_step))]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= per_step
    assert len(sizes) == -(-sum(turns) // per_step)


@given(planned(), epochs)
def test_packs_of_questions_do_not_change_what_is_in_a_step(given_plan, epoch):
    samples, cut = given_plan
    assume(cut.samples_per_step is not None)
    # A bound that splits no group, so that only the packing differs.
    packed = dataclasses.replace(cut, tokens_per_pack=10**4)
    unpacked = dataclasses.replace(cut, tokens_per_pack=None)
    one, other = (groups_of(plan_epoch(samples, c, epoch)) for c in (packed, unpacked))
    assert [sorted(step) for step in one] == [sorted(step) for step in other]


def test_the_number_of_steps_by_hand():
    def steps(turns, per_group, per_step, **more):
        cut = cut_of(per_group=per_group, per_step=per_step, **more)
        return num_steps(totals_of(counted(turns), cut), cut)

    assert steps([30, 30, 30], 1, 4) == 23  # 90 / 4, rounded up
    assert steps([30, 30, 30], 30, 30) == 3
    assert steps([1, 1, 1], 30, 4) == 1
    assert steps([8] * 480, 8, 128) == 30  # the demo's stage 2
    assert steps([4, 1], 4, 4) == 2
    assert steps([1, 1], 1, 1) == 2
    assert steps([30, 30, 2], 10, 10, questions_per_protein=5) == 2  # 5 + 5 + 2 = 12 of 10


# -------------------------------------------------------------------------------------------------- steps of tokens


def test_the_number_of_token_steps_by_hand():
    def steps(costs, **cut):
        return num_steps(totals_of(samples_of(costs), Cut(1, **cut)), Cut(1, **cut))

    # Four samples of 10 + 3 x 30 tokens: 400 in steps of 200.
    assert steps([[30] * 3] * 4, questions_per_group=3, tokens_per_step=200, tokens_per_pack=100) == 2
    # Each question for itself reads its prefix: 12 x 40, of which a pack takes two: 6 packs, two a step.
    assert steps([[30] * 3] * 4, questions_per_group=1, tokens_per_step=200, tokens_per_pack=100) == 3
    # Two of three questions: 4 x 70, each a pack.
    assert steps([[30] * 3] * 4, questions_per_group=3, tokens_per_step=200, tokens_per_pack=100,
                 questions_per_protein=2) == 2  # fmt: skip
    # 3 steps' worth of one question each, but there are only two questions.
    assert steps([[60], [60]], questions_per_group=1, tokens_per_step=60, tokens_per_pack=100) == 2


def pdb_like(num_proteins: int, questions=(15, 46), num_questions: int = 29) -> DataSet:
    """Lengths as in the PDB sample: median 230, clipped at 20 and 1,500; 29 questions of 15 to 45 tokens; a prompt of
    12 tokens before the protein's 2 (L + 2) rows."""
    rng = np.random.default_rng((5, num_proteins))
    residues = np.clip(np.exp(np.log(230) + 0.55 * rng.standard_normal(num_proteins)), 20, 1500).astype(np.int64)
    samples = Samples(
        ids=rng.integers(0, 2**63, num_proteins).astype(np.uint64),
        prefix_tokens=2 * (residues + 2) + 12,
        first_turn=np.arange(num_proteins + 1) * num_questions,
        turn_tokens=rng.integers(*questions, num_proteins * num_questions),
        weights=np.ones(num_proteins),
    )
    return DataSet([samples], [np.arange(num_proteins)])


# {(questions a group at most, tokens of a pack): (fill, tokens over those of groups that are never split, packs over
# those of best fit alone)}
FILLS = {
    (1, 4096): (0.995, 1.0, 1.0),
    (4, 4096): (0.993, 1.0, 1.0),
    (8, 4096): (0.994, 1.004, 0.997),
    (30, 4096): (0.993, 1.018, 0.952),
    (30, 8192): (0.994, 1.007, 0.976),
    (30, 16384): (0.997, 1.003, 0.987),
}


def fill_of(made, capacity: int) -> float:
    return float(made.pack_tokens.mean()) / capacity


def packs_of_best_fit(data: DataSet, per_group: int, capacity: int) -> tuple[int, int]:
    """(packs, tokens) of whole groups, packed by best fit 4,096 at a time, straight from the lists."""
    samples = data.whole
    costs = samples.turn_tokens.reshape(len(samples.ids), -1)
    sizes = []
    for prefix, row in zip(samples.prefix_tokens.tolist(), costs.tolist()):
        sizes += [prefix + sum(row[n : n + per_group]) for n in range(0, len(row), per_group)]
    chunks = [sizes[n : n + 4096] for n in range(0, len(sizes), 4096)]
    return sum(max(best_fit(chunk, capacity)) + 1 for chunk in chunks), sum(sizes)


@pytest.mark.parametrize("per_group, tokens", FILLS)
def test_packs_are_full_to_99_percent_at_pdb_lengths(per_group, tokens):
    """Share of a pack's bound that is tokens; a pack itself has no padding. Groups of at most 4 questions do it whole;
    whole proteins (30), which best fit alone packs to 93 % of 4,096, are split where that fills a hole: the prefixes
    read twice are 2 % more tokens, for 5 % fewer packs."""
    data = pdb_like(8000)
    made = plan_epoch(data, Cut(42, per_group, tokens_per_step=32 * tokens, tokens_per_pack=tokens), 0)
    plain_packs, plain_tokens = packs_of_best_fit(data, per_group, tokens)
    fill, more_tokens, fewer_packs = FILLS[per_group, tokens]
    assert fill_of(made, tokens) >= 0.99
    assert fill_of(made, tokens) == pytest.approx(fill, abs=0.002)
    assert made.pack_tokens.sum() / plain_tokens == pytest.approx(more_tokens, abs=0.002)
    assert len(made.pack_tokens) / plain_packs == pytest.approx(fewer_packs, abs=0.004)


@pytest.mark.parametrize("stage, questions, num_questions", [("align", (80, 384), 1), ("instruct", (15, 46), 29)])
def test_the_fast_recipes_fill_their_packs_to_99_percent(stage, questions, num_questions):
    """With descriptions of 80 to 384 tokens in stage 1."""
    recipe = from_dict(RunConfig, read_recipe(f"fast-{stage}")).stages[stage]
    cut = Cut(
        42, recipe.questions_per_group, tokens_per_step=recipe.tokens_per_step, tokens_per_pack=recipe.tokens_per_pack
    )
    made = plan_epoch(pdb_like(4000, questions, num_questions), cut, 0)
    assert fill_of(made, recipe.tokens_per_pack) >= 0.99


def test_steps_of_tokens_are_even_and_near_what_was_asked():
    made = plan_epoch(pdb_like(4000), Cut(42, 30, tokens_per_step=131_072, tokens_per_pack=8192), 0)
    packs = np.diff(made.windows[0].step_starts)
    assert packs.max() - packs.min() <= 1 and np.mean(packs == 16) >= 0.9
    tokens = np.array([sum(made.step_tokens(n)) for n in range(made.num_steps)])
    assert abs(tokens.mean() / 131_072 - 1) < 0.015  # sixteen packs, full to 99 percent
    assert np.abs(tokens / 131_072 - 1).max() < 0.1


def test_large_and_small_groups_are_spread_over_the_epoch():
    """Best fit packs from large to small: unshuffled, an epoch would begin with long proteins and end with short ones.
    The correlation of place and mean group length is that of noise, below 4 / sqrt(P)."""
    made = plan_epoch(pdb_like(4000), Cut(42, 30, tokens_per_step=131_072, tokens_per_pack=8192), 0)
    mean_group = made.pack_tokens / np.diff(made.windows[0].pack_starts)
    place = np.arange(len(mean_group))
    assert abs(np.corrcoef(place, mean_group)[0, 1]) < 4 / np.sqrt(len(mean_group))


# --------------------------------------------------------------------------------------------------------- weights


@st.composite
def weighted(draw):
    """As `planned`, with sets of unlike weights in shards of their own."""
    samples, cut = draw(planned())
    shards = [
        dataclasses.replace(shard, weights=np.full(len(shard.ids), draw(st.sampled_from([0.1, 0.5, 1.0, 1.3, 2.5]))))
        for shard in samples.shards
    ]
    return DataSet(shards, samples.members), cut


@given(weighted(), epochs)
def test_a_protein_is_seen_as_often_as_its_weight_says_rounded_down_or_up(given_plan, epoch):
    """And each of its questions as often, unless they are drawn; no step is empty."""
    data, cut = given_plan
    cut = dataclasses.replace(cut, questions_per_protein=None)
    made = plan_epoch(data, cut, epoch)
    asked, whole = asked_in(made), data.whole
    for sample, (count, weight) in enumerate(zip(whole.num_turns.tolist(), whole.weights.tolist())):
        times = {asked[sample, turn] for turn in range(count)}
        assert times <= {math.floor(weight)} or times <= {math.ceil(weight)}
    assert made.num_steps == num_steps(totals_of(data, cut), cut)
    assert all(step and all(step) for step in steps_of(made))


@given(weighted(), epochs)
def test_a_protein_seen_twice_is_drawn_twice_and_never_over_a_packs_bound(given_plan, epoch):
    data, cut = given_plan
    made = plan_epoch(data, cut, epoch)
    asked, whole = Counter(sample for sample, _ in asked_in(made).elements()), data.whole
    for sample, count in asked.items():
        once = min(int(whole.num_turns[sample]), cut.questions_per_protein or 10**9)
        weight = float(whole.weights[sample])
        assert count in (once * math.floor(weight), once * math.ceil(weight))
    for number, step in enumerate(steps_of(made)):
        tokens = [sum(tokens_in(data, group) for group in pack) for pack in step]
        assert made.step_tokens(number) == tokens
        assert cut.tokens_per_pack is None or max(tokens) <= cut.tokens_per_pack


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5])
def test_over_many_epochs_the_weight_is_the_mean_and_the_draw_is_fresh(weight):
    """400 proteins, 50 epochs. The mean over 20,000 draws has a deviation of at most 0.5 / 141; of two epochs' halves a
    quarter of the proteins is in both, give or take 5 deviations of 8.7."""
    data = samples_of([[1, 1]] * 400, weights=[weight] * 400)
    cut = cut_of(per_group=2, per_step=50)
    seen = [asked_in(plan_epoch(data, cut, epoch)) for epoch in range(50)]
    mean = sum(sum(asked.values()) for asked in seen) / 50 / 800
    assert mean == pytest.approx(weight, abs=5 * 0.5 / 141)
    once_more = [{sample for sample, turn in asked if asked[sample, turn] > math.floor(weight)} for asked in seen]
    if weight == 1.0:
        assert not any(once_more)
    else:
        assert all(abs(len(one & other) - 100) < 44 for one, other in itertools.pairwise(once_more))


def test_copies_of_a_protein_are_cut_and_placed_apart():
    """Two copies of 40 proteins with 6 questions: they share a step, or a cut into threes, no more than by chance."""
    data = samples_of([[1] * 6] * 40, weights=[2.0] * 40)
    steps = groups_of(plan_epoch(data, cut_of(per_group=3, per_step=12), 0))
    places = defaultdict(list)
    for number, groups in enumerate(steps):
        for sample, turns in groups:
            places[sample].append((number, frozenset(turns)))
    assert len(steps) == 40 and all(len(groups) == 4 for groups in places.values())
    # One of ten ways to cut six into threes; the chance that two copies agree for 14 of 40 proteins is 3e-5.
    assert sum(len({turns for _, turns in groups}) == 2 for groups in places.values()) < 14
    assert sum(len({number for number, _ in groups}) == 4 for groups in places.values()) > 20


def test_a_whole_weight_leaves_the_first_copys_order_alone():
    """The set that is seen once has the same cuts into groups beside one that is seen twice."""
    one = samples_of([[1] * 7] * 6)
    both = samples_of([[1] * 7] * 12, shards=[0] * 6 + [1] * 6, weights=[1.0] * 6 + [2.0] * 6)
    alone, beside = (plan_epoch(data, cut_of(per_group=3, per_step=9), 4) for data in (one, both))
    groups = [sorted(group for step in groups_of(made) for group in step if group[0] < 6) for made in (alone, beside)]
    assert groups[0] == groups[1]


def test_the_steps_of_a_mixture_by_hand():
    """Ten proteins of 4 questions once, ten half of the time, ten 2.5 times: 40 + 20 + 100 = 160 questions."""
    weights = [1.0] * 10 + [0.5] * 10 + [2.5] * 10
    data = samples_of([[1] * 4] * 30, shards=[0] * 10 + [1] * 10 + [2] * 10, weights=weights)
    cut = cut_of(per_group=4, per_step=16)
    totals = totals_of(data, cut)
    assert (totals.sizes / 1024).tolist() == [40, 20, 100] and totals.questions.tolist() == [40, 40, 120]
    assert num_steps(totals, cut) == 10


# --------------------------------------------------------------------------------------------------------- memory

MEASURED = """
import resource, sys, tracemalloc
import numpy as np
from proteingpt.data.plan import Cut, Samples, Totals, join, num_steps, plan_window, survey, windows

SHARD, TURNS = 500, 6

def shard(number):
    rng = np.random.default_rng(number)
    residues = rng.integers(20, 800, SHARD)
    return Samples(rng.integers(0, 2**63, SHARD).astype(np.uint64), 2 * (residues + 2) + 12,
                   np.arange(SHARD + 1) * TURNS, rng.integers(15, 46, SHARD * TURNS), np.ones(SHARD))

num_shards = int(sys.argv[1])
cut = Cut(42, 30, tokens_per_step=131072, tokens_per_pack=8192, shards_per_window=8)
tracemalloc.start()
totals = Totals(*np.array([survey(shard(number), cut) for number in range(num_shards)]).T)
steps, asked = num_steps(totals, cut), 0
for window in windows(totals, cut, 3)[: int(sys.argv[2])]:
    made = plan_window(join([shard(number) for number in window.shards]), cut, 3, window.num_steps)
    asked += len(made.turns)
print(tracemalloc.get_traced_memory()[1], steps, asked)
"""


def test_the_memory_of_a_plan_is_that_of_its_largest_window():
    """64 times the samples, 80,000 questions or 5 million, with windows of the same size: the peak grows by what
    is kept of each shard, here far under a thousand bytes of it."""

    def measure(num_shards: int, num_windows: int) -> list[int]:
        command = [sys.executable, "-c", MEASURED, str(num_shards), str(num_windows)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [int(word) for word in said.split()]

    (few, steps, asked), (many, more_steps, _) = measure(27, 3), measure(27 * 64, 3)
    assert asked == 3 * 8 * 500 * 6 and more_steps == pytest.approx(64 * steps, rel=0.02)
    assert many - few < 27 * 63 * 1000
    assert many < 1.5 * few


# --------------------------------------------------------------------------------------------------------- shuffling


def test_seeds_and_epochs_shuffle_anew_proteins_and_questions_alike():
    keys, turns = keys_of(40), [7] * 40
    drawn = ((42, 0), (42, 1), (43, 0), (43, 1), (0, 0), (1, 0), (0, 1))
    plans = [groups_of(plan(turns, epoch, seed=seed)) for seed, epoch in drawn]
    for one, other in itertools.combinations(plans, 2):
        assert one != other
        # No two share the order of proteins, nor the cut of a protein's questions into groups, beyond chance.
        same_place = sum(a[0][0] == b[0][0] for a, b in zip(one, other))
        assert same_place < len(one) / 3
        cut_one, cut_other = (
            {(sample, frozenset(group)) for step in made for sample, group in step if len(group) == 3}
            for made in (one, other)
        )
        assert len(cut_one & cut_other) < len(cut_one) / 3
    assert plans[0] == groups_of(plan(turns, keys=keys))


def test_windows_of_shards_are_drawn_anew_in_each_epoch():
    samples = counted([2] * 40, shards=[number // 4 for number in range(40)])
    orders = []
    for epoch in range(6):
        made = plan_epoch(samples, cut_of(per_group=2, per_step=4, shards_per_window=2), epoch)
        orders.append(list(dict.fromkeys(samples.shard_of[s] for step in groups_of(made) for s, _ in step)))
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    pairs = [{frozenset(order[n : n + 2]) for n in range(0, 10, 2)} for order in orders]
    assert any(one != pairs[0] for one in pairs[1:])


def test_a_questions_place_is_uniform_over_many_epochs():
    """Chi-squared over 400 epochs for the step that a question falls into: 8 steps, 7 degrees of freedom; 24.3 is the
    0.1 % point. The seeds are fixed, so this cannot fail by chance."""
    hits = Counter()
    for epoch in range(400):
        made = plan([1] * 16, epoch, per_group=1, per_step=2)
        hits[next(n for n, step in enumerate(groups_of(made)) if any(sample == 5 for sample, _ in step))] += 1
    assert sum((hits[n] - 50) ** 2 / 50 for n in range(8)) < 24.3


def test_a_packs_place_is_uniform_over_many_epochs():
    """The same for steps of tokens, where packs are shuffled after packing, and for the longest protein, which best fit
    packs first: 20 + 35, 21 + 34, ... are 8 packs of 55 in 8 steps."""
    samples = samples_of([[10 + n] for n in range(16)])
    cut = Cut(42, 1, tokens_per_step=55, tokens_per_pack=55)
    hits = Counter()
    for epoch in range(400):
        made = plan_epoch(samples, cut, epoch)
        assert made.num_steps == 8
        hits[next(n for n, step in enumerate(groups_of(made)) if any(sample == 15 for sample, _ in step))] += 1
    assert sum((hits[n] - 50) ** 2 / 50 for n in range(8)) < 24.3


# By hand: all ten questions once; groups of at most two of one protein; 10 / 4 rounded up = 3 steps; a group is in step
# 3 x (questions before it) // 10: 0 0 0 | 1 | 2 2. Without a bound each group is a pack.
STORED = [
    [[("3abc_A", (1, 3))], [("1abc_A", (0,))], [("4abc_A", (1, 0))]],
    [[("0abc_A", (0, 1))]],
    [[("4abc_A", (2,))], [("3abc_A", (0, 2))]],
]
# By hand: three of 3abc's four questions, all others once. The expected tokens are 17 + 16 in the first shard,
# 26 + 22.5 in the second, 28 + 24 in the third: 133.5, of which 45 packed at a time make 4 packs, and 4 x 45 / 60 = 3
# steps. The first shard is 0.74 steps, so it is joined to the second, with which it is 1.8: one step, and two are left.
# Best fit of 29, 21, 17, 16 into 45: 29 and 16, 21 and 17. 4abc's long
# question leaves room for 45 - 14 - 20 = 11 beside it and begins a part of its own.
STORED_TOKENS = [
    [[("3abc_A", (2,)), ("0abc_A", (0, 1))], [("1abc_A", (0,)), ("3abc_A", (1, 3))]],
    [[("4abc_A", (1, 0))]],
    [[("4abc_A", (2,))]],
]


def test_an_order_never_changes_silently():
    """A run that resumes under a later version must go on with the questions it has not asked yet."""
    keys, turns = keys_of(5), [2, 1, 0, 4, 3]
    assert named(plan(turns, per_group=2, per_step=4), keys) == STORED
    costs = [[3, 4], [5], [], [6, 7, 8, 9], [2, 2, 20]]
    cut = Cut(42, 2, tokens_per_step=60, tokens_per_pack=45, questions_per_protein=3, shards_per_window=1)
    made = plan_epoch(samples_of(costs, [10, 11, 12, 13, 14], [0, 0, 1, 1, 2]), cut, 1)
    assert named(made, keys) == STORED_TOKENS


def test_packs_never_change_without_another_version():
    """What is too much to do by hand: 60 proteins of 30 questions, cut into packs that are full. Whoever changes this
    hash raises plan.VERSION, so that a run that was begun with the old packs is not continued with others."""
    costs = [[5 + (7 * sample + 3 * turn) % 23 for turn in range(30)] for sample in range(60)]
    samples = samples_of(costs, [40 + 37 * n % 211 for n in range(60)], [0] * 60)
    made = plan_epoch(samples, Cut(7, 30, tokens_per_step=9000, tokens_per_pack=1000), 2)
    digest = hashlib.sha256(repr(named(made, keys_of(60))).encode()).hexdigest()
    assert (VERSION, digest[:16]) == (2, "e76311350628eacd")
