"""An evaluation from the command line to the report, alone or on many ranks: predictions first, then scores, then
pages.

OUT/ holds predictions/NAME/*.jsonl, replies.sqlite (what endpoints said), scores.json, report.md, table.tex,
index.html and
tensorboard/. Started again with the same --out it goes on with what is missing.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from proteingpt.config import ConfigError, EncodersConfig
from proteingpt.data.prompts import Prompt
from proteingpt.data.questions import experimental_method
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, on_first_rank, start, stop
from proteingpt.encoders.cache import CachedEncoders
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.evaluation import asking, contestants, report, texts
from proteingpt.evaluation.baselines import BlindGuess
from proteingpt.evaluation.contestants import Case, Share, Showing
from proteingpt.evaluation.predictions import EvaluationError, PredictionStore, Record
from proteingpt.evaluation.scores import MODES, About, Scoring, score
from proteingpt.inference.generate import Decoding, cache_bytes_per_token
from proteingpt.model import assemble
from proteingpt.protein import PrefixLength

log = logging.getLogger("proteingpt")

USER_ERRORS = (
    ConfigError, EvaluationError, LaunchError, ShardError, WeightsNotFound, UnknownWeights, BadCheckpoint,
    assemble.ModelError,
)  # fmt: skip
REMEMBERED_BYTES = 2**30  # encoder rows kept on each rank, since contestants ask for them again
CPU_CACHE_GIB, GPU_CACHE_SHARE = 1.0, 0.5
DAYS_SECONDS = 7 * 24 * 3600  # ranks wait for the slowest, however long it decodes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/evaluate.py",
        description="Scores a trained model on held-out proteins, beside what answers without looking at them.",
    )
    add = parser.add_argument
    add("--model", required=True, help="directory exported by training: RUN/model")
    add("--data", required=True, help="shard directory; its training split is what the blind answers come from")
    add("--split", default="test", help="the split that is asked [test]")
    add("--out", required=True, help="directory of the report; an unfinished one is gone on with")
    add("--embeddings", help="cached encoder rows of these shards, by launch/cache_embeddings.py")
    add("--proteins", type=int, help="ask so many proteins, drawn by the seed [all]")
    add("--questions", type=int, help="ask of each protein its first questions only [all]")
    add("--seed", type=int, default=42, help="draws proteins, partners, bootstrap and sampled answers [42]")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it

    add = parser.add_argument_group("how answers are decoded").add_argument
    add("--max-new-tokens", type=int, default=300, help="longest answer, in tokens [300]")
    add("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    add("--top-p", type=float, default=1.0, help="drawn from the likeliest tokens that sum to this [1]")
    add(
        "--cache-gib",
        type=float,
        help="keys and values held at once on a rank [1 on a CPU, half of a GPU's free memory]",
    )
    add("--device", help="cpu, to leave a GPU alone")

    add = parser.add_argument_group("what it is compared with").add_argument
    names = ", ".join(name for name in contestants.TITLES if name != "model")
    usual = ",".join(contestants.USUAL)
    add("--compare", default=usual, help=f"all, none, or names of: {names}; blind is always there [{usual}]")
    add("--align-model", help="for align: RUN/model of stage 1")
    add("--predicted", help="for predicted: shards of predicted structures, with the same keys or sequences")
    add("--chat-endpoint", metavar="URL", help="for chat: an OpenAI-compatible endpoint, as https://host/v1")
    add("--chat-model", metavar="NAME", help="its model")
    add("--chat-prices", metavar="IN,OUT", help="US dollars per 1,000 tokens read and written")

    add = parser.add_argument_group("how answers are scored").add_argument
    add(
        "--metrics",
        default="none",
        help=f"beside closed questions: all, none, or names of: {', '.join(texts.METRICS)} [none]",
    )
    add("--modes", default="strict,paper", help="against each question's own answer, or as published [strict,paper]")
    add("--tolerance", type=float, default=0.05, help="a number is right within this share of the true one [0.05]")
    add("--bertscore-model", metavar="DIR", help="for bertscore: distilbert-base-uncased")
    add("--bertscore-layer", type=int, help="its layer [5, as published for it]")
    add("--pubmedbert-model", metavar="DIR", help="for pubmedbert: neuml/pubmedbert-base-embeddings")
    add("--wordnet", metavar="DIR", help="for meteor: nltk's data, with corpora/wordnet")
    add("--embedding-endpoint", metavar="URL", help="for gpt: an OpenAI-compatible endpoint")
    add("--embedding-model", default="text-embedding-3-large", help="its model [text-embedding-3-large]")
    add("--embedding-prices", metavar="IN", help="US dollars per 1,000 tokens")
    add("--judge-endpoint", metavar="URL", help="for judge: an OpenAI-compatible endpoint")
    add("--judge-model", metavar="NAME", help="its model")
    add("--judge-rubric", metavar="FILE", help="what it is told, with {question}, {answer} and {prediction} in it")
    add("--judge-prices", metavar="IN,OUT", help="US dollars per 1,000 tokens read and written")
    add("--key-variable", metavar="NAME", help="environment variable with the endpoints' key [OPENAI_API_KEY]")
    add("--max-usd", help="what endpoints may cost in all, over all runs into --out")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    try:
        rank = detect(os.environ)
        check(args)
    except USER_ERRORS as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank: said once
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    log.setLevel(logging.INFO if rank.is_first else logging.WARNING)
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        device = start(rank, timeout_seconds=DAYS_SECONDS)
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.world_size))
        device = torch.device(args.device) if args.device else device
        run(args, rank, device)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    stop()
    return 0


# ---------------------------------------------------------------------------------------------------------- settings


def check(args):
    """What can be told from the command line alone."""
    names_of(args)
    metrics_of(args)
    modes_of(args)
    decoding_of(args)
    for name in ("proteins", "questions", "bertscore_layer"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvaluationError(f"--{name.replace('_', '-')} is {value}, wanted 1 or more")
    if args.tolerance < 0 or (args.cache_gib is not None and args.cache_gib <= 0):
        raise EvaluationError("--tolerance is a share of 0 or more, --cache-gib above 0")


def decoding_of(args) -> Decoding:
    try:
        return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def names_of(args) -> list[str]:
    """The contestants, the model first. `all` takes those whose settings are given; a name without them is an error."""
    given = {
        "align": args.align_model,
        "predicted": args.predicted,
        "chat": args.chat_endpoint and args.chat_model,
    }
    if args.compare == "all":
        wanted = {name for name in contestants.TITLES if given.get(name, True)}
    else:
        wanted = set(split_names(args.compare))
    unknown = sorted(wanted - set(contestants.TITLES))
    if unknown:
        raise EvaluationError(
            f"--compare names {', '.join(unknown)}; known are {', '.join(contestants.TITLES)}, all, none"
        )
    for name in sorted(wanted):
        if not given.get(name, True):
            raise EvaluationError(f"--compare {name} needs {contestants.NEEDS[name]}")
    return [name for name in contestants.TITLES if name in wanted | {"model", "blind"}]


def metrics_of(args) -> list[str]:
    wanted = list(texts.METRICS) if args.metrics == "all" else split_names(args.metrics)
    unknown = sorted(set(wanted) - set(texts.METRICS))
    if unknown:
        raise EvaluationError(f"--metrics names {', '.join(unknown)}; known are {', '.join(texts.METRICS)}, all, none")
    for name, endpoint, model in (
        ("gpt", args.embedding_endpoint, args.embedding_model),
        ("judge", args.judge_endpoint, args.judge_model),
    ):
        if name in wanted and not (endpoint and model):
            setting = "embedding" if name == "gpt" else "judge"
            raise EvaluationError(f"--metrics {name} needs --{setting}-endpoint and --{setting}-model, or leave it out")
    return [name for name in texts.METRICS if name in wanted]


def modes_of(args) -> tuple[str, ...]:
    wanted = split_names(args.modes)
    if not wanted or set(wanted) - set(MODES):
        raise EvaluationError(f"--modes is {args.modes!r}, wanted one or both of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in wanted)


def split_names(text: str) -> list[str]:
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]


def prices_of(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    parts = text.split(",")
    return (parts[0], parts[1] if len(parts) > 1 else "0")


def service_of(args, kind: str) -> asking.Service:
    get = lambda name: getattr(args, f"{kind}_{name}")  # noqa: E731
    return asking.Service(kind, get("endpoint"), get("model"), prices_of(get("prices")), args.key_variable)


# --------------------------------------------------------------------------------------------------------------- run


@dataclass
class Evaluation:
    """What the steps of a run share. All ranks have the same."""

    args: argparse.Namespace
    rank: Rank
    device: torch.device
    out: Path
    names: list[str]
    test: ShardSet
    train: ShardSet
    info: assemble.ModelInfo
    cases: list[Case]
    left_out: list[str]

    def store(self, name: str) -> PredictionStore:
        return PredictionStore(self.out / "predictions" / name)


def run(args, rank: Rank, device: torch.device):
    out = Path(args.out)
    on_first_rank(lambda: out.mkdir(parents=True, exist_ok=True))
    names = names_of(args)
    # What scoring needs is looked for before anything is decoded, since decoding may take days.
    scorers = on_first_rank(lambda: check_scorers(args, out, device))
    directory = Path(args.model)
    info = assemble.read_info(directory)
    test, train = ShardSet(args.data, args.split), ShardSet(args.data, "train")
    model, tokenizer, _ = assemble.load_exported(directory, precision(device), device)
    prompt = Prompt(tokenizer, info.template, max_answer_tokens=args.max_new_tokens)
    cases = contestants.choose_cases(test, info.stage, args.seed, args.proteins, args.questions)
    encoders, parts = load_encoders(args, info, device)
    length = PrefixLength(sum(parts), info.projector_tokens)
    context = assemble.context_length(model.llm.config)
    cases, left_out = contestants.keep_fitting(cases, prompt, length, context, args.max_new_tokens)
    if not cases:
        raise EvaluationError(
            f"the {args.split} split of {args.data} has nothing to ask a model of stage {info.stage}"
            + (f": {len(left_out)} proteins are longer than the LLM's context" if left_out else "")
        )
    evaluation = Evaluation(args, rank, device, out, names, test, train, info, cases, left_out)
    near = find_nearest(evaluation)
    answer_all(evaluation, Showing(test, encoders, model, prompt, parts), near)
    figures = on_first_rank(lambda: finish(evaluation, near, scorers))
    if rank.is_first:
        print(report.terminal_text(figures, out), flush=True)


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_scorers(args, out: Path, device) -> bool:
    """Makes what scores texts once, so that a missing model is told now; made again when it is used."""
    make_scorers(args, metrics_of(args), out, device)
    if "judge" in metrics_of(args):
        asking.read_rubric(args.judge_rubric)
        judge_asker(args, out)
    return True


def load_encoders(args, info, device):
    """(encoders, which of the two give rows). From the cache of --embeddings, or live."""
    known = {name: getattr(info, name) for name in EncodersConfig.__dataclass_fields__ if hasattr(info, name)}
    config = EncodersConfig(**known, dtype=info.encoder_dtype)
    if args.embeddings:
        encoders = CachedEncoders(args.embeddings, config, device)
    else:
        encoders = Remembering(Encoders.load(config, device), REMEMBERED_BYTES)
    pair = getattr(encoders, "encoders", encoders)
    for part, name in ((pair.structure, "esm_if1"), (pair.sequence, "esm2")):
        wanted = getattr(info, f"{name}_fingerprint")
        if wanted and part.fingerprint and part.fingerprint != wanted:
            raise assemble.ModelError(
                f"{name} has other weights (sha256 {part.fingerprint[:12]}) than those that {args.model} was trained "
                f"with "
                f"({wanted[:12]}): its answers would mean nothing"
            )
    return encoders, (bool(pair.structure.width), bool(pair.sequence.width))


def find_nearest(evaluation: Evaluation) -> dict[str, contestants.Neighbour]:
    """The nearest training protein of each case; every rank looks for its share."""
    rank = evaluation.rank
    mine = evaluation.cases[rank.rank :: rank.world_size]
    found = contestants.nearest_training(mine, evaluation.test, evaluation.train)
    return {key: neighbour for part in gather_objects(found) for key, neighbour in part.items()}


def answer_all(evaluation: Evaluation, showing: Showing, near):
    """The predictions of every contestant, on disk."""
    args, cases = evaluation.args, evaluation.cases
    share = Share(evaluation.rank.rank, evaluation.rank.world_size, most_tokens(args, showing.model, evaluation.device))
    made_from = {
        "model": contestants.directory_fingerprint(Path(args.model)),
        "data": [evaluation.test.fingerprint, args.split, evaluation.train.fingerprint],
        "asked": [args.proteins, args.questions, args.seed, len(cases)],
        "decoding": [args.max_new_tokens, args.temperature, args.top_p],
    }
    for name in evaluation.names:
        store = evaluation.store(name)
        on_first_rank(lambda: store.open(made_from | of_contestant(name, args)))
        if name in ("blind", "nearest", "chat"):
            on_first_rank(lambda: answer_without_model(name, evaluation, store, near))
        else:
            shown, asked = shown_by(name, evaluation, showing)
            contestants.generate(name, store, asked, shown, decoding_of(args), share)
        gather_objects(None)  # the next contestant begins, and scores are made, once all ranks have written theirs


def of_contestant(name: str, args) -> dict:
    """What a contestant's predictions depend on beside what all share."""
    if name == "align":
        return {"align_model": contestants.directory_fingerprint(Path(args.align_model))}
    if name == "predicted":
        return {"predicted": str(Path(args.predicted).absolute())}
    return {"chat": [args.chat_endpoint, args.chat_model]} if name == "chat" else {}


