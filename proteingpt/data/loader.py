"""From a step number to this rank's packs; data/prefetch.py makes them ahead.

What is prefetched is not state: `TrainingPlan.work` is a pure function of shards, recipe, step and share.
"""

import copy
import itertools
import threading
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from proteingpt.config import StageConfig
from proteingpt.data import plan
from proteingpt.data.collate import Group, Pack, branch_length, collate
from proteingpt.data.crop import crop, window_start
from proteingpt.data.index import TokenIndex
from proteingpt.data.prefetch import prefetch
from proteingpt.data.set_aside import SetAside
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.data.shares import assign
from proteingpt.protein import PrefixLength, Protein, prefix_length

__all__ = ["Share", "StageData", "TrainingPlan", "Work", "prefetch"]

Groups = list[tuple[int, tuple[int, ...]]]  # [(sample, its turns), ...]


@dataclass(frozen=True)
class Work:
    """What one rank does in one step: a forward for each of `packs`, of which the silenced ones have no say.

    several: whether any rank has more than one. answer_tokens, num_samples, num_packs: of the whole step, over all
    ranks.
    """

    packs: list[Pack]
    several: bool
    answer_tokens: int
    num_samples: int
    num_packs: int


@dataclass(frozen=True)
class Share:
    """How steps are shared out: this rank's number, every rank's speed and capacity (tokens of a forward, None for one
    pack), and whether every rank must run as many forwards (ZeRO 3)."""

    rank: int
    speeds: list[float]
    capacities: list[int | None]
    equal_counts: bool


