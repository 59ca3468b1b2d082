"""From a step number to this rank's pack, read ahead by one thread.

What is prefetched is not state: `TrainingPlan.work` is a pure function of shards, recipe, step and share.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from proteingpt.config import StageConfig
from proteingpt.data import plan
from proteingpt.data.collate import Group, Pack, branch_length, collate
from proteingpt.data.index import TokenIndex
from proteingpt.data.shards import ShardSet
from proteingpt.protein import prefix_length


Groups = list[tuple[int, tuple[int, ...]]]  # [(sample, its turns), ...]


@dataclass(frozen=True)
class Work:
    """What one rank does in one step: a forward for each of `packs`, of which the silenced ones have no say.

    several: whether any rank has more than one. answer_tokens, num_samples: of the whole step, over all ranks.
    """

    packs: list[Pack]
    several: bool
    answer_tokens: int
    num_samples: int


@dataclass(frozen=True)
class Share:
    """How steps are shared out: this rank's number, every rank's speed and capacity (tokens of a forward, None for one
    pack), and whether every rank must run as many forwards (ZeRO 3)."""

    rank: int
    speeds: list[float]
    capacities: list[int | None]
    equal_counts: bool


class StageData:
    """The samples of a split as a stage reads them. `samples`: int (S',), those of the shards that are used."""

    def __init__(self, shards: ShardSet, index: TokenIndex, prefix_ids: list[int], samples: np.ndarray):
        self.shards = shards
        self.index = index
        self.prefix_ids = prefix_ids
        self.samples = samples
        self.ids = plan.hash_keys([shards.keys[s] for s in samples])
        self.num_turns = index.num_turns[samples]

    @property
    def sizes(self) -> plan.Samples:
        """What the plan needs of it."""
        first_turn = np.concatenate(([0], np.cumsum(self.num_turns)))
        turn = np.repeat(self.index.first_turn[self.samples] - first_turn[:-1], self.num_turns) + np.arange(first_turn[-1])
        return plan.Samples(
            ids=self.ids,
            prefix_tokens=len(self.prefix_ids) + prefix_length(self.shards.num_residues[self.samples].astype(np.int64)),
            first_turn=first_turn,
            turn_tokens=branch_length(self.index.questions.lengths[turn], self.index.answers.lengths[turn]),
            shards=self.shards.shard_numbers[self.samples],
        )

    def group(self, sample: int, turns: tuple[int, ...]) -> Group:
        """Reads the protein. sample counts among `self.samples`."""
        first = self.index.first_turn[self.samples[sample]]
        branches = [(self.index.questions[first + t].tolist(), self.index.answers[first + t].tolist()) for t in turns]
        read = self.shards.read(self.samples[sample])
        return Group(read.key, read.protein, self.prefix_ids, branches)

    def answer_tokens(self, groups: Groups) -> int:
        at = np.concatenate([self.index.first_turn[self.samples[s]] + np.array(turns) for s, turns in groups])
        return int(self.index.answers.lengths[at].sum())

    def work(self, packs: list[Groups], pack_tokens: list[int], share: Share) -> Work:
        """This rank's part of a step. Where it has no pack it repeats the step's shortest in silence, so that every
        rank runs the same modules and takes part in every collective."""
        forwards = plan.assign(pack_tokens, share.speeds, share.capacities, share.equal_counts)
        shortest = int(np.argmin(pack_tokens))
        mine = [[group for p in forward for group in packs[p]] for forward in forwards[share.rank] or [[]]]
        made = [self.collate(groups) if groups else self.collate(packs[shortest]).silenced() for groups in mine]
        everything = [group for groups in packs for group in groups]
        return Work(
            packs=made,
            several=max(len(f) for f in forwards) > 1,
            answer_tokens=self.answer_tokens(everything),
            num_samples=sum(len(turns) for _, turns in everything),
        )

    def collate(self, groups: Groups) -> Pack:
        return collate([self.group(*group) for group in groups])


class TrainingPlan:
    """All steps of a stage: which groups are in which packs of step n."""

    def __init__(self, data: StageData, stage: StageConfig, seed: int, shards_per_window: int | None = None):
        self.data, self.stage = data, stage
        self.sizes = data.sizes
        self.cut = plan.Cut(
            seed=seed,
            questions_per_group=stage.questions_per_group,
            samples_per_step=stage.samples_per_step,
            tokens_per_step=stage.tokens_per_step,
            tokens_per_pack=stage.tokens_per_pack,
            questions_per_protein=stage.questions_per_protein,
            shards_per_window=shards_per_window,
        )
        self.steps_per_epoch = plan.num_steps(self.sizes, self.cut)
        self.num_steps = min(stage.epochs * self.steps_per_epoch, stage.max_steps or 2**63)
        self.epoch = lru_cache(maxsize=1)(lambda epoch: plan.plan_epoch(self.sizes, self.cut, epoch))

    def packs(self, step: int) -> tuple[list[Groups], list[int]]:
        """The packs of a step, and the tokens of each."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch).step(number), self.epoch(epoch).step_tokens(number)

    def work(self, step: int, share: Share) -> Work:
        return self.data.work(*self.packs(step), share)

    @property
    def fingerprint(self) -> str:
        """Equal on all ranks and at every resume, or the run is not the same run. Answers' lengths enter because they
        are the denominators of the loss."""
        answers = self.data.index.answers.lengths
        return plan.fingerprint(*vars(self.sizes).values(), answers, self.data.prefix_ids, self.cut)


def prefetch(make: Callable[[int], Work], first: int, last: int, depth: int = 4) -> Iterator[Work]:
    """make(first) .. make(last - 1) in order, made ahead by a thread. Its error is raised where it would have been
    read; leaving the iterator early ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        for step in range(first, last):
            try:
                item = (make(step), None)
            except BaseException as error:  # handed over whole: the consumer decides
                item = (None, error)
            if not put(item) or item[1] is not None:
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stopped.set()
        thread.join()