def make_guess(evaluation: Evaluation) -> BlindGuess:
    turns = contestants.training_turns(evaluation.train, evaluation.info.stage)
    try:
        return BlindGuess(turns)
    except ValueError as error:
        raise EvaluationError(f"the training split of {evaluation.args.data} has {error}") from error


def most_tokens(args, model, device) -> int:
    """Cached positions that fit."""
    if args.cache_gib is not None:
        num_bytes = args.cache_gib * 2**30
    elif device.type == "cuda":
        num_bytes = GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        num_bytes = CPU_CACHE_GIB * 2**30
    return int(num_bytes / cache_bytes_per_token(model.llm.config, precision(device)))


def shown_by(name: str, evaluation: Evaluation, showing: Showing):
    """(what the contestant is shown, the cases that it can be shown)."""
    args, cases, device = evaluation.args, evaluation.cases, evaluation.device
    dtype = precision(device)
    if name == "model":
        return showing.whole(), cases
    if name == "shuffled":
        return showing.shuffled(cases), cases
    if name in ("no-protein", "structure-only", "sequence-only"):
        return showing.only(structure=name == "structure-only", sequence=name == "sequence-only"), cases
    if name == "align":
        model, _, info = assemble.load_exported(Path(args.align_model), dtype, device)
        if (info.structure_width, info.sequence_width) != (
            evaluation.info.structure_width,
            evaluation.info.sequence_width,
        ):
            raise EvaluationError(
                f"--align-model: {args.align_model} was trained with other encoders than {args.model}"
            )
        return showing.whole(model), cases
    if name == "predicted":
        found = contestants.match_predicted(cases, evaluation.test, args.predicted)
        return showing.predicted(found), [case for case in cases if case.key in found]
    assert name == "plain-llm", name
    model = contestants.plain_model(Path(args.model), showing.model, dtype, device)
    shown, context = showing.as_text(model), assemble.context_length(model.llm.config)
    return shown, [case for case in cases if shown.prefix_tokens(case) + args.max_new_tokens < context]


