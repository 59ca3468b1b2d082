"""The report as one HTML page that needs nothing else. Everything that comes from data or models is escaped."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from proteingpt.evaluation.plots import Point, Row, dot_plot
from proteingpt.evaluation.report_words import (
    HOW,
    OVER_ITSELF,
    bracket,
    groups_of,
    headline_sentences,
    is_percent,
    lift_text,
    metrics_of,
    number,
    points,
    shown,
    table_rows,
    title_of,
)

STYLE = Path(__file__).with_name("report.css")
EXAMPLE_COLUMNS = ("question", "answer", "prediction", "blind")


def html(figures: dict) -> str:
    about, headline = figures["about"], figures["headline"]
    body = [
        '<p class="soft">Evaluation of</p>',
        f"<h1>{escape(str(about['model']))}</h1>",
        f'<p class="soft">{figures["num_questions"]:,} questions about {figures["num_proteins"]:,} proteins of the '
        f"{escape(about['split'])} split of {escape(shown(about['data']))}</p>",
        lift_card(figures),
    ]
    if headline:
        body += ["<h2>What the protein is worth</h2>", comparison_plot(figures, headline["metric"])]
        body.append(comparison_table(figures, headline["metric"]))
    for title, metrics in groups_of(metrics_of(figures)).items():
        body += [f"<h2>{escape(title)}</h2>", score_table(figures, metrics)]
    if figures["questions"]:
        body += ["<h2>By question</h2>", "<p>What the protein adds to each question: exact match over blind.</p>"]
        body += [question_plot(figures["questions"]), question_table(figures["questions"])]
    if figures["breakdowns"]:
        legend = '<p><span class="key model">the model</span> &nbsp; <span class="key blind">blind</span></p>'
        body += ["<h2>Where it is good and where not</h2>", "<p>Exact match on closed questions.</p>", legend]
        for by, rows in figures["breakdowns"].items():
            body += [f"<h3>By {escape(by)}</h3>", breakdown_plot(by, rows)]
    for kind, title in (
        ("good", "Right where the blind answer is wrong"),
        ("bad", "Wrong where the blind answer is right"),
        ("open", "Answers in free text"),
    ):
        if figures["examples"][kind]:
            body += [f"<h2>{title}</h2>", example_table(figures["examples"][kind])]
    body += ["<h2>How this was made</h2>", *(f"<p>{escape(sentence)}</p>" for sentence in HOW), settings_list(about)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Evaluation of "
        f"{escape(str(about['model']))}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def lift_card(figures: dict) -> str:
    """The lift over blind, large; over the same model shown another protein or none, beside it; then words."""
    headline = figures["headline"]
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in headline_sentences(figures, with_lifts=False))
    tiles = ""
    if headline is not None:
        named = {"lift": "over blind"} | {key: f"over itself, {what}" for key, what in OVER_ITSELF.items()}
        tiles = "".join(lift_tile(headline, key, what) for key, what in named.items() if key in headline)
    return f'<section class="lift"><div class="tiles">{tiles}</div><div class="words">{words}</div></section>'


def lift_tile(headline: dict, key: str, what: str) -> str:
    (lift, interval), figure = lift_text(headline, key), headline[key]
    low, high = figure["low"], figure["high"]
    tone = " good" if low is not None and low > 0 else " bad" if high is not None and high < 0 else ""
    size, unit = "" if key == "lift" else " small", points(headline["metric"]).strip()
    return (
        f'<div class="tile"><div class="number{size}{tone}">{escape(lift)}</div>'
        f'<div class="soft">{unit} {escape(what)}<br>{escape(interval)}</div></div>'
    )


def as_point(css: str, figure: dict) -> Point:
    return Point(css, figure["value"], figure["low"], figure["high"])


def comparison_plot(figures: dict, metric: str) -> str:
    rows = [
        Row(title, (as_point(name if name in ("model", "blind") else "other", score),), number(score["value"], metric))
        for name, title, score, _, _ in table_rows(figures, metric)
        if score
    ]
    blind = figures["contestants"]["blind"]["scores"][metric]["value"]
    return dot_plot(rows, f"{metric} of everyone compared, with 95 % intervals", is_percent(metric), blind)


def comparison_table(figures: dict, metric: str) -> str:
    heads = ["", "exact match" if metric == "exact" else metric, "lift over blind", "difference to the model"]
    rows = []
    for name, title, score, lift, difference in table_rows(figures, metric):
        cells = [figure_cell(score, metric), figure_cell(lift, metric, True), figure_cell(difference, metric, True)]
        rows.append(f"<tr{mark(name)}><td>{escape(title)}</td>{''.join(cells)}</tr>")
    return table(heads, rows)


def mark(name: str) -> str:
    return ' class="model"' if name == "model" else ""


def figure_cell(figure: dict | None, metric: str, signed: bool = False) -> str:
    if figure is None:
        return '<td class="figure">&ndash;</td>'
    interval = bracket(figure, metric, signed)
    return (
        f'<td class="figure">{escape(number(figure["value"], metric, signed))}'
        f'<span class="interval">{escape(interval)}</span></td>'
    )


def table(heads: Sequence[str], rows: Sequence[str], is_text: Callable[[int], bool] = lambda i: i == 0) -> str:
    cells = "".join(f"<th{'' if is_text(i) else ' class=figure'}>{escape(head)}</th>" for i, head in enumerate(heads))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def score_table(figures: dict, metrics: Sequence[str]) -> str:
    rows = []
    for name, contestant in figures["contestants"].items():
        cells = "".join(figure_cell(contestant["scores"].get(metric), metric) for metric in metrics)
        rows.append(f"<tr{mark(name)}><td>{escape(title_of(figures, name))}</td>{cells}</tr>")
    return table(["", *(metric.removesuffix(", strict").removesuffix(", paper") for metric in metrics)], rows)


def by_lift(questions: Sequence[dict]) -> list[dict]:
    """The largest first."""
    return sorted(questions, key=lambda row: -(row["lift"]["value"] or 0))


def question_plot(questions: Sequence[dict]) -> str:
    rows = [
        Row(row["question"], (as_point("model", row["lift"]),), number(row["lift"]["value"], "exact", True) + " points")
        for row in by_lift(questions)
    ]
    return dot_plot(rows, "Lift over blind by question, with 95 % intervals", reference=0.0)


def question_table(questions: Sequence[dict]) -> str:
    rows = []
    for row in by_lift(questions):
        more = " · ".join(filter(None, (details(name, row[name]) for name in ("model", "blind"))))
        cells = "".join(
            [
                f'<td class="text">{escape(row["question"])}<br><small>{escape(more)}</small></td>',
                f"<td>{escape(row['kind'])}</td>",
                f'<td class="figure">{row["num"]}</td>',
                figure_cell(row["model"]["exact"], "exact"),
                figure_cell(row["blind"]["exact"], "exact"),
                figure_cell(row["lift"], "exact", True),
            ]
        )
        rows.append(f"<tr>{cells}</tr>")
    return table(["question", "kind", "asked", "the model", "blind", "lift"], rows, lambda i: i < 2)


def details(name: str, scores: dict) -> str:
    """What a question has beside exact matches, in few words."""
    short = {
        "number within tolerance": "within tolerance", "mean absolute error": "mean error",
        "balanced accuracy": "balanced", "Matthews correlation": "MCC",
    }  # fmt: skip
    found = [f"{short[m]} {number(scores[m]['value'], m)}" for m in short if m in scores]
    return f"{name}: {', '.join(found)}" if found else ""


def breakdown_plot(by: str, rows: Sequence[dict]) -> str:
    drawn = [
        Row(
            row["label"],
            (as_point("model", row["model"]), as_point("blind", row["blind"])),
            f"{number(row['lift']['value'], 'exact', True)} points, {row['num_proteins']} proteins",
        )
        for row in rows
    ]
    return dot_plot(drawn, f"Exact match by {by}")


def example_table(found: Sequence[dict]) -> str:
    rows = [
        "<tr>" + f"<td>{escape(one['key'])}</td>"
        + "".join(f'<td class="text">{escape(one[part])}</td>' for part in EXAMPLE_COLUMNS)
        + "</tr>"
        for one in found
    ]  # fmt: skip
    return table(["protein", "question", "true answer", "the model", "blind"], rows, lambda i: True)


def settings_list(about: dict) -> str:
    pairs = (
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(shown(value))}</dd>" for name, value in about.items()
    )
    return f"<dl>{''.join(pairs)}</dl>"
