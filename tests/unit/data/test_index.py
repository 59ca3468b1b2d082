"""The token index: the ids are those of each text on its own, and a changed input never meets an old file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from proteingpt.data.columns import Joined
from proteingpt.data.index import (
    TokenIndex,
    Tokens,
    build_index,
    in_order,
    index_name,
    join_indexes,
    num_longer,
    open_index,
    tokenise_once,
    usable,
)
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.protein import Protein, Sample, Turn


def sample(number: int, description: str, turns: tuple[Turn, ...], length: int = 3) -> Sample:
    backbone = np.zeros((length, 3, 3), np.float32)
    return Sample(Protein(f"{number}abc", "A", "A" * length, backbone), description, turns)


SAMPLES = [
    sample(1, "An enzyme.", (Turn("Is it?", "Yes"), Turn("How many residues?", "3"))),
    sample(2, "", (Turn("Who?", "No one knows"),)),
    sample(3, "Nothing is asked of it.", ()),
    sample(4, "A dimer.", (Turn("", "x"), Turn("Why?", ""), Turn("Is it?", "No"))),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    splits = {"train": SAMPLES, "test": [sample(9, "A dimer.", SAMPLES[0].turns)]}
    write_shards(directory, splits, samples_per_shard=3, options={})
    return ShardSet(directory, "train")


@pytest.fixture(scope="module")
def prompt(characters):
    tokenizer = characters()
    return lambda family="released", stage="instruct", longest=8: Prompt(tokenizer, TEMPLATES[family, stage], longest)


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_the_index_of_instruct_by_hand(shards, prompt):
    index = build_index(shards, "instruct", prompt())
    assert index.first_turn.tolist() == [0, 2, 3, 3, 6]
    assert index.num_turns.tolist() == [2, 1, 0, 3]
    questions = ["Is it?", "How many residues?", "Who?", "", "Why?", "Is it?"]
    for number, question in enumerate(questions):
        assert index.questions[number].tolist() == codes(f"</protein> {question} ###Assistant: ")
    answers = ["Yes###", "3###", "No one k", "x###", "###", "No###"]  # the third is cut at 8 tokens
    assert [index.answers[n].tolist() for n in range(6)] == [codes(a) for a in answers]
    assert index.answers.lengths.tolist() == [6, 4, 8, 4, 3, 5]


def test_the_index_of_align_by_hand(shards, prompt):
    index = build_index(shards, "align", prompt("released", "align", 384))
    assert index.first_turn.tolist() == [0, 1, 1, 2, 3]  # the second has no description
    assert index.questions.lengths.tolist() == [0, 0, 0]
    described = ["An enzyme.\n", "Nothing is asked of it.\n", "A dimer.\n"]
    assert [index.answers[n].tolist() for n in range(3)] == [codes(d) for d in described]


@pytest.mark.parametrize("family", ["paper", "released"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_ids_are_those_of_tokenising_one_text_at_a_time(demo_assets, family, stage):
    """With a real tokenizer, whose merges could reach over the borders of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(demo_assets / "llm", local_files_only=True)
    template = TEMPLATES[family, stage]
    shards = ShardSet(demo_assets, "train")
    index = build_index(shards, stage, Prompt(tokenizer, template, 384))
    number = 0
    for i in range(len(shards)):
        description, turns = shards.read_text(i)
        for question, answer in [("", description)] if stage == "align" else [(t.question, t.answer) for t in turns]:
            before = tokenizer.encode(template.after.replace("{question}", question), add_special_tokens=False)
            after = tokenizer.encode(answer + (template.end or ""), add_special_tokens=False)
            assert index.questions[number].tolist() == before
            assert index.answers[number].tolist() == after + ([tokenizer.eos_token_id] if family == "paper" else [])
            number += 1
        assert index.first_turn[i + 1] == number
    assert number == len(index.questions.starts) - 1 == len(index.answers.starts) - 1 > 0


def test_batches_of_samples_leave_no_seam(shards, prompt, monkeypatch):
    whole = build_index(shards, "instruct", prompt())
    monkeypatch.setattr("proteingpt.data.index.BATCH", 3)
    assert same(build_index(shards, "instruct", prompt()), whole)


def same(one, other) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in [
            (one.questions.ids, other.questions.ids),
            (one.questions.starts, other.questions.starts),
            (one.answers.ids, other.answers.ids),
            (one.answers.starts, other.answers.starts),
            (one.first_turn, other.first_turn),
        ]
    )


