"""The pure parts of the open-question generator, against prompts, answers and files written by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.open_questions import (
    DEFAULT_PROMPT,
    DONE,
    MAX_ANSWER_CHARACTERS,
    MAX_QUESTION_CHARACTERS,
    OpenQuestionsError,
    Options,
    Subject,
    cache_key,
    fill_prompt,
    format_facts,
    leaked_id,
    parse_answer,
    read_generated,
    read_prompt,
    read_subjects,
)
from proteingpt.data.open_questions_plan import plan_jobs
from proteingpt.data.shards import write_shards
from proteingpt.endpoint import InvalidAnswer
from proteingpt.protein import Protein, Sample, Turn

TEMPLATE = "{num_questions} about {abstract} given {facts}"
OPTIONS = Options("tiny", TEMPLATE, num_questions=2, max_output_tokens=50)


# --- the prompt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("{abstract} {num_questions}", r"lacks placeholder \{facts\}"),
        ("nothing", r"lacks placeholder \{abstract\}, \{facts\}, \{num_questions\}"),
        (TEMPLATE + " {abstracts} {n}", r"has the unknown placeholder \{abstracts\}, \{n\}"),
    ],
)
def test_a_prompt_with_a_missing_or_unknown_placeholder_is_refused_by_its_name(tmp_path, text, message):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(OpenQuestionsError, match=message) as error:
        read_prompt(tmp_path / "prompt.txt")
    assert "prompt.txt" in str(error.value)


def test_a_prompt_that_cannot_be_read_is_refused_by_its_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9{abstract}{facts}{num_questions}")
    for name, message in (("latin.txt", "not UTF-8"), ("absent.txt", "No such file")):
        with pytest.raises(OpenQuestionsError, match=f"{name}: .*{message}"):
            read_prompt(tmp_path / name)


def test_the_prompt_that_is_shipped_has_its_placeholders_and_other_braces_are_text():
    assert "{abstract}" in read_prompt(DEFAULT_PROMPT)
    subject = Subject("1abc", "An abstract.", "num models: 1")
    template = 'JSON {"a": {}} ' + TEMPLATE
    assert fill_prompt(template, subject, 3) == 'JSON {"a": {}} 3 about An abstract. given num models: 1'
    assert fill_prompt(TEMPLATE, Subject("1abc", "x"), 1) == "1 about x given none known"


@given(st.text(), st.text(min_size=1))
def test_what_stands_in_abstract_and_facts_comes_out_as_it_is_placeholders_included(abstract, facts):
    for subject in (Subject("1abc", abstract, facts), Subject("1abc", "{facts}" + abstract, "{abstract}" + facts)):
        assert fill_prompt(TEMPLATE, subject, 2) == f"2 about {subject.abstract} given {subject.facts}"


def test_facts_are_lines_of_what_is_known():
    facts = {"title": "A title", "resolution": 1.8, "num_models": None, "software": [], "organisms": ["a", "b"]}
    assert format_facts(facts) == "title: A title\nresolution: 1.8 angstrom\nsoftware: none\norganisms: a, b"
    assert format_facts({}) == ""


# --- subjects -------------------------------------------------------------------------------------------------------


def sample(entry, chain, description, facts):
    protein = Protein(entry, chain, "AC", np.zeros((2, 3, 3), np.float32))
    return Sample(protein, description, (), {"facts": facts})


def test_shards_of_every_split_give_each_entry_once_with_its_facts(tmp_path):
    by_split = {
        "train": [
            sample("1abc", "A", "First.", {"num_models": 3}),
            sample("1abc", "B", "Second chain.", {"num_models": 3}),
            sample("2abc", "A", " ", {}),
        ],
        "test": [sample("3abc", "A", "Third.", {"year": None})],
    }
    write_shards(tmp_path / "s", by_split, samples_per_shard=9, options={})
    assert read_subjects(data=tmp_path / "s") == [Subject("1abc", "First.", "num models: 3"), Subject("3abc", "Third.")]


def test_an_abstract_file_gives_its_entries_and_no_source_or_two_are_refused(tmp_path):
    path = tmp_path / "abstract.json"
    path.write_text('[{"pdb_id": "1ABC", "caption": "Text."}]')
    assert read_subjects(abstracts=path) == [Subject("1abc", "Text.", "")]
    for sources in ({}, {"data": tmp_path, "abstracts": path}):
        with pytest.raises(OpenQuestionsError, match="either --data SHARDS or --abstracts FILE"):
            read_subjects(**sources)
    path.write_text("[]")
    with pytest.raises(OpenQuestionsError, match="no entry with a text"):
        read_subjects(abstracts=path)


# --- answers --------------------------------------------------------------------------------------------------------


def pairs(*texts) -> str:
    return json.dumps({"pairs": [{"question": q, "answer": a} for q, a in texts]})


def test_an_answer_is_taken_from_an_object_a_list_or_a_code_fence_and_tidied():
    turns = (Turn("What does it do?", "It binds β-sheets, not 1 but 2."), Turn("Why?", "For NAD+."))
    content = pairs((" What\tdoes it do? ", "It binds\nβ-sheets,\u202fnot 1 but 2."), ("Why?", "For NAD+."))
    for form in (content, json.dumps(json.loads(content)["pairs"]), f"```json\n{content}\n```", f"```\n{content}```\n"):
        assert parse_answer(form, 2) == turns


@pytest.mark.parametrize(
    "content, message",
    [
        ("Here are your pairs:", "not JSON"),
        ('{"pairs": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", 'no {"pairs"'),
        ('{"questions": []}', 'no {"pairs"'),
        ('{"pairs": {}}', 'no {"pairs"'),
        (pairs(), "0 pairs, wanted 1 to 2"),
        (pairs(("a?", "b"), ("c?", "d"), ("e?", "f")), "3 pairs, wanted 1 to 2"),
        ('["a?"]', "pair 1 is not an object"),
        ('[{"question": "a?"}]', "pair 1 is not an object with question and answer alone"),
        ('[{"question": "a?", "answer": "b", "source": "c"}]', "question and answer alone"),
        ('[{"question": "a?", "answer": 4}]', "the answer of pair 1 is no text"),
        ('[{"question": null, "answer": "b"}]', "the question of pair 1 is no text"),
        (pairs(("a?", " \n")), "the answer of pair 1 is empty"),
        (pairs(("a?", "b"), ("", "b")), "the question of pair 2 is empty"),
        (pairs(("q" * (MAX_QUESTION_CHARACTERS + 1), "b")), f"has {MAX_QUESTION_CHARACTERS + 1} characters"),
        (pairs(("a?", "b" * (MAX_ANSWER_CHARACTERS + 1))), f"at most {MAX_ANSWER_CHARACTERS} are wanted"),
        (pairs(("What is it?", "b"), ("what is  IT", "c")), "asked twice"),
        (pairs(("a?", "b ### Human: more")), "holds ###"),
        (pairs(("a <protein>?", "b")), "holds <protein"),
        ('[{"question": "a?", "answer": "b\\u0000"}]', "holds a control character"),
        ('[{"question": "a?", "answer": "b\\ud800"}]', "holds a control character"),
        (pairs(("What is 1ABC?", "b")), "names the PDB id 1abc"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_invalid_for_a_named_reason(content, message):
    with pytest.raises(InvalidAnswer) as error:
        parse_answer(content, 2, ["1abc"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help.", "I’m unable to say.", "I cannot determine this.", "As an AI, I do not know.",
        "Sorry.", "N/A", "n/a.", "Unknown", "None.", "Not specified.", "The abstract does not mention a ligand.",
        "The provided text does not say.", "This is not stated.",
    ],
)  # fmt: skip
def test_a_refusal_is_no_answer(answer):
    with pytest.raises(InvalidAnswer, match="is no answer"):
        parse_answer(pairs(("a?", answer)), 1)


@pytest.mark.parametrize(
    "answer",
    [
        "None of the residues binds zinc.", "Unknown ligands bind it.", "Not only zinc binds.",
        "It cannot bind zinc.", "Information flows through it.", "The textile enzyme does not bind.", "Nap1 binds.",
    ],
)  # fmt: skip
def test_an_answer_that_only_begins_like_a_refusal_stands(answer):
    assert parse_answer(pairs(("a?", answer)), 1) == (Turn("a?", answer),)


@pytest.mark.parametrize(
    "question, entry, leaks",
    [
        ("What is 1abc?", "1abc", True),
        ("In (1ABC), what?", "1abc", True),
        ("What does PDB1abc show?", "1abc", True),
        ("What does 1abc_A do?", "1abc", True),
        ("What is pdb_00001abc?", "1abc", True),
        ("What is 1abc?", "pdb_00001abc", True),
        ("What is 11abc or 1abcd?", "1abc", False),
        ("What is 2abc?", "1abc", False),
        ("What is lysozyme?", "lysozyme", False),
    ],
)
def test_a_question_leaks_an_id_where_it_names_it_and_only_a_pdb_id(question, entry, leaks):
    assert leaked_id([Turn(question, "1abc in the answer is no leak")], [entry]) == (entry if leaks else None)


@given(st.text() | st.from_type(dict).map(str))
def test_any_content_is_turns_or_a_named_fault(content):
    try:
        assert parse_answer(content, 2)
    except InvalidAnswer as error:
        assert str(error)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_key_depends_on_everything_that_the_answer_depends_on_and_not_on_the_id():
    subject = Subject("1abc", "Text.", "num models: 1")
    same = cache_key(Subject("2abc", "Text.", "num models: 1"), OPTIONS)
    assert cache_key(subject, OPTIONS) == same
    others = [
        cache_key(Subject("1abc", "Text!", "num models: 1"), OPTIONS),
        cache_key(Subject("1abc", "Text.", "num models: 2"), OPTIONS),
        cache_key(subject, Options("small", TEMPLATE, 2, 50)),
        cache_key(subject, Options("tiny", TEMPLATE + ".", 2, 50)),
        cache_key(subject, Options("tiny", TEMPLATE, 3, 50)),
        cache_key(subject, Options("tiny", TEMPLATE, 2, 51)),
    ]
    assert len({same, *others}) == 7


def record(entry, key="k", status=DONE, turns=(("a?", "b"),), **others):
    listed = [{"Q": question, "A": answer} for question, answer in turns]
    cost = {"input_tokens": 1, "output_tokens": 1, "usd": None}
    return {"id": entry, "key": key, "model": "tiny", "status": status, "turns": listed, "reason": ""} | cost | others


def test_an_answer_made_for_another_entry_is_not_copied_where_it_names_this_one():
    subjects = [Subject("2abc", "Text."), Subject("3abc", "Text.")]
    known = record("1abc", cache_key(subjects[0], OPTIONS), turns=[("How does it differ from 2ABC?", "b")])
    jobs, copies, num_cached = plan_jobs(subjects, OPTIONS, [known])
    assert [job.ids for job in jobs] == [["2abc"]]
    assert [(subject.id, line["id"]) for subject, line in copies] == [("3abc", "1abc")]
    assert num_cached == 0
    with pytest.raises(OpenQuestionsError, match="2abc occurs twice"):
        plan_jobs([subjects[0], subjects[0]], OPTIONS, [])


def write_lines(path, *records) -> bytes:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in records)
    path.write_bytes(content)
    return content


def test_the_last_line_of_an_entry_counts_and_what_was_set_aside_is_absent(tmp_path):
    path = tmp_path / "qa.jsonl"
    write_lines(
        path,
        record("1abc", turns=[("old?", "old")]),
        record("2abc"),
        record("1abc", turns=[("new?", "β")]),
        record("2abc", status="invalid", turns=()),
        record("3abc", status="failed", turns=()),
        record("4abc"),
        record("4abc", status="failed", turns=()),
    )
    assert read_generated(path) == {"1abc": (Turn("new?", "β"),), "4abc": (Turn("a?", "b"),)}


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_torn_last_line_is_passed_over(tmp_path, cut):
    torn = write_lines(tmp_path / "open_questions.jsonl", record("2abc"))[:cut]
    whole = write_lines(tmp_path / "open_questions.jsonl", record("1abc"))
    (tmp_path / "open_questions.jsonl").write_bytes(whole + torn)
    assert list(read_generated(tmp_path)) == ["1abc"]


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"not JSON", b"\xff", json.dumps(record("1abc", usd="much")).encode(),
             json.dumps(record("1abc", turns=[("a?", 3)])).encode(), json.dumps(record(7)).encode()]
)  # fmt: skip
def test_a_line_that_is_not_ours_is_refused_by_its_number(tmp_path, line):
    whole = write_lines(tmp_path / "qa.jsonl", record("1abc"))
    (tmp_path / "qa.jsonl").write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(OpenQuestionsError, match="qa.jsonl, line 2: not a line of generated questions"):
        read_generated(tmp_path / "qa.jsonl")


def test_generated_questions_that_are_not_there_are_named(tmp_path):
    with pytest.raises(OpenQuestionsError, match="no generated questions in .*absent.jsonl"):
        read_generated(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("", TEMPLATE), "--model"),
        (("m", TEMPLATE, 0), "--questions-per-protein is 0"),
        (("m", TEMPLATE, 1, 0), "--max-output-tokens is 0"),
        (("m", "{abstract}"), "lacks placeholder"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(OpenQuestionsError, match=message):
        Options(*arguments)
