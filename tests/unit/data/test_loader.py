"""From step to pack: who gets what, and the thread that reads ahead."""

import dataclasses
import gc
import itertools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from shard_server import serving
from transformers import AutoTokenizer

from proteingpt.config import StageConfig
from proteingpt.data.index import build_index
from proteingpt.data.loader import Share, StageData, TrainingPlan, prefetch
from proteingpt.data.plan import PlanError, hash_keys
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardCache, ShardError, ShardSet, write_shards
from proteingpt.data.shares import assign

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


def groups_of(plan, step: int):
    return list(itertools.chain(*plan.packs(step)[0]))


def work_of(plan, step: int, speeds=(1.0,), capacities=None, equal_counts=False):
    """What each rank does."""
    capacities = capacities or [None] * len(speeds)
    return [plan.work(step, Share(rank, list(speeds), capacities, equal_counts)) for rank in range(len(speeds))]



# ------------------------------------------------------------------------------------------------------- the plan


def test_the_number_of_steps_by_hand(data):
    """16 x 8 = 128 questions in steps of 40: 4 steps an epoch."""
    assert TrainingPlan(data, STAGE, 42).num_steps == 8
    assert TrainingPlan(data, dataclasses.replace(STAGE, max_steps=5), 42).num_steps == 5
    assert TrainingPlan(data, dataclasses.replace(STAGE, max_steps=500), 42).num_steps == 8


def test_each_epoch_asks_everything_once_and_the_next_one_in_another_order(plan):
    epochs = [[group for step in steps for group in groups_of(plan, step)] for steps in (range(4), range(4, 8))]
    for groups in epochs:
        asked = sorted((sample, turn) for sample, turns in groups for turn in turns)
        assert asked == [(sample, turn) for sample in range(16) for turn in range(8)]
    assert epochs[0] != epochs[1]


def test_a_step_is_the_same_whichever_was_asked_for_before(plan, data):
    """So a run resumes by its step number alone."""
    inorder = [plan.packs(step) for step in range(8)]
    fresh = TrainingPlan(data, STAGE, seed=42)
    assert [fresh.packs(step) for step in (7, 0, 4, 3)] == [inorder[step] for step in (7, 0, 4, 3)]


@pytest.mark.parametrize(
    "stage, seed, samples, window",
    [
        (STAGE, 43, range(16), None),
        (dataclasses.replace(STAGE, samples_per_step=41), 42, range(16), None),
        (dataclasses.replace(STAGE, questions_per_group=4), 42, range(16), None),
        (dataclasses.replace(STAGE, questions_per_protein=4), 42, range(16), None),
        (dataclasses.replace(STAGE, tokens_per_pack=500), 42, range(16), None),
        (
            dataclasses.replace(STAGE, samples_per_step=None, tokens_per_step=900, tokens_per_pack=450),
            42,
            range(16),
            None,
        ),
        (STAGE, 42, range(15), None),
        (STAGE, 42, range(16), 1),
    ],
)
def test_the_fingerprint_changes_with_whatever_changes_the_order(plan, make_data, stage, seed, samples, window):
    assert TrainingPlan(make_data(samples), stage, seed, window).fingerprint != plan.fingerprint
    assert TrainingPlan(make_data(), STAGE, 42).fingerprint == plan.fingerprint


def test_the_fingerprint_leaves_out_what_does_not_change_the_order(plan, data):
    longer = dataclasses.replace(STAGE, epochs=9, init_lr=0.5, min_lr=0.1)
    assert TrainingPlan(data, longer, 42).fingerprint == plan.fingerprint


def test_no_sample_left_is_a_plan_error(make_data):
    with pytest.raises(PlanError):
        TrainingPlan(make_data([]), STAGE, 42)


# ----------------------------------------------------------------------------------------------------------- work


def told(pack) -> list[tuple[str, list[int]]]:
    """(key, targets) of each group of a pack, by walking its answers."""
    bounds = np.searchsorted(pack.predict_positions.numpy(), pack.group_starts)
    assert (np.diff(pack.predict_positions.numpy()) > 0).all()  # every demo question is longer than nothing
    return [(key, pack.targets[a:b].tolist()) for key, a, b in zip(pack.keys, bounds, bounds[1:])]


