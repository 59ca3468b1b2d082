"""The command line of launch/evaluate.py: its options, and what can be told of them before anything is loaded."""

import argparse
import dataclasses
from pathlib import Path

from proteingpt.config import DataConfig, from_dict, read_recipe
from proteingpt.config.command import parse_data
from proteingpt.evaluation import texts
from proteingpt.evaluation.asking import Service
from proteingpt.evaluation.contestants import NEEDS, TITLES, USUAL
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.evaluation.scores import MODES
from proteingpt.inference.generate import Decoding

WHOLE = "whole"  # long proteins as they are, beside what a recipe can say


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/evaluate.py",
        description="Scores a trained model on held-out proteins, beside what answers without looking at them.",
    )
    add = parser.add_argument
    add("--model", required=True, help="directory exported by training: RUN/model")
    add("--data", nargs="+", metavar="DIR", help="shard directories; blind answers come from their training splits "
        "[those that the model was trained on]")  # fmt: skip
    add("--split", default="test", help="the split that is asked [test]")
    add("--out", required=True, help="directory of the report; an unfinished one is gone on with")
    add("--embeddings", help="cached encoder rows of these shards, by launch/cache_embeddings.py [without --data those "
        "that the model was trained with, if any]")  # fmt: skip
    add("--max-residues", type=int, help="longer proteins are treated as the next option says [as in training]")
    add("--long-proteins", choices=("skip", "crop", WHOLE),
        help="leave them out, show their middle, or show them whole after all [as in training]")  # fmt: skip
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
    names, usual = ", ".join(name for name in TITLES if name != "model"), ",".join(USUAL)
    add("--compare", default=usual, help=f"all, none, or names of: {names}; blind is always there [{usual}]")
    add("--align-model", help="for align: RUN/model of stage 1")
    add("--predicted", help="for predicted: shards of predicted structures, with the same keys or sequences")
    add("--chat-endpoint", metavar="URL", help="for chat: an OpenAI-compatible endpoint, as https://host/v1")
    add("--chat-model", metavar="NAME", help="its model")
    add("--chat-prices", metavar="IN,OUT", help="US dollars per 1,000 tokens read and written")

    add = parser.add_argument_group("how answers are scored").add_argument
    known = ", ".join(texts.METRICS)
    add("--metrics", default="none", help=f"beside closed questions: all, none, or names of: {known} [none]")
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


def check(args):
    """What can be told from the command line alone. Raises EvaluationError, ConfigError."""
    names_of(args)
    metrics_of(args)
    modes_of(args)
    decoding_of(args)
    if args.data:
        parse_data(args.data)
    for name in ("proteins", "questions", "bertscore_layer", "max_residues"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise EvaluationError(f"--{name.replace('_', '-')} is {value}, wanted 1 or more")
    if args.long_proteins == WHOLE and args.max_residues is not None:
        raise EvaluationError("--long-proteins whole leaves no protein long: leave --max-residues out")
    if args.tolerance < 0 or (args.cache_gib is not None and args.cache_gib <= 0):
        raise EvaluationError("--tolerance is a share of 0 or more, --cache-gib above 0")


def data_of(args) -> DataConfig:
    """Which shards, and what is done with long proteins: as the recipe beside the model says, unless the command line
    says otherwise. Raises EvaluationError, ConfigError."""
    recipe = Path(args.model) / "recipe.yaml"
    values = read_recipe(str(recipe)).get("data") if recipe.is_file() else None
    trained = from_dict(DataConfig, values or {}, "data")
    changes: dict = {"embeddings": args.embeddings}
    if args.data:
        changes |= {path.removeprefix("data."): value for path, value in parse_data(args.data).items()}
    elif args.embeddings is None:
        changes["embeddings"] = trained.embeddings
    if args.long_proteins == WHOLE:
        changes |= {"max_residues": None, "long_proteins": "skip"}
    else:
        changes["long_proteins"] = args.long_proteins or trained.long_proteins
        changes["max_residues"] = args.max_residues or trained.max_residues
    if changes["long_proteins"] == "crop" and changes["max_residues"] is None:
        raise EvaluationError("--long-proteins crop needs --max-residues: the model was trained on whole proteins")
    if changes["long_proteins"] == "crop" and changes["embeddings"]:
        raise EvaluationError(
            "cached embeddings are of whole proteins, and long ones are to be cropped: give --long-proteins skip or "
            "whole, or leave --embeddings out"
        )
    data = dataclasses.replace(trained, **changes)
    if data.shards is None and data.mixture is None:
        raise EvaluationError(
            f"--data is not given, and {recipe} does not name the shards of the training: give --data DIR"
        )
    return data


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
        wanted = {name for name in TITLES if given.get(name, True)}
    else:
        wanted = set(split_names(args.compare))
    unknown = sorted(wanted - set(TITLES))
    if unknown:
        raise EvaluationError(f"--compare names {', '.join(unknown)}; known are {', '.join(TITLES)}, all, none")
    for name in sorted(wanted):
        if not given.get(name, True):
            raise EvaluationError(f"--compare {name} needs {NEEDS[name]}")
    return [name for name in TITLES if name in wanted | {"model", "blind"}]


def metrics_of(args) -> list[str]:
    wanted = list(texts.METRICS) if args.metrics == "all" else split_names(args.metrics)
    unknown = sorted(set(wanted) - set(texts.METRICS))
    if unknown:
        raise EvaluationError(f"--metrics names {', '.join(unknown)}; known are {', '.join(texts.METRICS)}, all, none")
    for name, setting in (("gpt", "embedding"), ("judge", "judge")):
        if name in wanted and not (getattr(args, f"{setting}_endpoint") and getattr(args, f"{setting}_model")):
            raise EvaluationError(f"--metrics {name} needs --{setting}-endpoint and --{setting}-model, or leave it out")
    return [name for name in texts.METRICS if name in wanted]


def modes_of(args) -> tuple[str, ...]:
    wanted = split_names(args.modes)
    if not wanted or set(wanted) - set(MODES):
        raise EvaluationError(f"--modes is {args.modes!r}, wanted one or both of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in wanted)


def split_names(text: str) -> list[str]:
    return [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]


def service_of(args, kind: str) -> Service:
    """kind: chat, judge or embedding, as its settings begin."""
    url, model, prices = (getattr(args, f"{kind}_{name}") for name in ("endpoint", "model", "prices"))
    if prices is not None:
        read, _, written = prices.partition(",")
        prices = (read, written or "0")
    return Service(kind, url, model, prices, args.key_variable)
