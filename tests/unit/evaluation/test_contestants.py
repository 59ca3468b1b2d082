"""Who is shown what: partners that are never oneself, and predicted structures that are not taken for the deposited
ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import DataConfig
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.encoders.pair import Remembering
from proteingpt.evaluation import contestants
from proteingpt.evaluation.cases import Case
from proteingpt.evaluation.contestants import Showing, match_predicted, nearest_training, partners
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.protein import Protein, Sample, Turn


@given(st.integers(2, 30))
def test_everyone_has_another_as_partner(num):
    cases = [Case(f"p{i}", i, 9, ()) for i in range(num)]
    other = partners(cases)
    assert sorted(case.key for case in other.values()) == sorted(other)
    assert all(key != case.key for key, case in other.items())


def test_one_protein_has_no_partner():
    with pytest.raises(EvaluationError, match="at least two proteins"):
        partners([Case("p", 0, 9, ())])


def sample(name: str, letters: str, place: float) -> Sample:
    return Sample(Protein(name, "A", letters, np.full((len(letters), 3, 3), place, np.float32)), "", (Turn("Q", "A"),))


@pytest.fixture
def shards(tmp_path):
    """Two deposited chains; the first has a prediction under its own key, the second under another, by its sequence."""
    deposited = [sample("1abc", "ACDEFGHIKL", 1.0), sample("2abc", "MNPQRSTVWY", 2.0)]
    predicted = [sample("1abc", "ACDEFGHIKL", 10.0), sample("P12345", "MNPQRSTVWY", 20.0)]
    write_shards(tmp_path / "pdb", {"test": deposited}, samples_per_shard=10, options={})
    write_shards(tmp_path / "af", {"all": predicted}, samples_per_shard=10, options={})
    return ShardSet(tmp_path / "pdb", "test"), str(tmp_path / "af")


class Places:
    """Encoders whose rows say where the backbone lies, and the first letter."""

    def encode(self, proteins):
        rows = lambda p, value: torch.full((len(p) + 2, 1), float(value))  # noqa: E731
        structure = [rows(p, p.backbone[0, 0, 0]) for p in proteins]
        return structure, [rows(p, ord(p.sequence[0])) for p in proteins]


def test_a_predicted_structure_is_not_taken_for_the_deposited_one_of_the_same_key(shards, monkeypatch):
    """The rows are remembered by key, and the deposited protein was shown before."""
    deposited, directory = shards
    monkeypatch.setattr(contestants, "protein_prefix", lambda model, prompt, *rows: rows)
    showing = Showing(deposited, DataConfig(), Remembering(Places(), 10**6), None, None, (True, True))
    cases = [Case(key, number, 10, (Turn("Q", "A"),)) for number, key in enumerate(deposited.keys)]
    found = match_predicted(cases, deposited, directory)
    assert set(found) == {"1abc_A", "2abc_A"}
    for case, letter, place in zip(cases, "AM", (1.0, 2.0), strict=True):
        for shown, wanted in (
            (showing.whole(), place),
            (showing.predicted(found), 10 * place),
            (showing.whole(), place),
        ):
            structure, sequence = shown.prefix(case)
            assert set(structure.flatten().tolist()) == {wanted} and set(sequence.flatten().tolist()) == {
                float(ord(letter))
            }


def test_no_match_is_an_error(shards):
    deposited, directory = shards
    write_shards(f"{directory}-other", {"all": [sample("9xyz", "WWWWW", 0.0)]}, samples_per_shard=10, options={})
    with pytest.raises(EvaluationError, match="none of the 1 proteins asked about is in"):
        match_predicted([Case("1abc_A", 0, 10, ())], deposited, f"{directory}-other")


def test_a_training_protein_that_cannot_be_read_is_nobodys_neighbour(shards, tmp_path):
    deposited, _ = shards
    train = [sample("3abc", "ACDEFGHIKL", 0.0), sample("4abc", "ACDEFGHAAA", 0.0)]
    write_shards(tmp_path / "train", {"train": train}, samples_per_shard=10, options={})
    (tar,) = (tmp_path / "train").glob("*.tar")
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"ACDEFGHIKL", b"ACDEFGHIKK", 1))  # its checksum is now wrong
    found = nearest_training([Case("1abc_A", 0, 10, ())], deposited, ShardSet(tmp_path / "train", "train"))
    assert found["1abc_A"].index == 1 and found["1abc_A"].similarity == pytest.approx(5 / 11)