class StageData:
    """The samples of a split as a stage reads them. `samples`: int (S',), those of the shards that are used, ascending.

    prefix_length: places that a protein takes in a prompt. max_residues: proteins that are longer are cropped to it;
    `draw`: (seed, epoch) that says where, None for their middle. rows_of: reads a protein's encoder rows from a cache;
    what it cannot read it raises as a ShardError.
    """

    def __init__(
        self,
        shards: ShardSet,
        index: TokenIndex,
        prefix_ids: list[int],
        samples: np.ndarray,
        *,
        prefix_length: PrefixLength = prefix_length,
        max_residues: int | None = None,
        rows_of: Callable[[Protein], tuple] | None = None,
    ):
        self.shards = shards
        self.index = index
        self.prefix_ids = prefix_ids
        self.samples = np.asarray(samples, np.int64)
        self.prefix_length = prefix_length
        self.max_residues = max_residues
        self.rows_of = rows_of
        self.draw: tuple[int, int] | None = None
        self.num_shards = len(shards.shards)
        # Of each shard, where its samples begin among `samples`.
        self.shard_starts = np.searchsorted(self.samples, shards.shard_starts)
        self.set_aside = SetAside()

    @cached_property
    def ids(self) -> np.ndarray:
        """uint64 (S',)."""
        return plan.hash_keys(self.shards.keys[s] for s in self.samples)

    @cached_property
    def num_turns(self) -> np.ndarray:
        """int64 (S',)."""
        return self.index.first_turn[self.samples + 1] - self.index.first_turn[self.samples]

    def numbers(self, shard: int) -> np.ndarray:
        """int64: the samples of a shard, as they count among `samples`."""
        return np.arange(self.shard_starts[shard], self.shard_starts[shard + 1])

    def sizes(self, shard: int) -> plan.Samples:
        """What the plan needs of a shard."""
        samples = self.samples[self.numbers(shard)]
        begins = self.index.first_turn[samples]
        num_turns = self.index.first_turn[samples + 1] - begins
        first_turn = np.concatenate(([0], np.cumsum(num_turns)))
        turn = np.repeat(begins - first_turn[:-1], num_turns) + np.arange(first_turn[-1])
        lengths = self.shards.num_residues[samples].astype(np.int64)
        if self.max_residues is not None:
            lengths = np.minimum(lengths, self.max_residues)
        weights = getattr(self.shards, "weights", None)
        return plan.Samples(
            ids=plan.hash_keys(self.shards.keys[s] for s in samples),
            prefix_tokens=len(self.prefix_ids) + self.prefix_length(lengths),
            first_turn=first_turn,
            turn_tokens=branch_length(self.index.questions.lengths_at(turn), self.index.answers.lengths_at(turn)),
            weights=np.full(len(samples), 1.0 if weights is None else float(weights[shard])),
        )

    def drawn(self, seed: int, epoch: int) -> "StageData":
        """The same data, with the crops of an epoch."""
        data = copy.copy(self)
        data.draw = (seed, epoch)
        return data

    def group(self, sample: int, turns: tuple[int, ...]) -> Group:
        """Reads the protein. sample counts among `self.samples`."""
        first = self.index.first_turn[self.samples[sample]]
        branches = [(self.index.questions[first + t].tolist(), self.index.answers[first + t].tolist()) for t in turns]
        whole = self.shards.read_protein(self.samples[sample])
        protein = self.cropped(whole)
        rows = self.rows_of(protein) if self.rows_of else None
        # Under the sample's own key: whoever notes bad samples would not know the next epoch's window of it again.
        return Group(whole.key, protein, self.prefix_ids, branches, self.prefix_length, rows)

    def cropped(self, protein: Protein) -> Protein:
        if self.max_residues is None or len(protein) <= self.max_residues:
            return protein
        sample_id = int(plan.hash_keys([protein.key])[0])
        return crop(protein, window_start(len(protein), self.max_residues, sample_id, self.draw), self.max_residues)

    def answer_tokens(self, groups: Groups) -> int:
        at = np.concatenate([self.index.first_turn[self.samples[s]] + np.array(turns) for s, turns in groups])
        return int(self.index.answers.lengths_at(at).sum())

    def work(self, packs: list[Groups], pack_tokens: list[int], share: Share) -> Work:
        """This rank's part of a step. Where it has no pack it repeats the step's shortest in silence, so that every
        rank runs the same modules and takes part in every collective."""
        forwards = assign(pack_tokens, share.speeds, share.capacities, share.equal_counts)
        mine = [[group for p in forward for group in packs[p]] for forward in forwards[share.rank] or [[]]]
        made = [self.collate(groups) or self.stand_in(packs, pack_tokens) for groups in mine]
        everything = [group for groups in packs for group in groups]
        return Work(
            packs=made,
            several=max(len(f) for f in forwards) > 1,
            answer_tokens=self.answer_tokens(everything),
            num_samples=sum(len(turns) for _, turns in everything),
            num_packs=len(packs),
        )

    def collate(self, groups: Groups) -> Pack | None:
        """A pack of the groups that can be read, None where there is none: a bad sample has weight 0, and everything
        else stays in its place."""
        read = [self.group_or_none(*group) for group in groups]
        return collate([group for group in read if group]) if any(read) else None

    def group_or_none(self, sample: int, turns: tuple[int, ...]) -> Group | None:
        """The group, or None where it cannot be read, which is noted. Raises TooManyBad."""
        try:
            group = self.group(sample, turns)
        except ShardError as error:
            self.set_aside.bad(self.shards.keys[self.samples[sample]], error)
            return None
        self.set_aside.good()
        return group

    def stand_in(self, packs: list[Groups], pack_tokens: list[int]) -> Pack:
        """The step's shortest pack that can be read, or else any sample, in silence."""
        by_length = (packs[p] for p in np.argsort(pack_tokens, kind="stable"))
        anything = ([(sample, (0,))] for sample in np.flatnonzero(self.num_turns).tolist())
        for groups in itertools.chain(by_length, anything):
            if pack := self.collate(groups):
                return pack.silenced()
        raise ShardError(f"{self.shards.address}: no sample of split {self.shards.split} can be read")


class Ahead:
    """make(key) of the keys that are asked for in turn: while one is used, a thread makes the next. Two are kept."""

    def __init__(self, make: Callable):
        self.make, self.made = make, {}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self.lock = threading.Lock()

    def get(self, key, following):
        """following: the key that will be asked for next, None where there is none."""
        with self.lock:
            wanted = [key] if following is None else [key, following]
            self.made = {k: self.made[k] if k in self.made else self.pool.submit(self.make, k) for k in wanted}
            future = self.made[key]
        return future.result()


