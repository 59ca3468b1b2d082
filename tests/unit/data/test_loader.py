"""From step to pack: who gets what, and the thread that reads ahead."""

import dataclasses
import gc
import threading

import numpy as np
import pytest
from transformers import AutoTokenizer

from proteingpt.config import StageConfig
from proteingpt.data.index import build_index
from proteingpt.data.loader import StageData, TrainingPlan, prefetch
from proteingpt.data.plan import PlanError, hash_keys
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardSet

STAGE = StageConfig(
    template="released", epochs=2, samples_per_step=40, questions_per_group=3, max_answer_tokens=16, warmup_steps=0,
    warmup_lr=0.0, init_lr=1e-3, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def make_data(demo_assets):
    """StageData of the demo's 16 training proteins, 8 questions each, or of some of them."""
    tokenizer = AutoTokenizer.from_pretrained(demo_assets / "llm", local_files_only=True)
    prompt = Prompt(tokenizer, TEMPLATES["released", "instruct"], STAGE.max_answer_tokens)
    shards = ShardSet(demo_assets, "train")
    index = build_index(shards, "instruct", prompt)

    def make(samples=range(len(shards))):
        return StageData(shards, index, prompt.prefix_ids, np.array(samples, np.int64))

    return make


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


@pytest.fixture
def plan(data):
    return TrainingPlan(data, STAGE, seed=42)


# ------------------------------------------------------------------------------------------------------- the plan


def test_the_number_of_steps_by_hand(data):
    """16 x 8 = 128 questions in steps of 40: 4 steps an epoch."""
    assert TrainingPlan(data, STAGE, 42).num_steps == 8
    assert TrainingPlan(data, dataclasses.replace(STAGE, max_steps=5), 42).num_steps == 5
    assert TrainingPlan(data, dataclasses.replace(STAGE, max_steps=500), 42).num_steps == 8


def test_each_epoch_asks_everything_once_and_the_next_one_in_another_order(plan):
    epochs = [[group for step in steps for group in plan.groups(step)] for steps in (range(4), range(4, 8))]
    for groups in epochs:
        asked = sorted((sample, turn) for sample, turns in groups for turn in turns)
        assert asked == [(sample, turn) for sample in range(16) for turn in range(8)]
    assert epochs[0] != epochs[1]


def test_a_step_is_the_same_whichever_was_asked_for_before(plan, data):
    """So a run resumes by its step number alone."""
    inorder = [plan.groups(step) for step in range(8)]
    fresh = TrainingPlan(data, STAGE, seed=42)
    assert [fresh.groups(step) for step in (7, 0, 4, 3)] == [inorder[step] for step in (7, 0, 4, 3)]


@pytest.mark.parametrize(
    "stage, seed, samples",
    [
        (STAGE, 43, range(16)),
        (dataclasses.replace(STAGE, samples_per_step=41), 42, range(16)),
        (dataclasses.replace(STAGE, questions_per_group=4), 42, range(16)),
        (STAGE, 42, range(15)),
    ],
)
def test_the_fingerprint_changes_with_whatever_changes_the_order(plan, make_data, stage, seed, samples):
    assert TrainingPlan(make_data(samples), stage, seed).fingerprint != plan.fingerprint
    assert TrainingPlan(make_data(), STAGE, 42).fingerprint == plan.fingerprint


def test_the_fingerprint_leaves_out_what_does_not_change_the_order(plan, data):
    longer = dataclasses.replace(STAGE, epochs=9, init_lr=0.5, min_lr=0.1)
    assert TrainingPlan(data, longer, 42).fingerprint == plan.fingerprint


def test_no_sample_left_is_a_plan_error(make_data):
    with pytest.raises(PlanError):
        TrainingPlan(make_data([]), STAGE, 42).groups(0)


# ----------------------------------------------------------------------------------------------------------- work


def told(pack) -> list[tuple[str, list[int]]]:
    """(key, targets) of each group of a pack, by walking its answers."""
    bounds = np.searchsorted(pack.predict_positions.numpy(), pack.group_starts)
    assert (np.diff(pack.predict_positions.numpy()) > 0).all()  # every demo question is longer than nothing
    return [(key, pack.targets[a:b].tolist()) for key, a, b in zip(pack.keys, bounds, bounds[1:])]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_ranks_share_a_steps_groups_between_them(plan, data, world_size):
    for step in range(plan.num_steps):
        groups = plan.groups(step)
        work = [data.work(groups, rank, world_size) for rank in range(world_size)]
        whole = data.work(groups, 0, 1)
        assert sorted(g for w in work for g in told(w.pack)) == sorted(told(whole.pack))
        assert len(whole.pack.keys) == len(groups)
        for w in work:
            assert w.answer_tokens == sum(v.pack.num_answer_tokens for v in work) == len(whole.pack.targets)
            assert w.num_samples == sum(len(turns) for _, turns in groups)


def test_a_group_holds_its_protein_with_its_own_questions_and_answers(data, demo_assets):
    """Read back as text and compared with the shard's own."""
    tokenizer = AutoTokenizer.from_pretrained(demo_assets / "llm", local_files_only=True)
    for sample, turns in [(0, (2, 5)), (15, (7, 0, 1))]:
        group = data.group(sample, turns)
        original = data.shards.read(sample)
        assert group.key == original.key and group.protein.sequence == original.protein.sequence
        assert tokenizer.decode(group.prefix_ids) == "<s>###Human: <protein>"
        for (question, answer), turn in zip(group.branches, turns, strict=True):
            asked = original.turns[turn]
            assert tokenizer.decode(question) == f"</protein> {asked.question} ###Assistant: "
            assert tokenizer.decode(answer) == f"{asked.answer}###"


def test_left_out_samples_are_never_read_and_the_others_keep_their_own_text(make_data, data):
    """`sample` counts among those that are used, the shard's among all: the two must not be confused."""
    some = make_data([3, 7, 12])
    assert some.ids.tolist() == hash_keys([data.shards.keys[s] for s in (3, 7, 12)]).tolist()
    for number, sample in enumerate((3, 7, 12)):
        mine, theirs = some.group(number, (1, 4)), data.group(sample, (1, 4))
        assert mine.key == theirs.key and mine.branches == theirs.branches
        assert some.group_length(number, (1, 4)) == data.group_length(sample, (1, 4))
        assert some.answer_tokens([(number, (1, 4))]) == data.answer_tokens([(sample, (1, 4))])
    plan = TrainingPlan(some, STAGE, 42)
    keys = {key for step in range(plan.num_steps) for key in some.work(plan.groups(step), 0, 1).pack.keys}
    assert keys == {data.shards.keys[s] for s in (3, 7, 12)}


def test_lengths_are_known_before_anything_is_read(plan, data):
    groups = plan.groups(0)
    pack = data.work(groups, 0, 1).pack
    assert np.diff(pack.group_starts).tolist() == [data.group_length(*group) for group in groups]


def test_a_rank_without_a_group_repeats_the_shortest_in_silence(data):
    groups = [(0, (0, 1, 2)), (5, (3,)), (9, (4, 5))]
    lengths = [data.group_length(*group) for group in groups]
    work = [data.work(groups, rank, 4) for rank in range(4)]
    idle = [w for w in work if w.pack.num_answer_tokens == 0]
    assert len(idle) == 1
    shortest = groups[lengths.index(min(lengths))]
    assert idle[0].pack.keys == [data.shards.keys[shortest[0]]] and idle[0].pack.num_tokens == min(lengths)
    assert not idle[0].pack.weights.any() and len(idle[0].pack.targets) > 0
    assert idle[0].answer_tokens == sum(w.pack.num_answer_tokens for w in work) > 0


# ------------------------------------------------------------------------------------------------------- prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_what_is_read_ahead_comes_in_order():
    assert list(prefetch(lambda step: step * 10, 3, 50)) == [step * 10 for step in range(3, 50)]
    assert threads() == []


def test_nothing_to_read_is_nothing():
    assert list(prefetch(lambda step: step, 5, 5)) == []
    assert list(prefetch(lambda step: step, 6, 5)) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_an_error_is_raised_where_it_would_have_been_read(error):
    """Not earlier, though it happens ahead: the steps before it are good."""
    made = []

    def make(step: int):
        made.append(step)
        if step == 3:
            raise error("step 3")
        return step

    got = []
    # A generator may not raise StopIteration: Python turns it into this.
    with pytest.raises(RuntimeError if error is StopIteration else error):
        for item in prefetch(make, 0, 10):
            got.append(item)
    assert got == [0, 1, 2]
    assert made == [0, 1, 2, 3]  # nothing is made beyond it
    assert threads() == []


def test_it_reads_ahead_as_far_as_its_depth_and_no_further():
    """While the consumer holds item 0: depth in the queue, one more in the thread's hand."""
    enough, made = threading.Event(), []

    def make(step: int):
        made.append(step)
        if step == 4:
            enough.set()
        return step

    ahead = prefetch(make, 0, 100, depth=3)
    assert next(ahead) == 0
    assert enough.wait(timeout=60)  # 1, 2, 3 fill the queue, 4 is made and waits
    ahead.close()
    assert made == [0, 1, 2, 3, 4]


def test_leaving_early_ends_the_thread():
    for item in prefetch(lambda step: step, 0, 10**9):
        if item == 2:
            break
    gc.collect()
    assert threads() == []


def test_closing_waits_for_the_item_in_hand():
    """No read may still be under way when the caller goes on to close its files."""
    begun, finished = threading.Event(), threading.Event()

    def make(step: int):
        if step == 1:
            begun.set()
            finished.wait(timeout=0.2)  # a slow read
            finished.set()
        return step

    ahead = prefetch(make, 0, 5)
    next(ahead)
    assert begun.wait(timeout=60)
    ahead.close()
    assert finished.is_set() and threads() == []