def test_the_file_is_made_once_and_then_read(shards, prompt, tmp_path):
    first = open_index(shards, "instruct", prompt(), tmp_path)
    files = list(tmp_path.iterdir())
    assert [path.name for path in files] == [index_name(shards, "instruct", prompt())]
    before = first.answers.ids.copy()
    # Altered on disk: what comes back says where it was taken from.
    (files[0] / "answer_ids").write_bytes((before + 1).astype("<i4").tobytes())
    second = open_index(shards, "instruct", prompt(), tmp_path)
    assert np.array_equal(second.answers.ids, before + 1)
    assert np.array_equal(second.questions.ids, first.questions.ids)
    assert list(tmp_path.iterdir()) == files


def test_a_file_reads_back_as_what_was_built(shards, prompt, tmp_path):
    built = open_index(shards, "instruct", prompt(), tmp_path)
    read = open_index(shards, "instruct", prompt(), tmp_path)
    assert same(built, read)
    assert read.questions.ids.dtype == np.int32 and read.first_turn.dtype == np.int64


def test_another_tokenizer_template_length_stage_or_split_makes_another_file(shards, prompt, characters):
    other = characters(spare="\x80")
    tokenizers = {"tokenizer": Prompt(other, TEMPLATES["released", "instruct"], 8)}
    prompts = {"same": prompt(), "family": prompt("paper"), "length": prompt(longest=9), **tokenizers}
    names = {why: index_name(shards, "instruct", made) for why, made in prompts.items()}
    names["stage"] = index_name(shards, "align", prompt())
    names["split"] = index_name(ShardSet(shards.directory, "test"), "instruct", prompt())
    assert len(set(names.values())) == len(names)
    assert index_name(shards, "instruct", prompt()) == names["same"]


def test_shards_with_one_other_letter_make_another_file(shards, prompt, tmp_path):
    changed = [*SAMPLES[:3], sample(4, "A dimer!", SAMPLES[3].turns)]
    for name, samples in (("a", SAMPLES), ("b", changed)):
        write_shards(tmp_path / name, {"train": samples}, samples_per_shard=3, options={})
    a, b = (index_name(ShardSet(tmp_path / name, "train"), "align", prompt()) for name in "ab")
    assert a == index_name(shards, "align", prompt()) and a != b


def test_a_split_without_samples_has_an_empty_index(prompt, tmp_path):
    write_shards(tmp_path, {"train": SAMPLES, "test": []}, samples_per_shard=3, options={})
    index = open_index(ShardSet(tmp_path, "test"), "instruct", prompt(), tmp_path)
    assert index.first_turn.tolist() == [0] and index.num_turns.tolist() == []