def answer_without_model(name: str, evaluation: Evaluation, store: PredictionStore, near):
    cases = evaluation.cases
    left = contestants.missing([wanted for case in cases for wanted in case.wanted], store.read())
    todo = [case for case in cases if case.key in left]
    if not todo:
        return
    if name == "blind":
        store.append(0, contestants.answer_blind(todo, make_guess(evaluation)))
    elif name == "nearest":
        guess = make_guess(evaluation)
        store.append(0, contestants.answer_nearest(todo, near, evaluation.train, evaluation.info.stage, guess))
    else:
        answer_by_chat(evaluation, store, todo)


def answer_by_chat(evaluation: Evaluation, store: PredictionStore, todo: list[Case]):
    args, replies = evaluation.args, asking.Replies(evaluation.out / "replies.sqlite")
    form = asking.chat_form(args.chat_model, max(len(case.turns) for case in todo))
    asker = asking.Asker(service_of(args, "chat"), form, replies, args.max_usd)

    def work(case: Case):
        sequence = evaluation.test.read(case.number).protein.sequence
        return asking.chat_answers(asker, sequence, case.turns)

    answers = asker.run([lambda case=case: work(case) for case in todo])
    records = [
        case.records(dict(enumerate(said))) for case, said in zip(todo, answers, strict=True) if said is not None
    ]
    store.append(0, [record for group in records for record in group])
    unanswered = sum(said is None for said in answers)
    if unanswered:
        log.warning(
            "chat: %d of %d proteins got no usable answer; they are left out of its scores", unanswered, len(todo)
        )
    if not records:
        raise EvaluationError(f"{asker.client.name} gave no usable answer for any protein")
    replies.close()