PACKED = dataclasses.replace(STAGE, tokens_per_pack=450)
SHARES = {
    "alone": dict(speeds=(1.0,)),
    "alone, with room for two": dict(speeds=(1.0,), capacities=[900]),
    "equal": dict(speeds=(1.0, 1.0, 1.0)),
    "unlike": dict(speeds=(1.0, 0.45)),
    "one does nothing": dict(speeds=(5.0, 1e-3, 4.0)),
    "more ranks than packs": dict(speeds=(1.0,) * 20),
    "unlike in speed and room": dict(speeds=(1.0, 0.45, 3.0), capacities=[450, None, 2000]),
    "equal counts": dict(speeds=(1.0, 0.3), equal_counts=True),
    "equal counts with room": dict(speeds=(1.0, 0.3, 0.3), capacities=[1000, None, 450], equal_counts=True),
    "equal counts, one does nothing": dict(speeds=(1.0, 1e-3), equal_counts=True),
}


@pytest.mark.parametrize("stage", [STAGE, PACKED], ids=["a group a pack", "packs of 450"])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_the_ranks_share_a_steps_packs_between_them(data, stage, share):
    """Every group once over the ranks' packs that count, whatever their speeds, room and number; the same totals on
    all; nothing over a rank's capacity; a pack for every rank, and as many where that is asked."""
    plan = TrainingPlan(data, stage, 42)
    for step in range(0, plan.num_steps, 3):
        packs, tokens = plan.packs(step)
        groups = groups_of(plan, step)
        work = work_of(plan, step, **share)
        heard = [[pack for pack in w.packs if pack.weights.any()] for w in work]
        wanted = [(data.shards.keys[s], list(itertools.chain(*answers_of(data, s, turns)))) for s, turns in groups]
        assert sorted(group for packs in heard for pack in packs for group in told(pack)) == sorted(wanted)
        counts = [len(w.packs) for w in work]
        assert min(counts) >= 1
        for w, mine in zip(work, heard):
            assert w.answer_tokens == sum(len(answer) for _, answer in wanted)
            assert w.answer_tokens == sum(pack.num_answer_tokens for packs in heard for pack in packs)
            assert w.num_samples == sum(len(turns) for _, turns in groups)
            assert w.several == (max(counts) > 1)
            # What a rank is given beyond its share, it is given in silence, and it is the shortest of the step.
            assert all(pack.weights.any() or pack.num_tokens == min(tokens) for pack in w.packs)
            assert len(w.packs) == len(mine) or share.get("equal_counts") or not mine
        for w, capacity in zip(work, share.get("capacities", [])):
            assert capacity is None or all(pack.num_tokens <= capacity for pack in w.packs)
        if share.get("equal_counts"):
            assert len(set(counts)) == 1


def answers_of(data, sample: int, turns) -> list[list[int]]:
    first = data.index.first_turn[data.samples[sample]]
    return [data.index.answers[first + turn].tolist() for turn in turns]


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_a_pack_has_the_same_bytes_on_any_device(data, share):
    """A pack alone in its forward is, tensor for tensor, what one rank alone makes of it, and in a wider forward it
    comes with its tokens in one piece."""
    plan = TrainingPlan(data, PACKED, 42)
    (alone,) = work_of(plan, 1)
    assert [pack.num_tokens for pack in alone.packs] == plan.packs(1)[1]
    rows = [pack.token_ids.tolist() for w in work_of(plan, 1, **share) for pack in w.packs if pack.weights.any()]
    joined = "|".join(" ".join(map(str, row)) for row in rows)
    assert all(" ".join(map(str, pack.token_ids.tolist())) in joined for pack in alone.packs)
    assert sum(map(len, rows)) == sum(plan.packs(1)[1])


def test_packs_joined_in_a_forward_follow_the_assignment(data):
    plan = TrainingPlan(data, PACKED, 42)
    packs, tokens = plan.packs(0)
    speeds, capacities = [1.0, 0.45, 3.0], [450, None, 1000]
    forwards = assign(tokens, speeds, capacities)
    assert any(len(forward) > 1 for forward in forwards[2])
    for rank, w in enumerate(work_of(plan, 0, speeds, capacities)):
        wanted = [[data.shards.keys[s] for p in forward for s, _ in packs[p]] for forward in forwards[rank]]
        assert [pack.keys for pack in w.packs if pack.weights.any()] == wanted


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
        assert some.answer_tokens([(number, (1, 4))]) == data.answer_tokens([(sample, (1, 4))])
    plan = TrainingPlan(some, STAGE, 42)
    keys = {key for step in range(plan.num_steps) for pack in work_of(plan, step)[0].packs for key in pack.keys}
    assert keys == {data.shards.keys[s] for s in (3, 7, 12)}


