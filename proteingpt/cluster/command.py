"""What launch/estimate.py does: settings as launch/train.py takes them, a cluster, lengths; then tables, or JSON."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from proteingpt.cluster.calibrate import CalibrationError, calibrate, read_calibration, write_calibration
from proteingpt.cluster.estimate import Choice, Estimator, alternatives
from proteingpt.cluster.shapes import NAMED, ShapeError, llm_config
from proteingpt.cluster.spec import ClusterError, parse_cluster
from proteingpt.cluster.tables import json_of, text_of
from proteingpt.cluster.work import ANSWER, DESCRIPTION, QUESTION, SAMPLED, DataSet, scaled_lengths
from proteingpt.config import Command, ConfigError, parse_command
from proteingpt.data.plan import PlanError, mix
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.model import assemble
from proteingpt.model.attention import AttentionError

USER_ERRORS = (
    ConfigError,
    ClusterError,
    ShapeError,
    CalibrationError,
    PlanError,
    ShardError,
    assemble.ModelError,
    AttentionError,
)
DEFAULT_LLM = "vicuna-7b"
TOKENS_PER_WORD = 1.4  # of scientific English, by Llama's tokenizers


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/estimate.py",
        allow_abbrev=False,
        description="Memory, speed and hours of recipes on a cluster, before a run. Other options are those of "
        "launch/train.py.",
    )
    add = parser.add_argument
    add("--recipe", nargs="+", required=True, help="one, or several one after the other: names, or .yaml files")
    add("--cluster", help="2xH100-80,2xA100-40 (count, name, GiB), or a .yaml file")
    add("--ds_config", default="ds_configs/zero2.json", help="DeepSpeed JSON [%(default)s]")
    add("--llm", help=f"model directory, or one of {', '.join(NAMED)} [{DEFAULT_LLM}]")
    add("--data", metavar="DIR", help="shards, whose lengths count; else the numbers that follow:")
    add("--proteins", type=int, default=132_092, help="in the data set [%(default)s, the paper's]")
    add("--train-share", type=float, default=0.8, help="of them, that are trained on [%(default)s]")
    add("--residues", type=float, default=300, help="of a protein on average, spread as in the PDB [%(default)s]")
    add("--questions", type=int, default=35, help="of a protein [%(default)s]")
    add("--question-tokens", type=int, default=QUESTION, help="on average [%(default)s]")
    add("--answer-tokens", type=int, default=ANSWER, help="on average [%(default)s]")
    add("--description-tokens", type=int, default=DESCRIPTION, help="on average [%(default)s]")
    add("--embeddings", nargs="?", const="cached", help="encoder rows are read from a cache")
    add("--calibration", nargs="+", default=[], metavar="FILE", help="measured rates, for devices of that name")
    add("--calibrate", metavar="FILE", help="measure this device with the recipe's LLM and precision, and write FILE")
    add("--calibrate-tokens", type=int, nargs="+", help="sizes of forwards that are timed")
    add("--calibrate-steps", type=int, default=5, help="timed steps of each size [%(default)s]")
    add("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def main(argv: list[str]) -> int:
    """The exit code: 0 where everything fits, 1 where not, 2 for the user's error."""
    options, rest = make_parser().parse_known_args(argv)
    try:
        commands = [
            parse_command(["--ds_config", options.ds_config, "--recipe", recipe, *rest]) for recipe in options.recipe
        ]
        name = options.llm or commands[0].config.model.llm or DEFAULT_LLM
        if options.calibrate:
            return measure(options, commands[0], name)
        if not options.cluster:
            raise ConfigError("--cluster is not set: give it, as in 2xH100-80,2xA100-40, or a .yaml file")
        return show(options, commands, name)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def show(options: argparse.Namespace, commands: list[Command], name: str) -> int:
    estimator = Estimator(
        parse_cluster(options.cluster), llm_config(name), data_set(options, commands, name),
        [read_calibration(Path(path)) for path in options.calibration],
    )  # fmt: skip
    found = []
    for command in commands:
        base = Choice(command.config.recipe, command.config, command.ds_config, options.embeddings is not None)
        found.append(
            (estimator.outcome(base, look_for_largest=True), [estimator.outcome(c) for c in alternatives(base)])
        )
        if not options.json:
            print(text_of(*found[-1], name, estimator), end="\n\n", flush=True)
    if options.json:
        print(json.dumps([json_of(*pair, name, estimator) for pair in found]))
    return 0 if all(outcome.fits for outcome, _ in found) else 1