# ------------------------------------------------------------------------------------------------- scores and report


def make_scorers(args, metrics: list[str], out: Path, device) -> dict[str, texts.Scorer]:
    made = {
        "rouge": lambda: texts.make_rouge(),
        "bleu": lambda: texts.make_bleu(),
        "meteor": lambda: texts.make_meteor(args.wordnet),
        "bertscore": lambda: texts.make_bertscore(args.bertscore_model, args.bertscore_layer, device),
        "pubmedbert": lambda: texts.make_cosine("PubMedBERT", texts.local_embedder(args.pubmedbert_model, device)),
        "gpt": lambda: texts.make_cosine("GPT", asking.endpoint_embedder(embedding_asker(args, out))),
    }
    return {name: made[name]() for name in metrics if name != "judge"}


def embedding_asker(args, out: Path) -> asking.Asker:
    replies = asking.Replies(out / "replies.sqlite")
    return asking.Asker(
        service_of(args, "embedding"), asking.embedding_form(args.embedding_model), replies, args.max_usd
    )


def judge_asker(args, out: Path) -> asking.Asker:
    replies = asking.Replies(out / "replies.sqlite")
    return asking.Asker(service_of(args, "judge"), asking.judge_form(args.judge_model), replies, args.max_usd)


def records_of(evaluation: Evaluation, name: str) -> list[Record]:
    there = evaluation.store(name).read()
    wanted = [wanted for case in evaluation.cases for wanted in case.wanted]
    return [there[key] for key in wanted if key in there]