@pytest.mark.parametrize("samples", [range(16), [2, 5, 11, 12]])
def test_lengths_are_known_before_anything_is_read(make_data, samples):
    """Of packs and of the groups in them, also where some samples are left out."""
    plan = TrainingPlan(make_data(samples), PACKED, 42)
    for step in range(plan.steps_per_epoch):
        window, number = plan.window_of(step)
        (work,) = work_of(plan, step)
        assert [pack.num_tokens for pack in work.packs] == plan.packs(step)[1]
        first, last = window.pack_starts[window.step_starts[number : number + 2]]
        lengths = [length for pack in work.packs for length in np.diff(pack.group_starts).tolist()]
        assert lengths == window.tokens[first:last].tolist()


def test_the_sizes_that_the_plan_is_given_by_reading_every_sample(make_data, data):
    chosen = [3, 7, 12]
    (sizes,) = (make_data(chosen).sizes(shard) for shard in range(len(data.shards.shards)))
    for number, sample in enumerate(chosen):
        protein, turns = data.shards.read(sample).protein, data.index.first_turn[sample : sample + 2]
        assert sizes.prefix_tokens[number] == len(data.prefix_ids) + 2 * (len(protein) + 2)
        first, last = sizes.first_turn[number : number + 2]
        read = [
            len(data.index.questions[t]) + len(data.index.answers[t]) - 1 for t in range(int(turns[0]), int(turns[1]))
        ]
        assert sizes.turn_tokens[first:last].tolist() == read
    assert sizes.ids.tolist() == hash_keys([data.shards.keys[sample] for sample in chosen]).tolist()
    assert sizes.weights.tolist() == [1.0] * 3


def test_a_rank_without_a_pack_repeats_the_shortest_in_silence(plan, data):
    packs, tokens = [[(0, (0, 1, 2))], [(5, (3,))], [(9, (4, 5))]], []
    for groups in packs:
        tokens.append(data.collate(groups).num_tokens)
    work = [data.work(packs, tokens, Share(rank, [1.0] * 4, [None] * 4, False)) for rank in range(4)]
    idle = [w for w in work if not any(pack.num_answer_tokens for pack in w.packs)]
    assert len(idle) == 1 and len(idle[0].packs) == 1 and not idle[0].several
    (pack,) = idle[0].packs
    shortest = packs[tokens.index(min(tokens))][0]
    assert pack.keys == [data.shards.keys[shortest[0]]] and pack.num_tokens == min(tokens)
    assert not pack.weights.any() and len(pack.targets) > 0
    assert idle[0].answer_tokens == sum(p.num_answer_tokens for w in work for p in w.packs) > 0


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


# --------------------------------------------------------------------------------------------- samples that are bad


def damage(directory: Path, sample: int):
    """Flips a bit in the coordinates of a training sample."""
    record = json.loads((directory / "train-00000.index.jsonl").read_text().splitlines()[sample])
    content = bytearray((directory / "train-00000.tar").read_bytes())
    content[record["members"]["backbone.npy"][0] + 200] ^= 8
    (directory / "train-00000.tar").write_bytes(content)


@pytest.fixture
def damaged(demo_assets, make_data, tmp_path):
    """StageData of the same samples, of which 3 and 11 cannot be read."""
    for path in demo_assets.glob("train-*"):
        shutil.copy(path, tmp_path)
    shutil.copy(demo_assets / "manifest.json", tmp_path)
    for sample in (3, 11):
        damage(tmp_path, sample)
    data = make_data()
    return StageData(ShardSet(tmp_path, "train"), data.index, data.prefix_ids, data.samples)


@pytest.mark.parametrize("stage", [STAGE, PACKED], ids=["a group a pack", "packs of 450"])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_a_bad_sample_leaves_everything_else_in_its_place(data, damaged, stage, share):
    """Pack by pack the same as without it, less the groups that cannot be read; the step's totals are the plan's."""
    whole, holed = TrainingPlan(data, stage, 42), TrainingPlan(damaged, stage, 42)
    assert whole.fingerprint == holed.fingerprint
    gone = {data.shards.keys[sample] for sample in (3, 11)}
    for step in range(0, whole.num_steps, 3):
        for one, other in zip(work_of(whole, step, **share), work_of(holed, step, **share), strict=True):
            assert (one.answer_tokens, one.num_samples) == (other.answer_tokens, other.num_samples)
            assert one.several == other.several
            for pack, left in zip(one.packs, other.packs, strict=True):
                wanted = [group for group in told(pack) if group[0] not in gone]
                if pack.weights.any() and wanted:
                    assert told(left) == wanted and left.weights.all()
                else:
                    assert not left.weights.any() and len(left.targets) and not gone & set(left.keys)
    assert set(damaged.set_aside.reasons) <= gone and damaged.set_aside.reasons


