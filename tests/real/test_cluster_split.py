"""The cluster split by MMseqs2 on real chains, held against alignments by another program (biotite's, exact)."""

import itertools
import math
import shutil
from pathlib import Path

import biotite.sequence as seq
import biotite.sequence.align as align
import pytest

from proteingpt.data.splits import MIN_COVERAGE, cluster_by_mmseqs, draw_test_clusters
from proteingpt.data.structure import StructureError, find_structures, read_entry

REAL = Path(__file__).parents[3] / "shared" / "data" / "pdb"
MAX_FILE_BYTES = 60_000
# Karlin and Altschul's parameters of BLOSUM62 with gaps of 11 and 1, as BLAST has them.
LAMBDA, K = 0.267, 0.041

pytestmark = [
    pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data in {REAL} are absent"),
    pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed (Debian: mmseqs2)"),
]


@pytest.fixture(scope="module")
def sequences():
    """{entry: sequence of chain A} of the smaller files, of the twenty letters, each sequence once."""
    found = {}
    for path in find_structures(REAL):
        try:
            if path.stat().st_size < MAX_FILE_BYTES:
                protein = read_entry(path).protein("A")
                found[protein.sequence] = protein.id
        except StructureError:
            pass  # no chain A
    return {name: sequence for sequence, name in found.items() if set(sequence) <= set("ACDEFGHIKLMNPQRSTVWY")}


def test_no_test_chain_is_30_percent_identical_to_a_training_chain(sequences):
    clusters = cluster_by_mmseqs(sequences)
    test = draw_test_clusters({name: {cluster} for name, cluster in clusters.items()}, 0.3, seed=1)
    train = set(sequences) - test
    assert len(test) >= 20 and len(set(clusters.values())) >= 50
    num_compared = 0
    for one, other in itertools.product(sorted(test), sorted(train)):
        # What is alike over half of its length has stretches in common; all pairs would take minutes.
        if len(stretches(sequences[one]) & stretches(sequences[other])) >= 2:
            num_compared += 1
            assert not alike(sequences[one], sequences[other], sum(map(len, sequences.values()))), (one, other)
    assert num_compared >= 20


def test_a_random_split_does_not_pass_this_check(sequences):
    """So the check can fail: near copies are found where they are known to be."""
    lysozymes = [s for s in sequences.values() if s.startswith("MNIFEMLRIDE")]
    assert len(lysozymes) >= 2 and alike(*lysozymes[:2], 50_000)
    assert alike(lysozymes[0], lysozymes[0][:100], 50_000) and not alike(lysozymes[0], lysozymes[0][::-1], 50_000)


def stretches(sequence: str, length: int = 4) -> set[str]:
    return {sequence[i : i + length] for i in range(len(sequence) - length + 1)}


def alike(one: str, other: str, num_letters: int) -> bool:
    """At least 30 % identity over the asked share of the shorter, in an alignment that is no accident among so many."""
    matrix = align.SubstitutionMatrix.std_protein_matrix()
    pair = seq.ProteinSequence(one), seq.ProteinSequence(other)
    best = align.align_optimal(*pair, matrix, gap_penalty=(-11, -1), local=True, max_number=1)[0]
    expected = K * len(one) * num_letters * math.exp(-LAMBDA * best.score)
    rows = (best.trace >= 0).all(axis=1).sum()
    identity = align.get_sequence_identity(best, mode="all")
    return bool(expected < 1e-3 and rows >= MIN_COVERAGE * min(len(one), len(other)) and identity > 0.3)