class TrainingPlan:
    """All steps of a stage: which groups are in which packs of step n. Planned window by window, the next one ahead."""

    def __init__(self, data: StageData, stage: StageConfig, seed: int, shards_per_window: int | None = None):
        self.data, self.stage = data, stage
        self.cut = plan.Cut(
            seed=seed,
            questions_per_group=stage.questions_per_group,
            samples_per_step=stage.samples_per_step,
            tokens_per_step=stage.tokens_per_step,
            tokens_per_pack=stage.tokens_per_pack,
            questions_per_protein=stage.questions_per_protein,
            shards_per_window=shards_per_window,
        )
        self.totals, self.fingerprint = self.survey()
        self.steps_per_epoch = plan.num_steps(self.totals, self.cut)
        self.num_steps = min(stage.epochs * self.steps_per_epoch, stage.max_steps or 2**63)
        self.windows = lru_cache(maxsize=2)(lambda epoch: plan.windows(self.totals, self.cut, epoch))
        self.planned = Ahead(lambda key: self.plan_window(*key))

    def survey(self) -> tuple[plan.Totals, str]:
        """(what the plan keeps of all shards, the plan's fingerprint), reading the lengths of one shard at a time.

        The fingerprint is equal on all ranks and at every resume, or the run is not the same run. Answers' lengths
        enter because they are the denominators of the loss.
        """
        rows, prints = [], []
        for shard in range(self.data.num_shards):
            sizes, samples = self.data.sizes(shard), self.data.samples[self.data.numbers(shard)]
            rows.append(plan.survey(sizes, self.cut))
            first, last = (0, 0) if not len(samples) else (samples[0], samples[-1] + 1)
            turns = np.arange(self.data.index.first_turn[first], self.data.index.first_turn[last])
            answers = self.data.index.answers.lengths_at(turns)
            prints.append(plan.fingerprint(*vars(sizes).values(), answers))
        totals = plan.Totals(*np.array(rows, np.int64).reshape(-1, 2).T, self.packing_rate())
        return totals, plan.fingerprint(plan.VERSION, prints, self.data.prefix_ids, self.cut)

    def packing_rate(self) -> float:
        """Of as many shards as tell it, whichever come first by hash."""
        chosen, num_groups = [], 0
        for shard in np.argsort(plan.mix(np.arange(self.data.num_shards), self.cut.seed, 8), kind="stable").tolist():
            if num_groups >= plan.GROUPS_SAMPLED:
                break
            chosen.append(self.data.sizes(shard))
            num_groups += int(np.ceil(chosen[-1].num_turns / self.cut.questions_per_group).sum())
        return plan.packing_rate(plan.join(chosen), self.cut) if chosen else 0.0

    def find(self, step: int) -> tuple[int, int, int]:
        """(epoch, window of it, step of the window)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        which = bisect_right(self.windows(epoch), number, key=lambda window: window.first_step) - 1
        return epoch, which, number - self.windows(epoch)[which].first_step

    def following(self, epoch: int, which: int) -> tuple[int, int]:
        return (epoch, which + 1) if which + 1 < len(self.windows(epoch)) else (epoch + 1, 0)

    def plan_window(self, epoch: int, which: int) -> plan.WindowPlan:
        """Its samples count among those of `data`."""
        window = self.windows(epoch)[which]
        samples = plan.join([self.data.sizes(shard) for shard in window.shards])
        numbers = np.concatenate([self.data.numbers(shard) for shard in window.shards])
        made = plan.plan_window(samples, self.cut, epoch, window.num_steps)
        return replace(made, sample=numbers[made.sample])

    def window_of(self, step: int) -> tuple[plan.WindowPlan, int]:
        """(the window that a step is in, the step's number there)."""
        epoch, which, number = self.find(step)
        after = self.following(epoch, which)
        begins = after[0] * self.steps_per_epoch + self.windows(after[0])[after[1]].first_step
        return self.planned.get((epoch, which), after if begins < self.num_steps else None), number

    def packs(self, step: int) -> tuple[list[Groups], list[int]]:
        """The packs of a step, and the tokens of each."""
        window, number = self.window_of(step)
        return window.step(number), window.step_tokens(number)

    def pack_tokens(self, step: int, num_steps: int) -> list[list[int]]:
        """Tokens of each pack of so many steps from `step` on, as far as its window goes."""
        window, number = self.window_of(step)
        return [window.step_tokens(n) for n in range(number, min(number + num_steps, window.num_steps))]

    def work(self, step: int, share: Share) -> Work:
        if self.data.shards.is_remote:
            self.data.shards.expect(self.shards_ahead(step))
        return self.data.drawn(self.cut.seed, step // self.steps_per_epoch).work(*self.packs(step), share)

    def shards_ahead(self, step: int) -> list[int]:
        """The shards that are read from this step on, in order: those of its window and of the next, which may be the
        next epoch's first."""
        epoch, which, _ = self.find(step)
        after = self.following(epoch, which)
        shards = (*self.windows(epoch)[which].shards, *self.windows(after[0])[after[1]].shards)
        return [shard for shard in dict.fromkeys(shards) if self.totals.questions[shard]]
