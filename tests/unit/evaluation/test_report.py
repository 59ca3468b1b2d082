"""The report: escaped, self-contained, the same in all forms, and drawn as meant in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.evaluation import report
from proteingpt.evaluation.plots import Point, Row, dot_plot, nice_range
from proteingpt.evaluation.predictions import Record
from proteingpt.evaluation.scores import About, Scoring, score

EVIL = "<script>document.title='owned'</script> & \"quotes\" | `x` $x_1$ %"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_figures() -> dict:
    def records(predict):
        made = []
        for i in range(12):
            made.append(
                Record(f"p{i}", 0, f"Even? {EVIL}", "YES" if i % 2 else "NO", predict("YES" if i % 2 else "NO", i))
            )
            made.append(Record(f"p{i}", 1, "Why?", f"{EVIL} {i} and then many words more, so that it is open", EVIL))
        return made

    by_name = {
        "model": records(lambda answer, i: answer if i < 9 else EVIL),
        "blind": records(lambda answer, i: "NO"),
        "shuffled": records(lambda answer, i: "YES"),
    }
    about = {f"p{i}": About(60 + 20 * i, 1.2 + i / 10, "X-ray", i / 12) for i in range(12)}
    figures = score(by_name, about, Scoring(num_draws=100))
    settings = {"model": f"RUN/{EVIL}", "data": "shards/pdb", "split": "test", "left_out_as_too_long": [], "seed": 42}
    return figures | {"about": settings, "titles": {name: f"title of {name} {EVIL}" for name in by_name}}


@pytest.fixture(scope="module")
def figures():
    return make_figures()


@pytest.fixture(scope="module")
def directory(figures, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.write(figures, out)
    return out


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "br", "circle", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_no_script_and_asks_for_nothing(directory):
    text = (directory / "index.html").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(text)
    assert not parser.open and "svg" in parser.tags and "table" in parser.tags
    assert not {"script", "img", "link", "iframe"} & set(parser.tags) and not parser.addresses
    assert "url(" not in text and "@import" not in text


def test_what_data_and_model_say_is_shown_as_text(directory):
    text = (directory / "index.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script" not in text
    assert "<script" not in (directory / "report.md").read_text(encoding="utf-8")


def test_all_forms_say_the_same_lift(figures, directory):
    lift = f"{100 * figures['headline']['lift']['value']:+.1f}"
    assert lift != "+0.0"
    for name in ("index.html", "report.md", "table.tex"):
        assert lift in (directory / name).read_text(encoding="utf-8"), name
    assert lift in report.terminal_text(figures, directory)
    assert json.loads((directory / "scores.json").read_text()) == json.loads(json.dumps(figures))


def test_the_lift_stands_before_every_table(figures, directory):
    text = (directory / "index.html").read_text(encoding="utf-8")
    assert 0 < text.index('class="lift"') < text.index("<table")
    lines = report.terminal_text(figures, directory).splitlines()
    assert "lift over blind" in lines[1] and lines[-1].endswith("index.html")


def test_the_same_figures_give_the_same_bytes(figures, directory, tmp_path):
    report.write(make_figures(), tmp_path)
    for name in ("index.html", "report.md", "table.tex", "scores.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_the_latex_table_has_equal_rows_and_escapes(directory):
    lines = (directory / "table.tex").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1 and len(rows) == 4
    assert not re.search(r"(?<!\\)[$#_%]", "".join(rows))


def test_markdown_tables_keep_their_columns(directory):
    lines = (directory / "report.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    heads = [i for i, line in enumerate(tables) if line.startswith("|---")]
    for head, end in zip(heads, [*[h - 1 for h in heads[1:]], len(tables)], strict=True):
        assert len({line.count("|") for line in tables[head - 1 : end]}) == 1


def test_tensorboard_has_the_same_figures(figures, directory):
    for name, contestant in figures["contestants"].items():
        events = EventAccumulator(str(directory / "tensorboard" / name))
        events.Reload()
        assert events.Scalars("evaluation/scores/exact")[0].value == pytest.approx(
            contestant["scores"]["exact"]["value"], abs=1e-6
        )
    assert "evaluation/scores/exact_yes/no" in events.Tags()["scalars"]


def test_without_anything_scored_the_report_says_so():
    """No closed questions and no metrics asked for."""
    long = "an open answer of very many words, more than eight of them, about one"
    mine = [Record("p", 0, "Why?", long, long), Record("q", 0, "How?", long, "N/A")]
    found = score({"model": mine, "blind": mine}, {}, Scoring(num_draws=5))
    found |= {"about": {"model": "m", "data": "d", "split": "test"}, "titles": {"model": "model", "blind": "blind"}}
    assert "Nothing could be scored" in report.html(found) and "Nothing could be scored" in report.markdown(found)
    assert report.latex(found)


# -------------------------------------------------------------------------------------------------------------- plots


numbers = st.floats(-2, 2).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=1, max_size=6))
def test_a_range_holds_its_values_and_zero(values):
    low, high = nice_range(values)
    assert low <= min(0, *values) + 1e-9 and high >= max(0, *values) - 1e-9 and high > low


@given(st.lists(numbers, min_size=1, max_size=5))
def test_every_point_is_drawn_inside_the_plot(values):
    rows = [Row("label", (Point("model", value, value, value),)) for value in values]
    drawn = dot_plot(rows, "title")
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    places = [float(x) for x in re.findall(r'cx="([-\d.]+)"', drawn)]
    assert len(places) == len(values) and all(0 < x < width for x in places)
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(places[a] <= places[b] + 0.1 for a, b in zip(order, order[1:]))


@given(st.lists(numbers, min_size=1, max_size=5))
def test_zero_is_a_tick(values):
    drawn = dot_plot([Row("label", (Point("model", value, value, value),)) for value in values], "title")
    ticks = re.findall(r'class="tick"[^>]*>(-?[\d.]+) %', drawn)
    assert "0" in ticks and "-0" not in ticks and 3 <= len(ticks) <= 12


# ------------------------------------------------------------------------------------------------------------ browser


def browse(*options: str) -> str:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install -y chromium")
def test_a_browser_shows_it_and_runs_nothing(directory, tmp_path):
    page = directory / "index.html"
    shown = browse(f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri())
    assert re.search(r"<title>Evaluation of RUN/&lt;script&gt;", shown) and "owned</title>" not in shown
    for heading in ("What the protein is worth", "Closed questions", "By question", "How this was made"):
        assert heading in shown
    picture = tmp_path / "page.png"
    browse(f"--user-data-dir={tmp_path}", f"--screenshot={picture}", "--window-size=1000,900", page.as_uri())
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=1_000_000)
    assert picture.stat().st_size > 10_000 and len(colours) > 50  # more than a blank page
    assert any(colour == (11, 110, 153) for _, colour in colours)  # the model's dot, in its colour
