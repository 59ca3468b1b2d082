"""The most similar training protein by sequence: the largest share of 3-mers in common.

Similarity is Jaccard's, distinct 3-mers in both over those in either. It needs no alignment and no program beside
numpy; given up: it says little below about 30 % identity, where unrelated proteins share a tenth of their 3-mers by
chance. """

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTH = 3
ALPHABET = 26  # letters A to Z; anything else counts as X
UNKNOWN_WORD = sum((ord("X") - ord("A")) * (ALPHABET + 1) ** i for i in range(LENGTH))


@dataclass(frozen=True)
class Neighbour:
    """index: into the training sequences, -1 where nothing is shared. similarity: 0 to 1, None of an unknown
    sequence."""

    index: int
    similarity: float | None


def kmers(sequence: str) -> np.ndarray:
    """Distinct 3-mers as sorted integers, those of unknown residues only left out; a shorter sequence is one word,
    filled up. Empty where no residue is known: published embeddings come without their sequences."""
    letters = np.frombuffer(sequence.upper().encode("ascii", "replace"), np.uint8).astype(np.int64) - ord("A")
    letters = np.where((letters >= 0) & (letters < ALPHABET), letters, ord("X") - ord("A"))
    letters = np.pad(letters, (0, max(0, LENGTH - len(letters))), constant_values=ALPHABET)
    words = np.zeros(len(letters) - LENGTH + 1, np.int64)
    for i in range(LENGTH):
        words = words * (ALPHABET + 1) + letters[i : len(letters) - LENGTH + 1 + i]
    return np.setdiff1d(words, [UNKNOWN_WORD])


class Neighbours:
    """An inverted index of training sequences: for each 3-mer the sequences that hold it."""

    def __init__(self, sequences: Sequence[str]):
        sets = [kmers(sequence) for sequence in sequences]
        self.sizes = np.array([len(words) for words in sets], np.int64)
        words = np.concatenate([np.zeros(0, np.int64), *sets])
        owners = np.repeat(np.arange(len(sets), dtype=np.int32), self.sizes)
        order = np.argsort(words, kind="stable")
        self.owners = owners[order]
        self.words, self.starts = np.unique(words[order], return_index=True)
        self.ends = np.append(self.starts[1:], len(words))

    def nearest(self, sequence: str) -> Neighbour:
        """Of equally similar ones the first."""
        words = kmers(sequence)
        if not len(words):
            return Neighbour(-1, None)
        at = np.searchsorted(self.words, words)
        known = at < len(self.words)
        known[known] = self.words[at[known]] == words[known]
        lists = [self.owners[self.starts[i] : self.ends[i]] for i in at[known]]
        if not lists:
            return Neighbour(-1, 0.0)
        shared = np.bincount(np.concatenate(lists), minlength=len(self.sizes))
        similarity = shared / (self.sizes + len(words) - shared)
        best = int(np.argmax(similarity))
        return Neighbour(best, float(similarity[best]))
