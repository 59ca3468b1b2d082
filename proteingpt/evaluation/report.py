"""The report: one HTML page that needs nothing else, and the same figures as JSON, Markdown, LaTeX and TensorBoard.

Everything that comes from data or models is escaped. No clock enters, so the same figures give the same bytes.
"""

import json
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from proteingpt.evaluation.plots import Point, Row, dot_plot

STYLE = Path(__file__).with_name("report.css")
PERCENT = ("exact", "balanced accuracy", "number within tolerance", "share that are numbers", "judge")
# The columns of the paper's table, and the score of each in its own mode.
PAPER_COLUMNS = {
    "BERTScore": "BERTScore, paper",
    "PubMedBERT": "PubMedBERT, paper",
    "GPT": "GPT, paper",
    "Closed (exact)": "exact",
}
HOW = (
    "Exact match: prediction and answer are equal after Unicode folding, white space, quotes and full stops around "
    "them, and "
    "trailing zeros of decimals are taken off. Nothing of the content is forgiven.",
    "Closed questions are those asked word for word of at least 2 % of the proteins (and of two) with answers of up "
    "to 8 words "
    "on average. A number is right within the tolerance named below; years must be exact. Balanced accuracy and "
    "Matthews "
    "correlation are computed for each yes/no and categorical question in whose answers at least two classes occur, "
    "and "
    "averaged over these.",
    "Strict: each answer against its own true answer. Paper: as in the published scoring, each answer against the "
    "best of all "
    "true answers of that protein, which is why a wrong answer may score well there. PubMedBERT and GPT scores are "
    "the F1 of "
    "mean best cosines both ways.",
    "ROUGE-2 of one-word answers is 0 by its definition, right or wrong; BLEU leaves out orders longer than the "
    "answer.",
    "Blind: for each question the commonest answer of the training split, without looking at any protein. Lift is the "
    "difference to it on the same questions.",
    "Similarity to the training set: the largest share of 3-mers (Jaccard) with any training sequence. Unrelated "
    "proteins "
    "reach about 0.1.",
    "Brackets hold 95 % intervals by the percentile bootstrap over proteins, 1,000 draws; differences are paired.",
)


