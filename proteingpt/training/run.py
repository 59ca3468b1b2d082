"""A run, from the command line on: its directory, its stages in order, and what can be resumed.

RUN/ holds recipe.yaml (resolved), tensorboard/, STAGE/ with the checkpoints, model/ (exported), report.json and
predictions.jsonl. Started again with the same --output it goes on from the newest valid checkpoint; a finished run only
shows its report.
"""

import dataclasses
import fcntl
import json
import logging
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers

from proteingpt.config import (
    Command,
    ConfigError,
    RunConfig,
    differences,
    from_dict,
    parse_command,
    read_recipe,
    recipe_names,
    save_recipe,
)
from proteingpt.data.mixture import open_split
from proteingpt.data.shards import ShardCache
from proteingpt.demo.assets import make_assets, with_assets
from proteingpt.distributed import (
    COLLECTIVE_SECONDS,
    PATIENT_SECONDS,
    LaunchError,
    Rank,
    detect,
    from_first_rank,
    gather_objects,
    on_first_rank,
    start,
)
from proteingpt.encoders.cache import CachedEncoders, with_names
from proteingpt.encoders.cache import check as check_cache
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.evaluation.card import write_card
from proteingpt.model import assemble
from proteingpt.training import checkpoint
from proteingpt.training.blind import Blind
from proteingpt.training.endings import USER_ERRORS, guarded
from proteingpt.training.engine import check_device, precision
from proteingpt.training.finish import finish, report_text
from proteingpt.training.identity import identity_of
from proteingpt.training.ledger import Ledger, process_age
from proteingpt.training.monitor import CLEAR_LINE
from proteingpt.training.signals import REQUEUE_MARK, Agreement, Early, Stopped, StopRequest, mark_requeue
from proteingpt.training.stage import StageRun
from proteingpt.training.trackers import check_tracker
from proteingpt.training.watchdog import Watchdog

log = logging.getLogger("proteingpt")

REPORT = "report.json"
CHANGES = "changes.txt"
REMEMBERED_BYTES = 2**30  # encoder rows kept on each rank


def main(argv: list[str], early: Early | None = None) -> int:
    """The exit code (training.endings). early: what has listened for signals since the process began."""
    try:
        command = parse_command(argv)
        rank = detect(os.environ)
        precision(command.ds_config)
        check_device(command.ds_config)
    except USER_ERRORS as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank: said once
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    start_logging(rank)
    try:
        hang_seconds = command.config.devices.hang_seconds
        device = start(rank, patience_seconds(hang_seconds))
        watchdog = Watchdog(rank, StopRequest(), hang_seconds, early.hand_over() if early else None)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        return guarded(lambda: run(command, rank, device, watchdog), rank, watchdog)
    finally:
        watchdog.close()


def patience_seconds(hang_seconds: float | None) -> float:
    """How long a collective waits. Beyond the watchdog, which tells a hang from a slow rank and says who it is."""
    return max(COLLECTIVE_SECONDS, 2.0 * hang_seconds) if hang_seconds else PATIENT_SECONDS


def start_logging(rank: Rank):
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    logging.basicConfig(format=f"{clear}%(message)s", level=logging.WARNING)
    transformers.logging.disable_progress_bar()
    # DeepSpeed calls collectives by names that torch is retiring, and torch says so at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    log.setLevel(logging.INFO if rank.is_first else logging.WARNING)


def run(command: Command, rank: Rank, device, watchdog: Watchdog):
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.world_size))
    with ExitStack() as held:
        on_first_rank(lambda: held.callback(hold(command.output).close) and None)
        go_on(command, rank, device, watchdog)


def go_on(command: Command, rank: Rank, device, watchdog: Watchdog):
    """Begin the run, continue it, or show what it came to."""
    # First: a start that is refused must not be asked for again and again by its batch script.
    on_first_rank(lambda: (command.output / REQUEUE_MARK).unlink(missing_ok=True))
    on_first_rank(lambda: check_tracker(command.config.track))
    on_first_rank(lambda: open_run(command))
    watchdog.keep_stacks_in(command.output)
    report = on_first_rank(lambda: read_report(command.output))
    if report:
        log.info("%s is finished already", command.output)
    else:
        ledger = Ledger(command.output, rank.world_size, rank.is_first, process_age())
        try:
            report = Run(command, rank, device, watchdog, ledger).all_stages()
        except Stopped:
            ledger.end("stopped")
            # Only the rank that was told is sure to know why: the others may have it from the agreement alone.
            watchdog.stop.ask(next(filter(None, gather_objects(watchdog.stop.reason)), "another rank"))
            on_first_rank(lambda: mark_requeue(command.output, watchdog.stop.reason))
            raise
        except Exception as error:
            ledger.end(f"{type(error).__name__}: {error}")
            raise
        ledger.end("finished")
        report |= {"seconds": round(ledger.summary()["seconds"], 1), "goodput": ledger.summary()}
        # The card first: where the report is, the run is finished.
        on_first_rank(lambda: write_card(command.output / "model", report, shards_of(command.config)))
        on_first_rank(lambda: checkpoint.replace_text(command.output / REPORT, json.dumps(report, indent=1) + "\n"))
    if rank.is_first:
        print(report_text(report), flush=True)


def shards_of(config: RunConfig) -> str | None:
    return config.data.shards or (config.demo.directory if config.demo else None)


