"""Several shard sets as one, by their places: what a stage reads where data.mixture is set.

The sets lie end to end, each under a name of its own: a sample is SET/KEY, as the id of its protein says as well, so
that the same key in two sets is two samples, in the plan, in errors and in whatever remembers a protein by its key. How
often a set is seen is the plan's business; its weight is only carried here.
"""

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from proteingpt.config import DataConfig
from proteingpt.data.columns import Joined
from proteingpt.data.shard_cache import Activity
from proteingpt.data.shards import ShardCache, ShardSet
from proteingpt.protein import Protein, Sample, Turn


class Mixture:
    """Reads like a ShardSet, whose attributes it has. sets: the parts; weights: float64 (H,), of each of H shards."""

    def __init__(self, sets: Mapping[str, ShardSet], weights: Mapping[str, float]):
        """Both by location."""
        assert sets, "a mixture of nothing"
        self.sets = list(sets.values())
        self.names = name_sets(list(sets))
        first = self.sets[0]
        self.split, self.directory = first.split, first.directory
        self.address = " + ".join(str(part.address) for part in self.sets)
        self.is_remote = any(part.is_remote for part in self.sets)
        self.fingerprint = hashlib.sha256(repr([part.fingerprint for part in self.sets]).encode()).hexdigest()
        self.first_sample = [0, *itertools.accumulate(len(part) for part in self.sets)]
        self.first_shard = [0, *itertools.accumulate(len(part.shards) for part in self.sets)]
        self.shards = [shard for part in self.sets for shard in part.shards]
        self.keys = Keys(self)
        self.num_residues = Joined([part.num_residues for part in self.sets])
        ends = [part.shard_starts[1:] + first for part, first in zip(self.sets, self.first_sample)]
        self.shard_starts = np.concatenate(([0], *ends))
        self.weights = np.repeat([weights[place] for place in sets], np.diff(self.first_shard))
        self.activity = Activity()
        for part in self.sets:
            part.activity = self.activity

    def __len__(self) -> int:
        return self.first_sample[-1]

    def find(self, i: int) -> tuple[int, int]:
        """(set, sample of it) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in split {self.split!r} of {self.address}")
        part = bisect_right(self.first_sample, i) - 1
        return part, int(i) - self.first_sample[part]

    def read(self, i: int) -> Sample:
        part, sample = self.find(i)
        read = self.sets[part].read(sample)
        return replace(read, protein=self.named(read.protein, part))

    def read_protein(self, i: int) -> Protein:
        part, sample = self.find(i)
        return self.named(self.sets[part].read_protein(sample), part)

    def read_text(self, i: int) -> tuple[str, tuple[Turn, ...]]:
        part, sample = self.find(i)
        return self.sets[part].read_text(sample)

    def named(self, protein: Protein, part: int) -> Protein:
        return replace(protein, id=f"{self.names[part]}/{protein.id}")

    def expect(self, shards: Sequence[int]):
        """As ShardSet.expect; each set is told of its own."""
        for part, first, last in zip(self.sets, self.first_shard, self.first_shard[1:]):
            part.expect([shard - first for shard in shards if first <= shard < last])

    def verify(self):
        for part in self.sets:
            part.verify()

    def close(self):
        for part in self.sets:
            part.close()


class Keys(Sequence):
    """Of the samples of a mixture: SET/KEY."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, i: int) -> str:
        part, sample = self.mixture.find(i)
        return f"{self.mixture.names[part]}/{self.mixture.sets[part].keys[sample]}"


def name_sets(places: Sequence[str]) -> list[str]:
    """The last part of each path or address, which does not change when the sets are moved together; the whole of it
    where two end alike."""
    ends = [PurePosixPath(str(place)).name for place in places]
    return [end if end and ends.count(end) == 1 else str(place).strip("/") for end, place in zip(ends, places)]


def open_split(data: DataConfig, split: str, cache: ShardCache | None = None) -> "ShardSet | Mixture":
    """What data.shards or data.mixture name. Held-out proteins come from the test splits of all sets, each protein
    alike, whatever the weights; a set's test split may be empty."""
    if data.mixture is None:
        return ShardSet(data.shards, split, cache)
    return Mixture({place: ShardSet(place, split, cache) for place in data.mixture}, data.mixture)


def parts_of(shards: "ShardSet | Mixture") -> list[ShardSet]:
    return shards.sets if isinstance(shards, Mixture) else [shards]
