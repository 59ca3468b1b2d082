"""The report as plain text: for the terminal, as Markdown, and in LaTeX as the paper's table is laid out."""

from pathlib import Path

from proteingpt.evaluation.report_words import (
    HOW,
    bracket,
    groups_of,
    headline_sentences,
    lift_text,
    metrics_of,
    number,
    points,
    shown,
    table_rows,
    title_of,
)

# The columns of the paper's table, and the score of each in its own mode.
PAPER_COLUMNS = {
    "BERTScore": "BERTScore, paper",
    "PubMedBERT": "PubMedBERT, paper",
    "GPT": "GPT, paper",
    "Closed (exact)": "exact",
}


def terminal_text(figures: dict, out: Path) -> str:
    """The lift in front, then a row for each contestant, then where the report is."""
    headline, lines = figures["headline"], []
    lines.append(
        f"{figures['about']['model']}: {figures['num_questions']} questions about {figures['num_proteins']} held-out "
        "proteins"
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
    lines += [f"  {sentence}" for sentence in headline_sentences(figures)[:1]]
    return "\n".join([*lines, f"  report                 {out / 'index.html'}"])


def markdown(figures: dict) -> str:
    headline = figures["headline"]
    lines = [f"# Evaluation of {cell(figures['about']['model'])}", ""]
    lines += [f"{figures['num_questions']} questions about {figures['num_proteins']} held-out proteins.", ""]
    if headline:
        lift, interval = lift_text(headline)
        lines += [f"**Lift over blind: {lift}{points(headline['metric'])} {interval}** ({headline['metric']})", ""]
    lines += [*headline_sentences(figures), ""]
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
