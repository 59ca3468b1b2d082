"""The conversation as it is saved and shown."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.inference.conversation import NOTE, Exchange, SaveError, as_json, as_markdown, printable, save

TWO = [
    Exchange(
        "1cbs_A", "What is *it*?", "A <b>carrier</b>.\n# of retinoids", ("3 of 137 residues have no coordinates.",)
    ),
    Exchange("1cbs_A", "Where?", "N/A"),
]


@given(st.lists(st.builds(Exchange, st.text(), st.text(), st.text(), st.lists(st.text()).map(tuple))))
def test_json_holds_everything(exchanges):
    values = json.loads(as_json("runs/x/model", exchanges))
    assert values["note"] == NOTE and values["model"] == "runs/x/model"
    assert [Exchange(**{**one, "missing": tuple(one["missing"])}) for one in values["exchanges"]] == exchanges


def test_markdown_shows_texts_letter_by_letter():
    """By hand: one heading for a protein, its note, questions bold, answers quoted line by line, nothing of it
    markup."""
    assert as_markdown("m", TWO).split("\n", 4)[4].splitlines() == [
        "## 1cbs\\_A", "", "- 3 of 137 residues have no coordinates.", "",
        "**What is \\*it\\*?**", "", "> A \\<b\\>carrier\\</b\\>.", "> \\# of retinoids", "",
        "**Where?**", "", "> N/A",
    ]  # fmt: skip


def test_saving_follows_the_ending_and_never_overwrites(tmp_path):
    save(tmp_path / "a.md", "m", TWO)
    save(tmp_path / "a.json", "m", TWO)
    assert (tmp_path / "a.md").read_text() == as_markdown("m", TWO)
    assert (tmp_path / "a.json").read_text() == as_json("m", TWO)
    for path, says in (
        ("a.md", "is there already"),
        ("a.txt", "ends in .json or .md"),
        ("no/a.md", "cannot be written"),
    ):
        with pytest.raises(SaveError, match=says):
            save(tmp_path / path, "m", [])
    assert (tmp_path / "a.md").read_text() == as_markdown("m", TWO)


@given(st.text())
def test_a_terminal_gets_nothing_that_it_would_obey(text):
    shown = printable(f"\x1b[31m{text}\x9b2J\r")
    assert not any(c < " " and c not in "\n\t" or "\x7f" <= c < "\xa0" for c in shown)
    assert printable("a\tbé\n") == "a\tbé\n"
