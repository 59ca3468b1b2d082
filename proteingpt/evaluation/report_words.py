"""What the report says, in words and numbers, the same in all its forms."""

from collections.abc import Sequence

PERCENT = ("exact", "balanced accuracy", "number within tolerance", "share that are numbers", "judge")
MANY = 10  # of a list, so many are shown
HOW = (
    "Exact match: prediction and answer are equal after Unicode folding; white space, quotes and full stops around "
    "them, and trailing zeros of decimals are taken off. Nothing of the content is forgiven.",
    "Closed questions are those asked word for word of at least 2 % of the proteins (and of two) with answers of up "
    "to 8 words on average. A number is right within the tolerance named below; years must be exact. Balanced "
    "accuracy and Matthews correlation are computed for each yes/no and categorical question in whose answers at "
    "least two classes occur, and averaged over these.",
    "Strict: each answer against its own true answer. Paper: as in the published scoring, each answer against the "
    "best of all true answers of that protein, which is why a wrong answer may score well there. PubMedBERT and GPT "
    "scores are the F1 of mean best cosines both ways.",
    "ROUGE-2 of one-word answers is 0 by its definition, right or wrong; BLEU leaves out orders longer than the "
    "answer.",
    "Blind: for each question the commonest answer of the training split, without looking at any protein. The lift "
    "over blind is what the model knows beyond that. The lift over itself, shown another protein, is how much of its "
    "own score comes from the protein. Both are on the same questions.",
    "Similarity to the training set: the largest share of 3-mers (Jaccard) with any training sequence. Unrelated "
    "proteins reach about 0.1.",
    "Brackets hold 95 % intervals by the Bayesian bootstrap over proteins, 1,000 draws; differences are paired.",
)


# ---------------------------------------------------------------------------------------------------------- numbers


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
    low, high = (number(figure[end], metric, signed).removesuffix(" %") for end in ("low", "high"))
    return f"[{low}, {high}]"


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


def points(metric: str) -> str:
    return " points" if is_percent(metric) else ""


def shown(value) -> str:
    """A setting. Of a long list the beginning."""
    if isinstance(value, list):
        more = f" and {len(value) - MANY} more" if len(value) > MANY else ""
        return ", ".join(map(str, value[:MANY])) + more if value else "none"
    return "none" if value is None else str(value)


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


# ------------------------------------------------------------------------------------------------------------- words


def verdict(headline: dict) -> str:
    lift = headline["lift"]
    if lift["low"] is None:
        return "There is too little to tell the model from the blind answerer."
    if lift["low"] > 0:
        return "The model does better than an answerer that never sees the protein."
    if lift["high"] < 0:
        return "The model does worse than an answerer that never sees the protein."
    return "The model cannot be told from an answerer that never sees the protein: the interval holds zero."


def reading(headline: dict) -> list[str]:
    """Whether its answers come from the protein, by what another one does to them."""
    other = headline.get("over shuffled")
    if other is None or other["low"] is None:
        return []
    if other["low"] > 0:
        return ["Its answers come from the protein in part: shown another one, it does worse."]
    if other["high"] < 0:
        return ["Shown another protein, it does better: its answers do not come from the protein."]
    return ["Shown another protein, it does about as well: that its answers come from the protein is not shown."]


def headline_sentences(figures: dict, with_lifts: bool = True) -> list[str]:
    """The lift in words. with_lifts: also those over itself, which a page may show by themselves."""
    headline = figures["headline"]
    if headline is None:
        return ["Nothing could be scored: there are no closed questions, and no --metrics for texts were asked for."]
    metric = headline["metric"]
    name = "Exact match on closed questions" if metric == "exact" else metric

    def figure(key: str, signed: bool = False) -> str:
        return f"{number(headline[key]['value'], metric, signed)} {bracket(headline[key], metric, signed)}".strip()

    lines = [verdict(headline), *reading(headline)]
    lines.append(f"{name}: {figure('model')} for the model, {figure('blind')} blind.")
    if "nearest" in headline:
        lines.append(f"The nearest training protein's answers: {figure('nearest')}.")
    for key, what in OVER_ITSELF.items():
        if with_lifts and key in headline:
            lines.append(f"Over the same model {what}: {figure(key, True)}{points(metric)}.")
    near = figures.get("num_near_copies")
    if near:
        lines.append(
            f"{near} of {figures['num_proteins']} proteins share at least 90 % of their 3-mers with a training "
            "protein: of these the training data may give the answer away."
        )
    return lines


OVER_ITSELF = {"over shuffled": "shown another protein", "over no-protein": "shown no protein"}


def lift_text(headline: dict, key: str = "lift") -> tuple[str, str]:
    """(the lift, its interval)."""
    metric = headline["metric"]
    return number(headline[key]["value"], metric, True), bracket(headline[key], metric, True)