def test_a_run_that_was_killed_while_it_built_is_not_taken_for_an_index(shards, prompt, tmp_path):
    """What it left has another name; and a run that finds the index made meanwhile takes it."""
    name = index_name(shards, "instruct", prompt())
    (tmp_path / f"{name}.elsewhere-1.partial").mkdir()
    built = open_index(shards, "instruct", prompt(), tmp_path)
    assert same(built, build_index(shards, "instruct", prompt()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.elsewhere-1.partial"]


def test_where_nothing_can_be_written_the_index_is_made_all_the_same(shards, prompt, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as root, who may write anywhere
    assert same(open_index(shards, "instruct", prompt(), tmp_path), build_index(shards, "instruct", prompt()))
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_tokenised_once_and_found_wherever_it_stands():
    asked = []

    def tokenise(texts):
        asked.extend(texts)
        return [codes(text) for text in texts]

    ids, lengths = tokenise_once(["ab", "c", "ab", ""], tokenise)
    assert asked == ["ab", "c", ""] and ids.dtype == np.int32
    assert ids.tolist() == codes("abcab") and lengths.tolist() == [2, 1, 2, 0]
    assert [part.tolist() for part in tokenise_once([], tokenise)] == [[], []]


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 4))
def test_what_threads_make_comes_in_order(items, threads):
    assert list(in_order(lambda item: item * 2, items, threads)) == [item * 2 for item in items]


@pytest.mark.parametrize("text", ["<s>Is it?</s>", "  two  blanks ", "\u00e5ngstr\u00f6m", "a" * 3000])
def test_a_bare_tokenizer_gives_what_its_wrapper_gives(demo_assets, text):
    """Special tokens in a text, blanks, letters it does not know, and a length beyond any truncation that was set."""
    tokenizer = AutoTokenizer.from_pretrained(demo_assets / "llm", local_files_only=True)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer("cut it", truncation=True, max_length=5, padding="max_length")
    prompt = Prompt(tokenizer, TEMPLATES["released", "instruct"], 384)
    assert prompt.is_bare and prompt.encode([text, "x"])[0] == wanted


def test_two_indexes_joined_are_the_index_of_both(prompt, tmp_path):
    for name, samples in (("a", SAMPLES[:2]), ("b", SAMPLES[2:]), ("both", SAMPLES)):
        write_shards(tmp_path / name, {"train": samples}, samples_per_shard=3, options={})
    a, b, both = (build_index(ShardSet(tmp_path / name, "train"), "instruct", prompt()) for name in ("a", "b", "both"))
    joined = join_indexes([a, b])
    turns = range(len(both.questions.starts) - 1)
    assert joined.first_turn[0:5].tolist() == both.first_turn.tolist() and joined.num_turns.tolist() == [2, 1, 0, 3]
    for name in ("questions", "answers"):
        one, other = getattr(joined, name), getattr(both, name)
        assert [one[n].tolist() for n in turns] == [other[n].tolist() for n in turns]
        assert one.lengths.tolist() == other.lengths.tolist() == one.lengths_at(np.array(turns)).tolist()
    lengths = np.array([3, 3, 3, 3])
    assert usable(joined, lengths, 20, 77, None).tolist() == usable(both, lengths, 20, 77, None).tolist()
    assert join_indexes([a]) is a


def test_a_sample_that_will_be_cropped_is_as_long_as_its_crop(shards, prompt):
    """44 + 4 tokens of the longest question, 20 before the protein: 78 takes 3 residues, and more only if they are
    cut."""
    index, lengths = build_index(shards, "instruct", prompt()), np.array([3, 4, 900, 3])
    assert usable(index, lengths, 20, 78, 3).tolist() == [True, False, False, True]
    assert usable(index, lengths, 20, 78, 3, crop=True).tolist() == [True] * 4
    assert usable(index, lengths, 20, 77, 3, crop=True).tolist() == [False, True, True, True]
    assert usable(index, lengths, 20, 10_000, None, crop=True).all()


def test_usable_at_the_very_edge_of_the_context(shards, prompt):
    """Question and answer of sample 1, the longest: 2nd turn, len("</protein> How many residues? ###Assistant: ") = 44
    and 4; behind a prefix of 20 ids and 2 * (3 + 2) = 10 protein rows."""
    index = build_index(shards, "instruct", prompt())
    assert len("</protein> How many residues? ###Assistant: ") == 44
    lengths = np.array([3, 3, 3, 3], np.int32)

    def fits(context, residues=lengths, longest=None):
        return usable(index, residues, 20, context, longest).tolist()

    assert fits(20 + 10 + 44 + 4) == [True] * 4
    assert fits(20 + 10 + 44 + 4 - 1) == [False, True, True, True]
    # One residue more is two rows more.
    assert fits(78, np.array([4, 3, 3, 3], np.int32)) == [False, True, True, True]
    assert fits(80, np.array([4, 3, 3, 3], np.int32)) == [True] * 4
    # A sample of which nothing is asked is as long as its prefix.
    assert fits(30) == [False, False, True, False] and fits(29) == [False] * 4


def test_usable_at_the_very_edge_of_max_residues(shards, prompt):
    index = build_index(shards, "instruct", prompt())
    residues = np.array([3, 4, 5, 6], np.int32)
    assert usable(index, residues, 20, 10_000, 4).tolist() == [True, True, False, False]
    assert usable(index, residues, 20, 10_000, None).all()


def test_pieces_of_the_samples_leave_no_seam(shards, prompt, monkeypatch):
    """Behind 20 ids and 2 * (residues + 2) rows the longest questions take 48, 38, 0 and 37: 78, 80, 84 and 71 in
    all."""
    index, lengths = build_index(shards, "instruct", prompt()), np.array([3, 9, 30, 5], np.int32)
    for at_once in (1, 3, 4, 100):
        monkeypatch.setattr("proteingpt.data.columns.AT_ONCE", at_once)
        for one in (lengths, Joined([lengths[:1], lengths[1:]])):
            assert usable(index, one, 20, 79, None).tolist() == [True, False, False, True]
            assert num_longer(one, np.array([True, True, False, True]), 4) == 2


def test_usable_counts_past_32_bits():
    """Twice the largest int32 of residues must not wrap around to a length that fits."""
    nothing = Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64))
    none = TokenIndex(nothing, nothing, np.array([0, 0], np.int64))
    assert not usable(none, np.array([2**31 - 1], np.int32), 0, 10_000, None).any()
