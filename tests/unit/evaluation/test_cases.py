"""What is asked: the same proteins on any number of ranks, long ones as in training, and what is left out by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import DataConfig
from proteingpt.data.mixture import Mixture
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardError, ShardSet, write_shards
from proteingpt.evaluation.cases import Case, choose_cases, fits, key_in_set, missing_of, set_of, shown_protein
from proteingpt.protein import Protein, Sample, Turn


def sample(name: str, num_turns: int = 1, num_residues: int = 10) -> Sample:
    letters = "ACDEFGHIKLMNPQRSTVWY" * (num_residues // 20 + 1)
    backbone = np.arange(num_residues * 9, dtype=np.float32).reshape(-1, 3, 3)
    turns = tuple(Turn(f"Q{n}", f"A{n}") for n in range(num_turns))
    return Sample(Protein(name, "A", letters[:num_residues], backbone), "It is.", turns)


class Shards:
    """What is read of a ShardSet here: samples in memory, of which some cannot be read."""

    def __init__(self, samples, broken=()):
        self.samples, self.broken = list(samples), broken
        self.keys = [sample.key for sample in self.samples]
        self.num_residues = np.array([len(sample.protein) for sample in self.samples])

    def read(self, i: int) -> Sample:
        if self.keys[i] in self.broken:
            raise ShardError(f"sample {self.keys[i]} is damaged")
        return self.samples[i]

    def read_protein(self, i: int) -> Protein:
        return self.read(i).protein


@pytest.fixture(scope="module")
def prompt(characters):
    return Prompt(characters(), TEMPLATES["released", "instruct"], 5)


counts = st.dictionaries(st.text("abcdef0123", min_size=4, max_size=4), st.integers(0, 4), min_size=1, max_size=12)


@given(counts, st.integers(0, 5), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_choice_depends_on_keys_and_seed_and_fewer_are_the_first_of_more(prompt, num_turns, seed, few, random):
    samples = [sample(name, count) for name, count in num_turns.items()]
    cases = choose_cases(Shards(samples), "instruct", prompt, seed).cases
    assert {case.key for case in cases} == {f"{name}_A" for name, count in num_turns.items() if count}
    random.shuffle(samples)
    other = choose_cases(Shards(samples), "instruct", prompt, seed, num_proteins=few, num_questions=2).cases
    assert [case.key for case in other] == [case.key for case in cases][:few]
    assert all(case.turns == whole.turns[:2] for case, whole in zip(other, cases))


def test_stage_align_asks_for_the_description(prompt):
    (case,) = choose_cases(Shards([sample("1abc", 0)]), "align", prompt, 42).cases
    assert case.turns == (Turn("", "It is."),) and case.wanted == [("1abc_A", 0)]


def test_what_cannot_be_read_is_named_and_the_others_are_asked(prompt):
    shards = Shards([sample("1abc"), sample("2abc"), sample("3abc")], broken=("2abc_A",))
    chosen = choose_cases(shards, "instruct", prompt, 42)
    assert {case.key for case in chosen.cases} == {"1abc_A", "3abc_A"} and chosen.unreadable == ["2abc_A"]


LONG = [sample("1abc", num_residues=30), sample("2abc", num_residues=31), sample("3abc", num_residues=50)]


@pytest.mark.parametrize(
    "data, shown, left_out",
    [
        (DataConfig(), {"1abc_A": 30, "2abc_A": 31, "3abc_A": 50}, set()),
        (DataConfig(max_residues=30), {"1abc_A": 30}, {"2abc_A", "3abc_A"}),
        (DataConfig(max_residues=30, long_proteins="crop"), {"1abc_A": 30, "2abc_A": 30, "3abc_A": 30}, set()),
    ],
)
def test_long_proteins_are_shown_as_in_training(prompt, data, shown, left_out):
    shards = Shards(LONG)
    chosen = choose_cases(shards, "instruct", prompt, 42, data)
    assert {case.key: case.num_residues for case in chosen.cases} == shown and set(chosen.too_long) == left_out
    for case in chosen.cases:
        protein, whole = shown_protein(shards, case.number, data), LONG[case.number].protein
        begin = (len(whole) - shown[case.key]) // 2  # the middle
        assert protein.sequence == whole.sequence[begin : begin + shown[case.key]]
        np.testing.assert_array_equal(protein.backbone, whole.backbone[begin : begin + shown[case.key]])
        # nothing that remembers rows confuses the two
        assert (protein.key == whole.key) == (len(protein) == len(whole))


def test_what_does_not_fit_the_context_by_hand(prompt):
    """`</protein> Why? ###Assistant: ` is 31 ids, in place of Why? the longest question; 40 ids before it, 5 new
    ones."""
    asked = Sample(LONG[0].protein, "", (Turn("Why?", "So."), Turn("Why not?", "So.")))
    (case,) = choose_cases(Shards([asked]), "instruct", prompt, 42).cases
    assert case.question_tokens == len("</protein> Why not? ###Assistant: ")
    longest = 40 + case.question_tokens + 5
    assert fits(case, 40, longest, 5) and not fits(case, 40, longest - 1, 5)


def test_a_case_is_missing_while_one_of_its_questions_is():
    cases = [Case(f"p{i}", i, 9, (Turn("Q", "A"),) * 2) for i in range(3)]
    there = {("p0", 0), ("p0", 1), ("p1", 1), ("other", 0)}
    assert missing_of(cases, there) == cases[1:]


def test_of_several_sets_each_protein_says_its_own(prompt, tmp_path):
    for name in ("pdb", "afdb"):
        write_shards(tmp_path / name, {"test": [sample("1abc")]}, samples_per_shard=10, options={})
    both = Mixture({str(tmp_path / name): ShardSet(tmp_path / name, "test") for name in ("pdb", "afdb")},
                   {str(tmp_path / name): weight for name, weight in (("pdb", 1.0), ("afdb", 0.5))})  # fmt: skip
    cases = choose_cases(both, "instruct", prompt, 42).cases
    assert {case.key: (set_of(both, case.key), key_in_set(both, case.key)) for case in cases} == {
        "pdb/1abc_A": ("pdb", "1abc_A"), "afdb/1abc_A": ("afdb", "1abc_A")
    }  # fmt: skip
    assert set_of(Shards([]), "pdb/1abc_A") is None and key_in_set(Shards([]), "1abc_A") == "1abc_A"
