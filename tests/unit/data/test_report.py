"""What is said of a build: the picture is XML, the histogram agrees with a hand count, the line is as promised."""

import dataclasses
import io
import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from proteingpt.data.filters import STEPS, Skip
from proteingpt.data.report import (
    BuildReport,
    Info,
    Progress,
    count_lengths,
    draw_info,
    format_info,
    format_leak,
    format_report,
    format_seconds,
    write_report,
    write_skipped,
)

SVG = "{http://www.w3.org/2000/svg}"
TOTALS = {"train": dict(num_shards=1, num_samples=3, num_residues=9, num_turns=4, num_bytes=20_480)}
INFO = Info(
    "shards/x",
    TOTALS,
    [("entries", 10), ("has an abstract", 4)],
    {"num_test_sequences_in_train": 1, "share_test_sequences_in_train": 0.25},
    np.array([1, 50, 51, 1500, 1501, 9000]),
    {"What <b>is</b> it & why?\x07": 3, "How \"long\"?": 1},
)


def test_lengths_are_counted_in_bins_with_both_ends_inside():
    counts = dict(count_lengths(INFO.lengths))
    assert counts["1-50"] == 2 and counts["51-100"] == 1 and counts["1001-1500"] == 1 and counts["1501-"] == 2
    assert sum(counts.values()) == 6


def test_the_picture_is_xml_and_shows_every_number():
    root = ElementTree.fromstring(draw_info(INFO))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "What <b>is</b> it & why? " in texts and "has an abstract" in texts and "10" in texts
    bars = [float(bar.get("width")) for bar in root.iter(f"{SVG}rect") if bar.get("x")]
    # The funnel's bars: 4 of 10 is 0.4 of the widest.
    assert bars[1] == pytest.approx(0.4 * bars[0])
    assert "NaN" not in draw_info(INFO)


def test_nothing_of_the_picture_lies_outside_it_or_on_something_else():
    """Letters are taken to be as wide as 0.55 of their size, the mean of a wide sans-serif font."""
    questions = {"What is " + "very " * n + "long?": 40 - n for n in range(40)}
    funnel = [(name, 234_567 - n) for n, (name, _) in enumerate(STEPS)]
    root = ElementTree.fromstring(draw_info(dataclasses.replace(INFO, questions=questions, funnel=funnel)))
    boxes = [box for group in root.iter(f"{SVG}g") for box in boxes_of(group)]
    width, height = float(root.get("width")), float(root.get("height"))
    assert len(boxes) > 150
    assert all(0 <= left and right <= width and 0 <= top and bottom <= height for left, right, top, bottom in boxes)
    for one, two in itertools.combinations(boxes, 2):
        apart = one[1] <= two[0] or two[1] <= one[0] or one[3] <= two[2] or two[3] <= one[2]
        assert apart, (one, two)


def boxes_of(group: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of its texts and bars."""
    shift, boxes = float(group.get("transform").split()[1].rstrip(")")), []
    for element in group:
        x, y = float(element.get("x")), float(element.get("y")) + shift
        if element.tag == f"{SVG}rect":
            boxes.append((x, x + float(element.get("width")), y, y + float(element.get("height"))))
            continue
        width = 0.55 * 13 * len(element.text)
        left = x - width if element.get("text-anchor") == "end" else x
        boxes.append((left, left + width, y - 10, y + 3))
    return boxes


def test_the_picture_of_a_directory_without_report_and_questions_is_xml_too():
    ElementTree.fromstring(draw_info(Info("x", {}, [], {}, np.zeros(0, int), {})))


def test_a_split_that_separates_says_so():
    text = "\n".join(format_leak({"num_test_sequences_in_train": 0, "share_test_sequences_in_train": 0.0}))
    assert "0 test samples (0.0%) have a sequence that is also trained on" in text and format_leak({}) == []


def test_the_text_has_funnel_lengths_and_questions():
    text = format_info(INFO, max_questions=1)
    assert "has an abstract          4" in text and "train: 3 samples, 9 residues" in text
    assert "and 1 more, each rarer" in text and "1 test samples (25.0%)" in text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_times_are_read_at_a_glance(seconds, text):
    assert format_seconds(seconds) == text


def test_progress_is_one_line_with_bar_rate_skips_and_time_left():
    stream = io.StringIO()
    meter = Progress(40, stream, num_done=10)
    meter.advance(10, 2)
    meter.finish()
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(r"\[#{10}\.{10}\] 20/40 entries, [\d.]+/s, 2 skipped, .* left", line)


def test_files_of_the_report_hold_every_skip_and_nothing_of_the_clock(tmp_path):
    report = BuildReport("out", {"seed": 1}, 3, 3, {"train": 1, "test": 0}, {"train": 1, "test": 0})
    report.skips = [Skip("a.cif", "a", "A", "too long", "two\tand\nthree"), Skip("b.cif", "b", "", "unreadable", "cut")]
    report.seconds = 12.3
    write_skipped(tmp_path / "skipped.tsv", report)
    write_report(tmp_path / "report.json", report)
    rows = [line.split("\t") for line in (tmp_path / "skipped.tsv").read_text().splitlines()]
    assert rows[1] == ["a.cif", "a", "A", "too long", "two and three"] and len(rows) == 3
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["num_skipped"] == 2 and written["skipped"] == {"too long": 1, "unreadable": 1}
    assert "12.3" not in (tmp_path / "report.json").read_text() and "12.3 s" in format_report(report)
