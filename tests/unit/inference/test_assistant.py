"""Asking a model about a protein, whole or in part."""

import dataclasses

import pytest
import torch
from exported import export_model

from proteingpt.data.shards import ShardSet
from proteingpt.inference import subject
from proteingpt.inference.assistant import KEPT_PREFIXES, Assistant, TooLong
from proteingpt.inference.generate import answer
from proteingpt.inference.subject import SubjectError


@pytest.fixture(scope="module")
def samples(demo_assets):
    test = ShardSet(demo_assets, "test")
    return [test.read(i) for i in range(3)]


def test_pieces_joined_are_the_answer_and_the_answer_is_the_evaluation_s(assistant, samples):
    for sample in samples:
        questions = [turn.question for turn in sample.turns[:3]]
        rows = [part[0] for part in assistant.encoders.encode([sample.protein])]
        wanted = answer(assistant.model, assistant.prompt, *rows, questions, max_new_tokens=12)
        assert assistant.ask(sample.protein, questions) == wanted
        assert ["".join(assistant.stream(sample.protein, question)) for question in questions] == wanted
    assert assistant.ask(samples[0].protein, []) == []


def test_what_is_not_there_has_no_rows_in_the_prompt(assistant, samples):
    """As an evaluation's structure-only and sequence-only have it: an empty piece in the place of the rows."""
    protein = samples[0].protein
    structure, sequence = (part[0] for part in assistant.encoders.encode([protein]))
    for given, rows in (
        (subject.protein_of_sequence(protein.sequence), (structure[:0], sequence)),
        (dataclasses.replace(protein, sequence="X" * len(protein)), (structure, sequence[:0])),
    ):
        wanted = answer(assistant.model, assistant.prompt, *rows, ["What is it?"], max_new_tokens=12)
        assert assistant.ask(given, ["What is it?"]) == wanted
        assert len(assistant.missing(given)) == 1


def test_a_prefix_is_kept_for_what_the_encoders_read_not_for_a_name(assistant, samples):
    assistant.prefixes.clear()
    first, second = (sample.protein for sample in samples[:2])
    renamed = dataclasses.replace(second, id=first.id)
    assert first.key == renamed.key
    assert not torch.equal(assistant.prefix(first)[:9], assistant.prefix(renamed)[:9])
    assert assistant.prefix(second) is assistant.prefix(renamed) and len(assistant.prefixes) == 2
    for length in range(1, KEPT_PREFIXES + 3):
        assistant.prefix(subject.protein_of_sequence("A" * length))
    assert len(assistant.prefixes) == KEPT_PREFIXES


def test_the_answer_is_cut_to_the_room_and_without_room_refused(assistant):
    """The demo's context has 4,096 positions."""
    front = len(assistant.prompt.prefix_ids) + len(assistant.prompt.question_ids(["?"])[0])
    fits = 4096 - front - 2 - 5  # residues that leave five positions, BOS and EOS rows counted
    protein = subject.protein_of_sequence("A" * fits)
    assert assistant.fit(protein, ["?"]).max_new_tokens == 5
    with pytest.raises(TooLong, match=f"{fits + 5} residues .* take 4096 positions, .* context has 4096"):
        assistant.fit(subject.protein_of_sequence("A" * (fits + 5)), ["?"])


def test_a_model_of_structures_alone_refuses_a_sequence_alone(tmp_path, demo_assets, samples):
    blind = Assistant.load(
        export_model(tmp_path / "model", demo_assets, 1, esm2="none"), device="cpu", max_new_tokens=4
    )
    assert blind.reads == (True, False)
    assert blind.missing(samples[0].protein) == [] and len(blind.ask(samples[0].protein, ["What is it?"])) == 1
    with pytest.raises(SubjectError, match="this model reads the structure"):
        blind.ask(subject.protein_of_sequence("MKV"), ["What is it?"])
