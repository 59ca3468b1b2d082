"""From predictions to figures: every contestant's scores with intervals, the lift, and the tables behind the report.

Nothing here knows of models or files: records go in, plain values come out (JSON), NaN as null.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from proteingpt.data.plan import hash_keys, mix
from proteingpt.evaluation.closed import (
    Statistic,
    closed_questions,
    closed_statistics,
    kind_of,
    make_questions,
    mean_of,
    question_statistics,
)
from proteingpt.evaluation.intervals import Interval, sample
from proteingpt.evaluation.metrics import exact_match
from proteingpt.evaluation.predictions import Record
from proteingpt.evaluation.texts import Scorer, pairs_of, paper_scores, score_pairs, strict_scores

MODES = ("strict", "paper")
NUM_EXAMPLES = 8
MODEL, BLIND = "model", "blind"

# Where the proteins are cut: upper bounds, each up to but without the bound.
LENGTH_BOUNDS = (100, 200, 400, 800)
RESOLUTION_BOUNDS = (1.5, 2.0, 2.5, 3.0)  # angstrom
SIMILARITY_BOUNDS = (0.15, 0.3, 0.6, 0.9)  # share of 3-mers in common with the nearest training protein
NEAR_COPY = SIMILARITY_BOUNDS[-1]
BREAKDOWNS = ("length", "resolution", "method", "similarity to the training set", "shard set")


@dataclass(frozen=True)
class About:
    """What the tables break the proteins down by; None where it is not known. resolution in angstrom; shard_set: where
    several were evaluated."""

    length: int
    resolution: float | None = None
    method: str | None = None
    similarity: float | None = None
    shard_set: str | None = None


@dataclass(frozen=True)
class Scoring:
    """How scores are made. scorers: {metric: its scorer}; marks: {(question, answer, prediction): judge's mark}."""

    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES
    tolerance: float = 0.05
    seed: int = 42
    num_draws: int = 1000
    marks: Mapping[tuple[str, str, str], float | None] = field(default_factory=dict)


def score(records: Mapping[str, Sequence[Record]], about: Mapping[str, About], scoring: Scoring) -> dict:
    """Everything the report shows. records: {contestant: its records}, `model` and `blind` among them.

    A contestant that answered only some questions is compared with the model and the blind on those.
    """
    place_of = {key: place for place, key in enumerate(sorted({r.key for r in records[MODEL]}))}
    kinds = question_kinds(records[MODEL])
    values = text_values(records, scoring)
    jobs: dict[tuple[str, str, str], Statistic] = {}
    for name, mine in records.items():
        asked = {(record.key, record.turn) for record in mine}
        for who in dict.fromkeys((name, BLIND, MODEL)):
            same = [record for record in records[who] if (record.key, record.turn) in asked]
            for metric, statistic in statistics(same, kinds, place_of, values, scoring).items():
                jobs[name, who, metric] = statistic
    drawn = sample(jobs, len(place_of), scoring.seed, scoring.num_draws)
    contestants = {name: contestant_scores(name, mine, drawn) for name, mine in records.items()}
    headline_metric = "exact" if kinds else first_text_metric(contestants[MODEL]["scores"])
    return {
        "num_proteins": len(place_of),
        "num_questions": len(records[MODEL]),
        "num_closed_questions": sum(record.question in kinds for record in records[MODEL]),
        "num_empty": sum(record.prediction == "N/A" for record in records[MODEL]),
        "num_near_copies": sum((one.similarity or 0) >= NEAR_COPY for one in about.values()),
        "headline": headline(headline_metric, contestants),
        "contestants": contestants,
        "questions": by_question(records, kinds, place_of, scoring),
        "breakdowns": breakdowns(records, kinds, place_of, about, scoring),
        "examples": examples(records, kinds, scoring.seed),
    }


def question_kinds(records: Sequence[Record]) -> dict[str, str]:
    closed = closed_questions(records)
    answers = {question: [] for question in sorted(closed)}
    for record in records:
        if record.question in closed:
            answers[record.question].append(record.answer)
    return {question: kind_of(texts) for question, texts in answers.items()}


# ------------------------------------------------------------------------------------------------------- statistics


def text_values(records: Mapping[str, Sequence[Record]], scoring: Scoring) -> dict[str, dict]:
    """{score: {pair: value}}: every pair that any contestant needs in any mode, scored once."""
    pairs = set().union(*(pairs_of(mine, mode) for mine in records.values() for mode in scoring.modes))
    made = {}
    for scorer in scoring.scorers.values():
        made |= score_pairs(scorer, pairs)
    return made


def statistics(mine, kinds, place_of, values, scoring: Scoring) -> dict[str, Statistic]:
    """{metric: statistic} of one contestant's records."""
    made = closed_statistics(make_questions(mine, kinds, place_of, scoring.tolerance))
    for mode in scoring.modes:
        for name, pairs in values.items():
            scored = {name: strict_scores(mine, pairs)} if mode == "strict" else paper_scores(name, mine, pairs)
            for score_name, of_protein in scored.items():
                made[f"{score_name}, {mode}"] = over_proteins(of_protein, place_of)
    if scoring.marks:
        marks = {}
        for record in mine:
            mark = scoring.marks.get((record.question, record.answer, record.prediction))
            if mark is not None:
                marks.setdefault(record.key, []).append(mark)
        made["judge, strict"] = over_proteins({key: float(np.mean(of)) for key, of in marks.items()}, place_of)
    return made


def over_proteins(values: dict[str, float], place_of: dict[str, int]) -> Statistic:
    """The mean over proteins (macro average)."""
    return mean_of(np.array([place_of[key] for key in values], int), np.array(list(values.values()), float))


def contestant_scores(name: str, mine: Sequence[Record], drawn: dict) -> dict:
    """scores; lift: over the blind on the same questions; difference: to the model on the same questions."""
    metrics = [metric for contestant, who, metric in drawn if contestant == name and who == name]
    own = {metric: drawn[name, name, metric] for metric in metrics}

    def against(who: str) -> dict:
        others = {metric: drawn.get((name, who, metric)) for metric in metrics}
        return {m: plain(Interval.of(own[m] - others[m])) for m in metrics if who != name and others[m] is not None}

    return {
        "num_proteins": len({record.key for record in mine}),
        "num_questions": len(mine),
        "scores": {metric: plain(Interval.of(values)) for metric, values in own.items()},
        "lift": against(BLIND),
        "difference": against(MODEL),
    }


def plain(interval: Interval) -> dict:
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def first_text_metric(scores: dict) -> str | None:
    return next((name for name in scores if name.endswith("strict")), next(iter(scores), None))


def headline(metric: str | None, contestants: dict) -> dict | None:
    """The lift: how much of the score comes from the protein, over the blind and over the model shown another one."""
    if metric is None:
        return None
    model = contestants[MODEL]
    made = {"metric": metric, "model": model["scores"][metric], "lift": model["lift"][metric]}
    made[BLIND] = contestants[BLIND]["scores"][metric]
    if "nearest" in contestants:
        made["nearest"] = contestants["nearest"]["scores"][metric]
    for name in ("shuffled", "no-protein"):
        if name in contestants:
            # What the model loses, so the other way round.
            difference = contestants[name]["difference"][metric]
            turned = {"value": difference["value"], "low": difference["high"], "high": difference["low"]}
            made[f"over {name}"] = {k: None if v is None else 0.0 - v for k, v in turned.items()}
    return made


# ------------------------------------------------------------------------------------------------------------ tables


def by_question(records, kinds, place_of, scoring: Scoring) -> list[dict]:
    """One row for each closed question: the model and the blind, and the lift on its exact matches."""
    jobs, rows = {}, []
    for name in (MODEL, BLIND):
        for question in make_questions(records[name], kinds, place_of, scoring.tolerance):
            for metric, statistic in question_statistics(question).items():
                jobs[question.text, name, metric] = statistic
    drawn = sample(jobs, len(place_of), scoring.seed, scoring.num_draws)
    counts = {question: sum(record.question == question for record in records[MODEL]) for question in kinds}
    for question, kind in kinds.items():
        row = {"question": question, "kind": kind, "num": counts[question]}
        for name in (MODEL, BLIND):
            mine = {metric: values for (text, who, metric), values in drawn.items() if (text, who) == (question, name)}
            row[name] = {metric: plain(Interval.of(values)) for metric, values in mine.items()}
        row["lift"] = plain(Interval.of(drawn[question, MODEL, "exact"] - drawn[question, BLIND, "exact"]))
        rows.append(row)
    return rows


def bin_of(value: float | None, bounds: Sequence[float], unit: str = "") -> str | None:
    """`< 100`, `100 - 200`, ..., `>= 800`; None of None."""
    if value is None:
        return None
    above = [bound for bound in bounds if value >= bound]
    if not above:
        return f"< {bounds[0]}{unit}"
    number = len(above)
    return f">= {bounds[-1]}{unit}" if number == len(bounds) else f"{above[-1]} - {bounds[number]}{unit}"


def bins_of(about: About) -> dict[str, str]:
    found = {
        "length": bin_of(about.length, LENGTH_BOUNDS, " residues"),
        "resolution": bin_of(about.resolution, RESOLUTION_BOUNDS, " Å"),
        "method": about.method,
        "similarity to the training set": bin_of(about.similarity, SIMILARITY_BOUNDS),
        "shard set": about.shard_set,
    }
    return {by: label or "unknown" for by, label in found.items()}


def bin_order(by: str, labels) -> list[str]:
    """Bins from small to large, methods by name, unknown last."""
    bounds = {
        "length": LENGTH_BOUNDS,
        "resolution": RESOLUTION_BOUNDS,
        "similarity to the training set": SIMILARITY_BOUNDS,
    }
    unit = {"length": " residues", "resolution": " Å"}.get(by, "")
    values = [0, *bounds.get(by, ())]
    known = [bin_of(value, bounds[by], unit) for value in values] if by in bounds else sorted(set(labels) - {"unknown"})
    return [label for label in [*known, "unknown"] if label in labels]


def breakdowns(records, kinds, place_of, about: Mapping[str, About], scoring: Scoring) -> dict[str, list[dict]]:
    """{by: rows} of exact matches on closed questions, of the model, the blind, and the lift."""
    bins = {key: bins_of(about[key]) for key in place_of if key in about}
    jobs, counts = {}, {}
    for by in BREAKDOWNS:
        labels = {of[by] for of in bins.values()}
        if labels == {"unknown"}:
            continue
        for label in bin_order(by, labels) if kinds else ():
            inside = {key for key, of in bins.items() if of[by] == label}
            counts[by, label] = len(inside)
            for name in (MODEL, BLIND):
                mine = [record for record in records[name] if record.key in inside and record.question in kinds]
                places = np.array([place_of[record.key] for record in mine], int)
                hits = np.array([exact_match(record.prediction, record.answer) for record in mine], float)
                jobs[by, label, name] = mean_of(places, hits)
    drawn = sample(jobs, len(place_of), scoring.seed, scoring.num_draws)
    made: dict[str, list[dict]] = {}
    for (by, label), num in counts.items():
        model, blind = drawn[by, label, MODEL], drawn[by, label, BLIND]
        row = {"label": label, "num_proteins": num, MODEL: plain(Interval.of(model)), BLIND: plain(Interval.of(blind))}
        made.setdefault(by, []).append({**row, "lift": plain(Interval.of(model - blind))})
    return made


def examples(records, kinds, seed: int) -> dict[str, list[dict]]:
    """good: right where the blind is wrong; bad: wrong where the blind is right; open: answers in free text. By lot,
    one of each question before a second."""
    blind = {(record.key, record.turn): record.prediction for record in records[BLIND]}
    order = np.argsort(mix(hash_keys([f"{r.key} {r.turn}" for r in records[MODEL]]), seed, 7), kind="stable")
    chosen = {"good": [], "bad": [], "open": []}
    for number in order:
        record = records[MODEL][int(number)]
        guess = blind.get((record.key, record.turn), "")
        right, guessed = exact_match(record.prediction, record.answer), exact_match(guess, record.answer)
        if record.question not in kinds:
            kind = "open"
        elif right == guessed:
            continue
        else:
            kind = "good" if right else "bad"
        chosen[kind].append({**vars(record), "blind": guess})
    return {kind: spread(found)[:NUM_EXAMPLES] for kind, found in chosen.items()}


def spread(found: list[dict]) -> list[dict]:
    seen: dict[str, int] = {}
    ranks = []
    for one in found:
        ranks.append(seen.get(one["question"], 0))
        seen[one["question"]] = ranks[-1] + 1
    return [found[i] for i in sorted(range(len(found)), key=lambda i: (ranks[i], i))]
