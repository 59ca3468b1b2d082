"""Prompts against strings and ids written by hand, with a tokenizer of one id per character (its ASCII code)."""

import pytest

from proteingpt.data.prompts import TEMPLATES, Prompt, turns_of_stage
from proteingpt.protein import Turn

BOS, EOS = 1, 2
QUESTION = "Is it an enzyme?"


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def prompt(characters):
    tokenizer = characters()
    return lambda family, stage, longest=384: Prompt(tokenizer, TEMPLATES[family, stage], longest)


# family, stage, question, answer -> what stands before the protein, behind it, and the answer with its end.
# From section 3 of the paper: Q: <protein><proteinHere></protein><QuestionPrompt> A: <Description>
# and from the published code: ###Human: <protein><proteinHere></protein> {question} ###Assistant: {answer}###
WRITTEN = [
    ("paper", "align", "", "An enzyme.", "Q: <protein>", "</protein> A: ", "An enzyme.", [EOS]),
    ("paper", "instruct", QUESTION, "Yes", "Q: <protein>", "</protein>Is it an enzyme? A: ", "Yes", [EOS]),
    ("released", "align", "", "An enzyme.", "", "", "An enzyme.\n", []),
    (
        "released", "instruct", QUESTION, "Yes",
        "###Human: <protein>", "</protein> Is it an enzyme? ###Assistant: ", "Yes###", [],
    ),
]  # fmt: skip


@pytest.mark.parametrize("family, stage, question, answer, before, after, answered, end", WRITTEN)
def test_each_template_is_written_as_published(prompt, family, stage, question, answer, before, after, answered, end):
    made = prompt(family, stage)
    assert made.prefix_ids == [BOS] + codes(before)
    assert made.question_ids([question]) == [codes(after)]
    assert made.answer_ids([answer]) == [codes(answered) + end]


def test_every_family_has_both_stages():
    assert set(TEMPLATES) == {(family, stage) for family in ("paper", "released") for stage in ("align", "instruct")}


@pytest.mark.parametrize("family, stage, question, answer, before, after, answered, end", WRITTEN)
def test_a_tokenizer_without_bos_begins_with_the_text(
    characters, family, stage, question, answer, before, after, answered, end
):
    made = Prompt(characters(bos=None), TEMPLATES[family, stage], 384)
    assert made.prefix_ids == codes(before)
    assert made.question_ids([question]) == [codes(after)]


def test_the_symbol_that_ends_decoding_is_the_one_that_was_trained(prompt):
    ends = {key: prompt(*key).end_text for key in TEMPLATES}
    assert ends == {
        ("paper", "align"): "</s>", ("paper", "instruct"): "</s>",
        ("released", "align"): "\n", ("released", "instruct"): "###",
    }  # fmt: skip


@pytest.mark.parametrize(
    "family, longest, ids",
    [
        ("released", 6, codes("Yes###")),  # just fits, with its end
        ("released", 5, codes("Yes##")),
        ("released", 3, codes("Yes")),
        ("released", 1, codes("Y")),
        ("paper", 4, codes("Yes") + [EOS]),
        ("paper", 3, codes("Yes")),
        ("paper", 2, codes("Ye")),
    ],
)
def test_truncation_cuts_the_answers_tail_and_with_it_the_end(prompt, family, longest, ids):
    assert prompt(family, "instruct", longest).answer_ids(["Yes"]) == [ids]


def test_truncation_never_cuts_the_prompt(prompt):
    made = prompt("released", "instruct", 1)
    assert made.prefix_ids == [BOS] + codes("###Human: <protein>")
    assert made.question_ids([QUESTION]) == [codes("</protein> Is it an enzyme? ###Assistant: ")]


def test_many_texts_come_back_in_their_places(prompt):
    asked = ["A?", "", "BB?", ""]
    assert prompt("paper", "instruct").question_ids(asked) == [codes(f"</protein>{q} A: ") for q in asked]
    assert prompt("released", "align").question_ids(["", ""]) == [[], []]
    assert prompt("released", "align").answer_ids(["x", "", "yz"]) == [codes("x\n"), codes("\n"), codes("yz\n")]
    assert prompt("paper", "align").question_ids([]) == [] == prompt("paper", "align").answer_ids([])


def test_a_question_is_text_and_not_a_template(prompt):
    asked = "What is {question}, {0} and %s?"
    assert prompt("paper", "instruct").question_ids([asked]) == [codes("</protein>What is {question}, {0} and %s? A: ")]


def test_even_an_empty_answer_teaches_its_end(prompt):
    assert prompt("paper", "instruct").answer_ids([""]) == [[EOS]]
    assert prompt("released", "instruct").answer_ids([""]) == [codes("###")]


TURNS = (Turn("Is it?", "Yes"), Turn("How many?", "3"))


def test_align_asks_for_the_description_with_an_empty_question():
    assert turns_of_stage("align", "An enzyme.", TURNS) == (Turn("", "An enzyme."),)
    assert turns_of_stage("align", "", TURNS) == ()


def test_instruct_asks_the_samples_own_questions():
    assert turns_of_stage("instruct", "An enzyme.", TURNS) == TURNS
    assert turns_of_stage("instruct", "An enzyme.", ()) == ()
