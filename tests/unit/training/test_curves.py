"""The names of the curves, the page that lays them over each other, and their list in the docs."""

import re
from pathlib import Path

import pytest

from proteingpt.training.curves import CURVES, LAYOUT, layout
from proteingpt.training.ledger import PARTS

DOCS = Path(__file__).parents[3] / "docs" / "watching.md"
PATTERNS = [pattern for charts in LAYOUT.values() for patterns in charts.values() for pattern in patterns]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_line_of_the_page_is_a_curve(pattern):
    """TensorBoard takes a tag where the pattern matches its beginning."""
    tags = [f"{tag}/rank_0" if "_by_rank" in tag else tag for tag in CURVES]
    assert [tag for tag in tags if re.match(pattern, tag)]


def test_chapters_stand_in_the_order_of_the_questions_in_any_tool_that_sorts_them():
    assert sorted({tag.partition("/")[0] for tag in CURVES}) == [
        "learning", "speed", "speed_by_rank", "time", "vitals", "vitals_by_rank",
    ]  # fmt: skip


def test_where_the_time_goes_has_a_curve_for_each_part():
    assert {tag.partition("/")[2] for tag in CURVES if tag.startswith("time/")} == {*PARTS, "goodput"}


def test_a_chart_is_left_out_only_where_all_of_it_is_absent():
    everything = layout(())
    assert {
        q: {title: patterns for title, (_, patterns) in charts.items()} for q, charts in everything.items()
    } == LAYOUT
    assert layout(("speed/mfu",)) == everything
    without = layout(("speed/mfu", "speed_by_rank/mfu"))
    assert {q: len(charts) - len(without[q]) for q, charts in everything.items()} == {
        "Is it learning?": 0, "Is it fast?": 1, "Is it healthy?": 0,
    }  # fmt: skip


def test_the_docs_list_every_curve_with_its_unit_and_no_other():
    rows = re.findall(r"^\| `([a-z_]+/[a-z_]+)` \| ([^|]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {tag: unit for tag, (unit, _) in CURVES.items()}
