"""An evaluation from the command line to the report, alone or on many ranks: predictions first, then scores, then
pages.

OUT/ holds predictions/NAME/*.jsonl, replies.sqlite (what endpoints said), scores.json, report.md, table.tex, index.html
and tensorboard/. Started again with the same --out it goes on with what is missing.
"""

import dataclasses
import logging
import os
import sys
from pathlib import Path

import torch

from proteingpt.config import ConfigError, DataConfig, EncodersConfig
from proteingpt.data.mixture import open_split
from proteingpt.data.prompts import Prompt
from proteingpt.data.shard_places import is_remote
from proteingpt.data.shards import ShardCache, ShardError
from proteingpt.distributed import LaunchError, Rank, detect, on_first_rank, start, stop
from proteingpt.encoders.cache import CachedEncoders
from proteingpt.encoders.cache import check as check_cache
from proteingpt.encoders.cache import read_manifest as read_cache
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.evaluation import report
from proteingpt.evaluation.answering import Evaluation, answer_all, find_nearest, precision
from proteingpt.evaluation.cases import Chosen, Shards, choose_cases
from proteingpt.evaluation.command import check, data_of, make_parser
from proteingpt.evaluation.contestants import Showing
from proteingpt.evaluation.figures import check_scorers, make_figures
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.model import assemble

log = logging.getLogger("proteingpt")

USER_ERRORS = (
    ConfigError, EvaluationError, LaunchError, ShardError, WeightsNotFound, UnknownWeights, BadCheckpoint,
    assemble.ModelError,
)  # fmt: skip
REMEMBERED_BYTES = 2**30  # encoder rows kept on each rank, since contestants ask for them again
DAYS_SECONDS = 7 * 24 * 3600  # ranks wait for the slowest, however long it decodes


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


def run(args, rank: Rank, device: torch.device):
    out, data = Path(args.out), on_first_rank(lambda: data_of(args))
    on_first_rank(lambda: out.mkdir(parents=True, exist_ok=True))
    # What scoring needs is looked for before anything is decoded, since decoding may take days.
    on_first_rank(lambda: check_scorers(args, out, device))
    info = assemble.read_info(Path(args.model))
    cache = cache_of(data)
    test, train = open_split(data, args.split, cache), open_split(data, "train", cache)
    model, tokenizer, _ = assemble.load_exported(Path(args.model), precision(device), device)
    prompt = Prompt(tokenizer, info.template, max_answer_tokens=args.max_new_tokens)
    chosen = on_first_rank(
        lambda: choose_cases(test, info.stage, prompt, args.seed, data, args.proteins, args.questions)
    )
    encoders, parts = load_encoders(args.model, data, info, test, device)
    showing = Showing(test, data, encoders, model, prompt, parts)
    evaluation = Evaluation(args, rank, device, out, data, test, train, info, chosen)
    fitting = evaluation.fitting(showing.whole(), chosen.cases)
    too_long = chosen.too_long + sorted({case.key for case in chosen.cases} - {case.key for case in fitting})
    evaluation.chosen = Chosen(fitting, too_long, chosen.unreadable)
    if not fitting:
        why = f": {len(too_long)} proteins are too long for the model" if too_long else ""
        raise EvaluationError(
            f"the {args.split} split of {test.address} has nothing to ask a model of stage {info.stage}{why}"
        )
    near = find_nearest(evaluation)
    answer_all(evaluation, showing, near)
    figures = on_first_rank(lambda: make_figures(evaluation, near))
    if rank.is_first:
        report.write(figures, out)
        print(report.terminal_text(figures, out), flush=True)


def cache_of(data: DataConfig) -> ShardCache | None:
    """Of shards at an address; those on disk are read where they are."""
    if any(is_remote(place) for place in data.mixture or [data.shards]):
        return ShardCache(data.cache_dir, int(data.cache_gib * 2**30))
    return None


def load_encoders(model: str, data: DataConfig, info: assemble.ModelInfo, test: Shards, device):
    """(encoders, which of the two give rows). From a cache, or live. Raises where they are not the model's own."""
    known = {name: getattr(info, name) for name in EncodersConfig.__dataclass_fields__ if hasattr(info, name)}
    config = EncodersConfig(**known, dtype=info.encoder_dtype)
    if data.embeddings:
        # Which backend made the rows is the cache's to say: a model does not keep it.
        config = dataclasses.replace(config, backend=read_cache(Path(data.embeddings))["backend"])
        on_first_rank(lambda: check_cache(data.embeddings, config, [test]))
        pair = encoders = CachedEncoders(data.embeddings, config, device)
    else:
        pair = Encoders.load(config, device)
        encoders = Remembering(pair, REMEMBERED_BYTES)
    for part, name in ((pair.structure, "esm_if1"), (pair.sequence, "esm2")):
        wanted = getattr(info, f"{name}_fingerprint")
        if wanted and part.fingerprint and part.fingerprint != wanted:
            raise assemble.ModelError(
                f"{name} has other weights (sha256 {part.fingerprint[:12]}) than those that {model} was trained with "
                f"({wanted[:12]}): its answers would mean nothing"
            )
    return encoders, (bool(pair.structure.width), bool(pair.sequence.width))