def test_a_step_of_which_nothing_can_be_read_is_worked_through_in_silence(damaged):
    packs = [[(3, (0, 1))], [(11, (2,))]]
    work = damaged.work(packs, [300, 200], Share(0, [1.0], [None], False))
    assert len(work.packs) == 2 and not any(pack.weights.any() for pack in work.packs)
    assert work.answer_tokens == damaged.answer_tokens([group for pack in packs for group in pack]) > 0


def test_where_no_sample_can_be_read_at_all_it_says_so(make_data, tmp_path):
    data = make_data()
    for path in data.shards.directory.glob("*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    shards = ShardSet(tmp_path, "train")
    (tmp_path / "train-00000.tar").unlink()
    gone = StageData(shards, data.index, data.prefix_ids, data.samples)
    with pytest.raises(ShardError, match="no sample of split train can be read"):
        gone.work([[(3, (0, 1))]], [300], Share(0, [1.0], [None], False))


def num_bytes_read() -> int:
    """By this process from files, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("step", [0, 7])
def test_resuming_at_a_step_reads_nothing_before_it(demo_assets, data, tmp_path, step):
    """A run that goes on finds index and verified shards as an earlier one left them; then its first step costs the
    bytes of its own proteins and no more, whichever step that is."""
    for path in demo_assets.glob("*"):
        if path.is_file() and path.suffix != ".pt":
            shutil.copy(path, tmp_path)
    ShardSet(tmp_path, "train", ShardCache(tmp_path / "cache")).read(0)  # the earlier run
    shards = ShardSet(tmp_path, "train", ShardCache(tmp_path / "cache"))
    plan = TrainingPlan(StageData(shards, data.index, data.prefix_ids, data.samples), STAGE, 42)
    spans = [json.loads(line)["members"] for line in (tmp_path / "train-00000.index.jsonl").read_text().splitlines()]
    places = [spans[sample].values() for sample, _ in groups_of(plan, step)]
    wanted = sum(max(o + n for o, n, _ in place) - min(o for o, _, _ in place) for place in places)
    before = num_bytes_read()
    own = num_bytes_read() - before
    before = num_bytes_read()
    next(prefetch(lambda step: plan.work(step, Share(0, [1.0], [None], False)), step, step + 1))
    assert wanted / 2 < num_bytes_read() - before - own < wanted + 2000  # beside them the note that the shard is whole


def test_a_remote_epoch_is_the_local_one_and_fetches_each_shard_once_as_planned(demo_assets, data, tmp_path):
    """Sixteen proteins in eight shards, two a window, through a cache that holds half of them."""
    shards = ShardSet(demo_assets, "train")
    samples = [shards.read(i) for i in range(len(shards))]
    write_shards(tmp_path / "shards", {"train": samples}, samples_per_shard=2, options={})
    local = ShardSet(tmp_path / "shards", "train")
    cache = ShardCache(tmp_path / "cache", 4 * max(shard["num_bytes"] for shard in local.shards))

    def plan_of(shards) -> TrainingPlan:
        made = StageData(shards, data.index, data.prefix_ids, data.samples)
        return TrainingPlan(made, STAGE, 42, shards_per_window=2)

    with serving(tmp_path / "shards") as (address, orders):
        far, near = plan_of(ShardSet(address, "train", cache)), plan_of(local)
        assert far.fingerprint == near.fingerprint
        windows = [window.shards for window in near.windows(0)]
        assert len(windows) == 4 and far.shards_ahead(0) == [*windows[0], *windows[1]]
        for step in range(near.steps_per_epoch):
            (one,), (other,) = work_of(near, step), work_of(far, step)
            assert [told(pack) for pack in one.packs] == [told(pack) for pack in other.packs]
            for pack, same in zip(one.packs, other.packs):
                for a, b in zip(pack.proteins, same.proteins, strict=True):
                    np.testing.assert_array_equal(a.backbone, b.backbone)
            assert sum(path.stat().st_size for path in cache.directory.glob("*.tar*")) <= cache.max_bytes
        far.data.shards.close()
    asked = [int(name[6:11]) for name in orders.asked if name.endswith(".tar")]  # in the order of the first time
    places = [[asked.index(shard) for shard in window] for window in windows]
    assert all(max(now) < min(later) for now, later in zip(places, places[2:]))
    again = near.windows(1)[0].shards  # the next epoch begins with them
    counts = {orders.asked[f"train-{shard:05d}.tar"] for window in windows for shard in window if shard not in again}
    assert counts == {1}