def finish(evaluation: Evaluation, near, _checked) -> dict:
    """Scores and report, by rank 0."""
    args, out = evaluation.args, evaluation.out
    records = {name: records_of(evaluation, name) for name in evaluation.names}
    metrics = metrics_of(args)
    marks = {}
    if "judge" in metrics:
        triples = [(r.question, r.answer, r.prediction) for mine in records.values() for r in mine]
        marks = asking.judge(judge_asker(args, out), asking.read_rubric(args.judge_rubric), triples)
    scoring = Scoring(
        make_scorers(args, metrics, out, evaluation.device), modes_of(args), args.tolerance, args.seed, marks=marks
    )
    about = {case.key: about_case(evaluation.test, case, near[case.key].similarity) for case in evaluation.cases}
    figures = score(records, about, scoring)
    figures |= {
        "about": description(evaluation, metrics, marks),
        "titles": {name: title_of(name, args) for name in evaluation.names},
    }
    report.write(figures, out)
    return figures


def about_case(shards: ShardSet, case: Case, similarity: float) -> About:
    facts = shards.read(case.number).metadata.get("facts") or {}
    return About(
        length=case.num_residues,
        resolution=facts.get("resolution"),
        method=experimental_method(tuple(facts.get("methods") or ())),
        similarity=similarity,
    )


def title_of(name: str, args) -> str:
    title = contestants.TITLES[name]
    return title.replace("chat model", args.chat_model) if name == "chat" else title


def description(evaluation: Evaluation, metrics: list[str], marks) -> dict:
    """What the report says of how it was made. No clock: the same evaluation gives the same bytes."""
    args, info = evaluation.args, evaluation.info
    unjudged = sum(mark is None for mark in marks.values())
    return {
        "model": str(args.model),
        "stage": info.stage,
        "llm": info.llm,
        "encoders": [info.esm2, info.esm_if1],
        "data": str(args.data),
        "split": args.split,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "tolerance": args.tolerance,
        "metrics": metrics,
        "modes": list(modes_of(args)),
        "left_out_as_too_long": evaluation.left_out,
        "unjudged": unjudged,
        "training_proteins": len(evaluation.train),
    }


def read_figures(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
