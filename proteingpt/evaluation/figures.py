"""From predictions on disk to everything that the report shows: scores, and how they were made."""

from pathlib import Path

from proteingpt.config import DataConfig
from proteingpt.config.addresses import without_secrets
from proteingpt.data.questions import experimental_method
from proteingpt.evaluation import asking, contestants, texts
from proteingpt.evaluation.answering import Evaluation
from proteingpt.evaluation.cases import Case, Shards, set_of
from proteingpt.evaluation.command import metrics_of, modes_of, names_of, service_of
from proteingpt.evaluation.predictions import Record
from proteingpt.evaluation.scores import About, Scoring, score


def make_scorers(args, out: Path, device) -> dict[str, texts.Scorer]:
    made = {
        "rouge": lambda: texts.make_rouge(),
        "bleu": lambda: texts.make_bleu(),
        "meteor": lambda: texts.make_meteor(args.wordnet),
        "bertscore": lambda: texts.make_bertscore(args.bertscore_model, args.bertscore_layer, device),
        "pubmedbert": lambda: texts.make_cosine("PubMedBERT", texts.local_embedder(args.pubmedbert_model, device)),
        "gpt": lambda: texts.make_cosine("GPT", asking.endpoint_embedder(make_asker(args, out, "embedding"))),
    }
    return {name: made[name]() for name in metrics_of(args) if name != "judge"}


def make_asker(args, out: Path, kind: str) -> asking.Asker:
    """kind: judge or embedding."""
    form = asking.judge_form(args.judge_model) if kind == "judge" else asking.embedding_form(args.embedding_model)
    return asking.Asker(service_of(args, kind), form, asking.Replies(out / "replies.sqlite"), args.max_usd)


def check_scorers(args, out: Path, device):
    """Makes what scores texts once, so that a missing model is told now; made again when it is used."""
    make_scorers(args, out, device)
    if "judge" in metrics_of(args):
        asking.read_rubric(args.judge_rubric)
        make_asker(args, out, "judge")


def make_figures(evaluation: Evaluation, near) -> dict:
    """By rank 0."""
    args, out = evaluation.args, evaluation.out
    records = {name: records_of(evaluation, name) for name in names_of(args)}
    marks = {}
    if "judge" in metrics_of(args):
        triples = [(r.question, r.answer, r.prediction) for mine in records.values() for r in mine]
        marks = asking.judge(make_asker(args, out, "judge"), asking.read_rubric(args.judge_rubric), triples)
    scorers = make_scorers(args, out, evaluation.device)
    about = {case.key: about_case(evaluation.test, case, near[case.key].similarity) for case in evaluation.cases}
    figures = score(records, about, Scoring(scorers, modes_of(args), args.tolerance, args.seed, marks=marks))
    return figures | {
        "about": description(evaluation, sum(mark is None for mark in marks.values())),
        "titles": {name: title_of(name, args) for name in records},
    }


def records_of(evaluation: Evaluation, name: str) -> list[Record]:
    there = evaluation.store(name).read()
    wanted = [wanted for case in evaluation.cases for wanted in case.wanted]
    return [there[key] for key in wanted if key in there]


def about_case(shards: Shards, case: Case, similarity: float | None) -> About:
    facts = shards.read(case.number).metadata.get("facts") or {}
    return About(
        length=int(shards.num_residues[case.number]),
        resolution=facts.get("resolution"),
        method=experimental_method(tuple(facts.get("methods") or ())),
        similarity=similarity,
        shard_set=set_of(shards, case.key),
    )


def title_of(name: str, args) -> str:
    title = contestants.TITLES[name]
    return title.replace("chat model", args.chat_model) if name == "chat" else title


def description(evaluation: Evaluation, unjudged: int) -> dict:
    """What the report says of how it was made. No clock, no address of an endpoint: the same evaluation gives the same
    bytes, and may be shown to anyone."""
    args, info, data, chosen = evaluation.args, evaluation.info, evaluation.data, evaluation.chosen
    metrics = metrics_of(args)
    used = {
        "bertscore": ("bertscore_model", args.bertscore_model),
        "pubmedbert": ("pubmedbert_model", args.pubmedbert_model),
        "gpt": ("embedding_model", args.embedding_model), "judge": ("judge_model", args.judge_model),
    }  # fmt: skip
    return {
        "model": str(args.model),
        "stage": info.stage,
        "llm": info.llm,
        "encoders": [info.esm2, info.esm_if1],
        "embeddings": data.embeddings or "computed",
        "data": without_secrets(list(data.mixture or [data.shards])),
        "split": args.split,
        "training_proteins": len(evaluation.train),
        "long_proteins": told_length(data, evaluation),
        "left_out_as_too_long": chosen.too_long,
        "left_out_as_unreadable": chosen.unreadable,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "tolerance": args.tolerance,
        "modes": list(modes_of(args)),
        "metrics": metrics,
        **{setting: value for metric, (setting, value) in used.items() if metric in metrics},
        **({"judge_rubric": args.judge_rubric or "the one that comes with proteingpt", "unjudged": unjudged}
           if "judge" in metrics else {}),
    }  # fmt: skip


def told_length(data: DataConfig, evaluation: Evaluation) -> str:
    if data.max_residues is None:
        return "shown whole"
    if data.long_proteins == "skip":
        return f"over {data.max_residues} residues left out"
    cut = sum(case.num_residues < evaluation.test.num_residues[case.number] for case in evaluation.cases)
    return f"cropped to their middle {data.max_residues} residues: {cut} of {len(evaluation.cases)} proteins"