def write(figures: dict, out: Path):
    """scores.json, report.md, table.tex, tensorboard/ and, last, index.html."""
    write_text(out / "scores.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(out / "report.md", markdown(figures))
    write_text(out / "table.tex", latex(figures))
    write_tensorboard(figures, out / "tensorboard")
    write_text(out / "index.html", html(figures))


def write_text(path: Path, text: str):
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# ----------------------------------------------------------------------------------------------------------- figures


def is_percent(metric: str) -> bool:
    return metric.startswith(PERCENT)


def number(value: float | None, metric: str, signed: bool = False) -> str:
    if value is None:
        return "n/a"
    value += 0.0  # no minus before a zero
    plus = "+" if signed else ""
    if is_percent(metric):
        return f"{100 * value:{plus}.1f}" + ("" if signed else " %")
    return f"{value:{plus}.4g}" if metric == "mean absolute error" else f"{value:{plus}.3f}"


def bracket(figure: dict, metric: str, signed: bool = False) -> str:
    if figure["low"] is None:
        return ""
    return f"[{number(figure['low'], metric, signed).removesuffix(' %')}, {number(figure['high'], metric, signed)}]"


def metrics_of(figures: dict) -> list[str]:
    return list(figures["contestants"]["model"]["scores"])


def groups_of(metrics: Sequence[str]) -> dict[str, list[str]]:
    """The tables that the metrics are dealt to."""
    made = {"Closed questions": [m for m in metrics if not m.endswith((", strict", ", paper"))]}
    for mode, title in (
        ("strict", "Texts, each against its own answer (strict)"),
        ("paper", "Texts, as published (paper)"),
    ):
        made[title] = [m for m in metrics if m.endswith(f", {mode}")]
    return {title: names for title, names in made.items() if names}


def verdict(headline: dict) -> str:
    lift = headline["lift"]
    if lift["low"] is None:
        return "There is too little to tell the model from the blind answerer."
    if lift["low"] > 0:
        return "The model does better than an answerer that never sees the protein."
    if lift["high"] < 0:
        return "The model does worse than an answerer that never sees the protein."
    return "The model cannot be told from an answerer that never sees the protein: the interval holds zero."


def points(metric: str) -> str:
    return " points" if is_percent(metric) else ""


def headline_sentences(headline: dict | None) -> list[str]:
    """The lift in words, the same in all forms of the report."""
    if headline is None:
        return ["Nothing could be scored: there are no closed questions, and no --metrics for texts were asked for."]
    metric = headline["metric"]
    name = "Exact match on closed questions" if metric == "exact" else metric

    def figure(key: str, signed: bool = False) -> str:
        return f"{number(headline[key]['value'], metric, signed)} {bracket(headline[key], metric, signed)}".strip()

    lines = [verdict(headline), f"{name}: {figure('model')} for the model, {figure('blind')} blind."]
    for key, what in (("over shuffled", "shown another protein"), ("over no-protein", "shown no protein")):
        if key in headline:
            lines.append(f"Over the same model {what}: {figure(key, True)}{points(metric)}.")
    return lines


def lift_text(headline: dict) -> tuple[str, str]:
    """(the lift, its interval)."""
    metric = headline["metric"]
    return number(headline["lift"]["value"], metric, True), bracket(headline["lift"], metric, True)


def table_rows(figures: dict, metric: str) -> list[tuple[str, str, dict, dict | None, dict | None]]:
    """(name, title, score, lift, difference) of each contestant."""
    return [
        (name, title_of(figures, name), c["scores"].get(metric), c["lift"].get(metric), c["difference"].get(metric))
        for name, c in figures["contestants"].items()
    ]


def title_of(figures: dict, name: str) -> str:
    contestant, whole = figures["contestants"][name], figures["contestants"]["model"]
    partial = contestant["num_questions"] < whole["num_questions"]
    return figures["titles"][name] + (f" ({contestant['num_proteins']} proteins)" if partial else "")


# --------------------------------------------------------------------------------------------------- terminal, markdown


def terminal_text(figures: dict, out: Path) -> str:
    """The lift in front, then a row for each contestant, then where the report is."""
    headline, lines = figures["headline"], []
    lines.append(
        f"{figures['about']['model']}: {figures['num_questions']} questions about {figures['num_proteins']} held-out "
        f"proteins"
    )
    if headline:
        lift, interval = lift_text(headline)
        lines.append(f"  lift over blind        {lift}{points(headline['metric'])} {interval}  ({headline['metric']})")
        width = max(len(title_of(figures, name)) for name in figures["contestants"])
        lines += [
            f"  {title:{width}s}  {number(score['value'], headline['metric']):>8s} {bracket(score, headline['metric'])}"
            for _, title, score, _, _ in table_rows(figures, headline["metric"])
            if score
        ]
    lines += [f"  {sentence}" for sentence in headline_sentences(headline)[:1]]
    return "\n".join([*lines, f"  report                 {out / 'index.html'}"])


def markdown(figures: dict) -> str:
    headline = figures["headline"]
    lines = [f"# Evaluation of {cell(figures['about']['model'])}", ""]
    lines += [f"{figures['num_questions']} questions about {figures['num_proteins']} held-out proteins.", ""]
    if headline:
        lift, interval = lift_text(headline)
        lines += [f"**Lift over blind: {lift}{points(headline['metric'])} {interval}** ({headline['metric']})", ""]
    lines += [*headline_sentences(headline), ""]
    for title, metrics in groups_of(metrics_of(figures)).items():
        lines += [f"## {title}", "", "| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        for name, contestant in figures["contestants"].items():
            scores = (contestant["scores"].get(metric) for metric in metrics)
            texts = [
                f"{number(s['value'], m)} {bracket(s, m)}".strip() if s else "n/a"
                for s, m in zip(scores, metrics, strict=True)
            ]
            lines.append(f"| {cell(title_of(figures, name))} | " + " | ".join(texts) + " |")
        lines.append("")
    if figures["questions"]:
        lines += [
            "## By question",
            "",
            "| question | kind | asked | model | blind | lift |",
            "|---|---|---|---|---|---|",
        ]
        for row in figures["questions"]:
            lift = f"{number(row['lift']['value'], 'exact', True)} {bracket(row['lift'], 'exact', True)}"
            model, blind = (number(row[name]["exact"]["value"], "exact") for name in ("model", "blind"))
            lines.append(f"| {cell(row['question'])} | {row['kind']} | {row['num']} | {model} | {blind} | {lift} |")
        lines.append("")
    lines += ["## How", "", *(f"- {sentence}" for sentence in HOW), ""]
    lines += [f"- {name.replace('_', ' ')}: {cell(shown(value))}" for name, value in figures["about"].items()]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text inside a Markdown table: on one line, nothing in it is markup or HTML."""
    text = " ".join(str(text).split())
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, f"&#{ord(character)};")
    return text


def shown(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if value else "none"
    return "none" if value is None else str(value)


# -------------------------------------------------------------------------------------------------------------- LaTeX


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def latex(figures: dict) -> str:
    """The layout of the paper's tables, a row for each contestant, with the lift behind; booktabs."""
    metrics = set(metrics_of(figures))
    columns = {title: metric for title, metric in PAPER_COLUMNS.items() if metric in metrics}
    headline = figures["headline"]
    rows = []
    for name, contestant in figures["contestants"].items():
        cells = [tex(title_of(figures, name))]
        for metric in columns.values():
            score = contestant["scores"].get(metric)
            cells.append(tex(number(score["value"], metric)) if score else "--")
        lift = contestant["lift"].get(headline["metric"]) if headline else None
        cells.append(tex(f"{number(lift['value'], headline['metric'], True)}") if lift else "--")
        rows.append(" & ".join(cells) + r" \\")
    heads = " & ".join(["", *map(tex, columns), "Lift over blind"])
    lines = [
        "% " + " ".join(f"{figures['num_questions']} questions about {figures['num_proteins']} proteins".split()),
        r"\begin{tabular}{l" + "r" * (len(columns) + 1) + "}",
        r"\toprule", heads + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- TensorBoard


def write_tensorboard(figures: dict, directory: Path):
    """Every score, lift and the examples, at step 0 of a run named after the contestant. Replaces an earlier
    report's."""
    from torch.utils.tensorboard import SummaryWriter

    for name, contestant in figures["contestants"].items():
        for old in (directory / name).glob("events.out.*"):
            old.unlink()
        with SummaryWriter(directory / name) as writer:
            for kind in ("scores", "lift"):
                for metric, figure in contestant[kind].items():
                    if figure["value"] is not None:
                        writer.add_scalar(
                            f"evaluation/{kind}/{metric}".replace(", ", "/").replace(" ", "_"), figure["value"], 0
                        )
            if name == "model":
                for kind, found in figures["examples"].items():
                    for i, example in enumerate(found):
                        text = "\n\n".join(
                            f"{part}: {cell(example[part])}" for part in ("question", "answer", "prediction")
                        )
                        writer.add_text(f"evaluation/{kind}_{i}", text, 0)


# --------------------------------------------------------------------------------------------------------------- HTML


def html(figures: dict) -> str:
    about, headline = figures["about"], figures["headline"]
    body = [
        f"<h1>{escape(str(about['model']))}</h1>",
        f'<p class="soft">{figures["num_questions"]:,} questions about {figures["num_proteins"]:,} proteins of the '
        f"{escape(about['split'])} split of {escape(str(about['data']))}</p>",
        lift_card(headline),
    ]
    if headline:
        body += ["<h2>What the protein is worth</h2>", comparison_plot(figures, headline["metric"])]
        body.append(comparison_table(figures, headline["metric"]))
    for title, metrics in groups_of(metrics_of(figures)).items():
        body += [f"<h2>{escape(title)}</h2>", score_table(figures, metrics)]
    if figures["questions"]:
        body += ["<h2>By question</h2>", question_table(figures["questions"])]
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


def lift_card(headline: dict | None) -> str:
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in headline_sentences(headline))
    if headline is None:
        return f'<section class="lift"><div class="words">{words}</div></section>'
    lift, interval = lift_text(headline)
    low, high = headline["lift"]["low"], headline["lift"]["high"]
    tone = "good" if low is not None and low > 0 else "bad" if high is not None and high < 0 else ""
    return (
        f'<section class="lift"><div><div class="number {tone}">{escape(lift)}</div>'
        f'<div class="soft">{escape(points(headline["metric"]).strip())} over blind {escape(interval)}</div></div>'
        f'<div class="words">{words}</div></section>'
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
    heads = ["", f"{metric}", "lift over blind", "difference to the model"]
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


def question_table(questions: Sequence[dict]) -> str:
    """The largest lift first."""
    rows = []
    for row in sorted(questions, key=lambda row: -(row["lift"]["value"] or 0)):
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


EXAMPLE_COLUMNS = ("question", "answer", "prediction", "blind")


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