def measure(options: argparse.Namespace, command: Command, name: str) -> int:
    import os

    import torch

    from proteingpt.distributed import detect, start, stop

    gpu = torch.cuda.is_available()
    device = start(detect(os.environ))
    sizes = sorted(options.calibrate_tokens or ([2048, 4096, 8192] if gpu else [300, 600, 1200]))
    config = llm_config(name)
    found = calibrate(config, name, command.config.model, command.ds_config, sizes, options.calibrate_steps, device)
    write_calibration(found, Path(options.calibrate))
    for choice, line in found.lines.items():
        print(
            f"checkpointing {choice}: {1e-12 / line.seconds_per_flop:.4g} TFLOP/s; a FLOP of attention takes "
            f"{line.seconds_per_prefix_flop / line.seconds_per_flop:.2g} of that time on a prefix, "
            f"{line.seconds_per_branch_flop / line.seconds_per_flop:.2g} from a branch; {line.overhead_seconds:.3g} s "
            "a forward"
        )
    print(f"written to {options.calibrate}; next: --calibration {options.calibrate}")
    stop()
    return 0


# ----------------------------------------------------------------------------------------------------------------- data


def data_set(options: argparse.Namespace, commands: list[Command], llm: str) -> DataSet:
    if options.data:
        return read_data_set(options.data, commands, llm)
    if options.proteins < 1 or not 0 < options.train_share <= 1 or options.residues < 1 or options.questions < 1:
        raise ConfigError("--proteins, --residues and --questions are at least 1, --train-share above 0 and up to 1")
    number = options.proteins * options.train_share
    sampled = min(SAMPLED, max(1, round(number)))
    lengths = scaled_lengths(sampled, options.residues, 0)
    asked = [[(options.question_tokens, options.answer_tokens)] * options.questions] * sampled
    source = (
        f"assumed: {number:,.0f} proteins to train on, {options.residues:g} residues, {options.questions} questions of "
        f"{options.question_tokens} + {options.answer_tokens} tokens, descriptions of {options.description_tokens}"
    )
    return DataSet(lengths, number, asked, [options.description_tokens] * sampled, source)


def read_data_set(directory: str, commands: list[Command], llm: str) -> DataSet:
    """Texts of a sample, by the LLM's tokenizer where --llm is a directory that has one."""
    shards = ShardSet(directory, "train")
    order = np.argsort(mix(np.arange(len(shards)), 17), kind="stable")[:SAMPLED]
    texts = [shards.read_text(int(i)) for i in order]
    count = word_counter
    source = f"{directory}: {len(shards):,} training proteins; tokens assumed, {TOKENS_PER_WORD} a word"
    if llm not in NAMED:
        stage_name, stage = next(iter(commands[0].config.stages.items()))
        prompt = Prompt(assemble.load_tokenizer(llm), TEMPLATES[stage.template, stage_name], 2**31)
        count = lambda texts, kind: [len(i) for i in getattr(prompt, f"{kind}_ids")(texts)]  # noqa: E731
        source = f"{directory}: {len(shards):,} training proteins, texts by the LLM's tokenizer"
    questions = []
    for _, turns in texts:
        asked = count([t.question for t in turns], "question"), count([t.answer for t in turns], "answer")
        questions.append(list(zip(*asked)))
    return DataSet(
        shards.num_residues[order].astype(np.int64), float(len(shards)), questions,
        count([description for description, _ in texts], "answer"), source, shards.num_residues[:].astype(np.int64),
    )  # fmt: skip


def word_counter(texts: list[str], kind: str) -> list[int]:
    return [round(TOKENS_PER_WORD * len(text.split())) + (10 if kind == "question" else 1) for text in texts]
