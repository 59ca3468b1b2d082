"""From a step number to this rank's pack, read ahead by one thread.

What is prefetched is not state: `StageData.pack(step, ...)` is a pure function of shards, recipe and step.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from proteingpt.config import StageConfig
from proteingpt.data import plan
from proteingpt.data.collate import Group, Pack, collate, group_length
from proteingpt.data.index import TokenIndex
from proteingpt.data.shards import ShardSet


@dataclass(frozen=True)
class Work:
    """What one rank does in one step. answer_tokens: of the whole step, over all ranks; num_samples likewise."""

    pack: Pack
    answer_tokens: int
    num_samples: int


class StageData:
    """The samples of a split as a stage reads them. `samples`: int (S',), those of the shards that are used."""

    def __init__(self, shards: ShardSet, index: TokenIndex, prefix_ids: list[int], samples: np.ndarray):
        self.shards = shards
        self.index = index
        self.prefix_ids = prefix_ids
        self.samples = samples
        self.ids = plan.hash_keys([shards.keys[s] for s in samples])
        self.num_turns = index.num_turns[samples]

    def group(self, sample: int, turns: tuple[int, ...]) -> Group:
        """Reads the protein. sample counts among `self.samples`."""
        first = self.index.first_turn[self.samples[sample]]
        branches = [
            (self.index.questions[first + t].tolist(), self.index.answers[first + t].tolist()) for t in turns
        ]
        read = self.shards.read(self.samples[sample])
        return Group(read.key, read.protein, self.prefix_ids, branches)

    def group_length(self, sample: int, turns: tuple[int, ...]) -> int:
        at = self.index.first_turn[self.samples[sample]] + np.array(turns)
        questions, answers = self.index.questions.lengths[at], self.index.answers.lengths[at]
        num_residues = int(self.shards.num_residues[self.samples[sample]])
        return group_length(num_residues, len(self.prefix_ids), questions.tolist(), answers.tolist())

    def answer_tokens(self, groups: list[tuple[int, tuple[int, ...]]]) -> int:
        at = np.concatenate([self.index.first_turn[self.samples[s]] + np.array(turns) for s, turns in groups])
        return int(self.index.answers.lengths[at].sum())

    def work(self, groups: list[tuple[int, tuple[int, ...]]], rank: int, world_size: int) -> Work:
        """This rank's share of `groups`. A rank without one repeats the shortest in silence, so that every rank runs
        the same modules and takes part in every collective."""
        lengths = [self.group_length(*group) for group in groups]
        mine = [self.group(*groups[g]) for g in plan.assign(lengths, world_size)[rank]]
        if mine:
            pack = collate(mine)
        else:
            pack = collate([self.group(*groups[int(np.argmin(lengths))])]).silenced()
        return Work(pack, self.answer_tokens(groups), sum(len(turns) for _, turns in groups))


class TrainingPlan:
    """All steps of a stage: which groups are in step n."""

    def __init__(self, data: StageData, stage: StageConfig, seed: int):
        self.data, self.stage, self.seed = data, stage, seed
        self.steps_per_epoch = plan.num_steps(data.num_turns, stage.questions_per_group, stage.samples_per_step)
        self.num_steps = min(stage.epochs * self.steps_per_epoch, stage.max_steps or 2**63)
        self.epoch = lru_cache(maxsize=1)(self.plan_epoch)

    def plan_epoch(self, epoch: int) -> plan.EpochPlan:
        return plan.plan_epoch(
            self.data.ids,
            self.data.num_turns,
            seed=self.seed,
            epoch=epoch,
            questions_per_group=self.stage.questions_per_group,
            samples_per_step=self.stage.samples_per_step,
        )

    def groups(self, step: int) -> list[tuple[int, tuple[int, ...]]]:
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch).step(number)

    @property
    def fingerprint(self) -> str:
        """Equal on all ranks and at every resume, or the run is not the same run. Lengths enter because they are the
        denominators of the loss."""
        stage, data = self.stage, self.data
        cut = (self.seed, stage.samples_per_step, stage.questions_per_group, self.steps_per_epoch)
        return plan.fingerprint(
            data.ids, data.num_turns, data.index.questions.lengths, data.index.answers.lengths, data.prefix_ids, cut
        )


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