def open_run(command: Command):
    """Make the run directory, or make sure that it belongs to the same recipe once anything has been learned there."""
    recipe = command.output / "recipe.yaml"
    if recipe.is_file() and (read_report(command.output) or any(command.output.glob("*/step-*"))):
        before = from_dict(RunConfig, read_recipe(str(recipe)))
        changed = differences(before, command.config, command.allow_changed)
        if changed:
            raise ConfigError(
                f"{command.output} was begun with another recipe ({'; '.join(changed)}): give the same settings to "
                "continue it, another --output, or permit it on purpose with --allow-changed FIELD"
            )
        permitted = differences(before, command.config)
        if permitted:
            log.warning("going on with another recipe, as permitted: %s", "; ".join(permitted))
            note_changes(command.output / CHANGES, permitted)
            save_recipe(command.config, recipe)
        return
    command.output.mkdir(parents=True, exist_ok=True)
    save_recipe(command.config, recipe)


def note_changes(path: Path, changes: list[str]):
    """RUN/changes.txt: what was permitted to change since the run was begun."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in changes)


def hold(output: Path, wait_seconds: float = 40.0):
    """Keep others from writing to this run directory for as long as the returned file is open: the kernel lets go of it
    when the process ends, however that happens. LaunchError where another run has it: one that was told to stop gets
    the time to save."""
    output.mkdir(parents=True, exist_ok=True)
    file, deadline = open(output / ".lock", "a"), time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"another run is writing to {output}: end it first, or give another --output"
                ) from None
            time.sleep(0.5)
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): see to it that no second run writes there", output, error.strerror)
            return file


def read_report(output: Path) -> dict | None:
    path = output / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Run:
    """What the stages share: data, encoders, tokenizer. Everything is checked on rank 0 before anything large loads."""

    def __init__(self, command: Command, rank: Rank, device, watchdog: Watchdog, ledger: Ledger):
        self.watchdog, self.stop, self.ledger = watchdog, watchdog.stop, ledger
        self.agreement, self.allow_changed = Agreement(rank.world_size), command.allow_changed
        self.output, self.ds_config, self.rank, self.device = command.output, command.ds_config, rank, device
        self.config = with_cache_names(self.with_demo(command.config))
        self.cache = ShardCache(self.config.data.cache_dir, int(self.config.data.cache_gib * 2**30))
        on_first_rank(self.check)
        self.train_shards = open_split(self.config.data, "train", self.cache)
        self.test_shards = open_split(self.config.data, "test", self.cache)
        self.tokenizer = assemble.load_tokenizer(self.config.model.llm)
        self.encoders = self.open_encoders()
        self.identity = from_first_rank(self.identify() if rank.is_first else None)
        self.blind = Blind(
            self.train_shards, lambda: watchdog.beat("reading the training answers for the blind baseline")
        )

    def identify(self) -> dict[str, str]:
        pair, data = self.encoders.encoders, (self.train_shards.fingerprint, self.test_shards.fingerprint)
        encoders = {"esm2": pair.sequence.fingerprint, "esm_if1": pair.structure.fingerprint}
        return identity_of(data, self.tokenizer, Path(self.config.model.llm), encoders)

    def open_encoders(self) -> Remembering:
        """Live ones, or their rows from data.embeddings, which the system keeps in its memory, so that we need not."""
        config, cached = self.config.encoders, self.config.data.embeddings
        if cached:
            return Remembering(CachedEncoders(cached, config, self.device), 0)
        return Remembering(Encoders.load(config, self.device), REMEMBERED_BYTES)

    def with_demo(self, config: RunConfig) -> RunConfig:
        if config.demo is None:
            return config
        made = [
            what
            for what, given in (
                ("synthetic proteins", config.data.shards or config.data.mixture),
                ("small random encoders", config.encoders.esm2 or config.encoders.esm_if1),
                ("a small random LLM", config.model.llm),
            )
            if given is None
        ]
        log.info(
            "This is the demo%s. For real work give --recipe %s with --data DIR and --llm DIR; see the README.",
            f": {', '.join(made)}" if made else "",
            ", ".join(name for name in recipe_names() if name != "demo"),
        )
        if on_first_rank(lambda: make_assets(config.demo, config.seed)):
            log.info("made the demo's shards, encoders and LLM in %s", config.demo.directory)
        return with_assets(config)

    def check(self):
        config = self.config
        if config.data.shards is None and config.data.mixture is None:
            raise ConfigError("data.shards is not set: give --data DIR, a directory that launch/build_shards.py wrote")
        splits = [open_split(config.data, split, self.cache) for split in ("train", "test")]
        assemble.check_llm(config.model.llm)
        assemble.check_init_from(config.model)
        if config.data.embeddings:
            check_cache(config.data.embeddings, config.encoders, splits)
        else:
            Encoders.find(config.encoders)
        for shards in splits:
            shards.close()

    def all_stages(self) -> dict:
        """Runs what is left to run. The report, on every rank."""
        weights_from, evaluation, num_steps, num_skipped = None, None, {}, 0
        last = list(self.config.stages)[-1]
        for name, stage in self.config.stages.items():
            done = StageRun(self, name, stage, weights_from)
            num_steps[name] = done.plan.num_steps
            if name != last and done.is_finished and not done.misses_evaluation(num_steps[name]):
                log.info("stage %s is finished already", name)
            else:
                evaluation = done.run()
            weights_from = done.newest_checkpoint()
            num_skipped += (checkpoint.read_progress(weights_from).guard or {}).get("not_taken", 0)
        return finish(self, last, weights_from, evaluation, num_steps, num_skipped)


def with_cache_names(config: RunConfig) -> RunConfig:
    """What the recipe leaves open of its encoders is taken from data.embeddings."""
    if config.data.embeddings is None:
        return config
    named = on_first_rank(lambda: with_names(config.encoders, config.data.embeddings))
    return dataclasses.replace(config, encoders=named)
