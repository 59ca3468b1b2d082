"""A run, from the command line to the report: its directory, its stages in order, and what can be resumed.

RUN/ holds recipe.yaml (resolved), tensorboard/, STAGE/ with the checkpoints, model/ (exported), report.json and
predictions.jsonl. Started again with the same --output it goes on from the newest valid checkpoint; a finished run only
shows its report.
"""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

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
from proteingpt.data.plan import PlanError
from proteingpt.data.prompts import TEMPLATES
from proteingpt.data.set_aside import readable_texts
from proteingpt.data.shards import ShardCache, ShardError
from proteingpt.demo.assets import EXAMPLE, make_assets, with_assets
from proteingpt.distributed import LaunchError, Rank, detect, from_first_rank, gather_objects, on_first_rank, start, stop
from proteingpt.encoders.cache import CachedEncoders, with_names
from proteingpt.encoders.cache import check as check_cache
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.evaluation.baselines import blind_accuracy
from proteingpt.evaluation.card import write_card
from proteingpt.evaluation.held_out import Evaluation
from proteingpt.model import assemble
from proteingpt.model.attention import AttentionError
from proteingpt.training import checkpoint
from proteingpt.training.capacity import CapacityError
from proteingpt.training.engine import check_device, precision
from proteingpt.training.guard import LossSpike, NonFiniteLoss
from proteingpt.training.identity import identity_of
from proteingpt.training.ledger import Ledger, process_age, summary_text
from proteingpt.training.loop import OutOfMemory, RankFailed
from proteingpt.protein import Turn
from proteingpt.training.monitor import CLEAR_LINE, duration
from proteingpt.training.signals import REQUEUE, Agreement, Stopped, StopRequest
from proteingpt.training.stage import StageRun
from proteingpt.training.watchdog import FAILED, Watchdog

log = logging.getLogger("proteingpt")

# The user's faults: shown as one sentence, without a traceback.
USER_ERRORS = (
    ConfigError,
    LaunchError,
    ShardError,
    PlanError,
    WeightsNotFound,
    UnknownWeights,
    BadCheckpoint,
    assemble.ModelError,
    AttentionError,
    CapacityError,
    checkpoint.CheckpointError,
    NonFiniteLoss,
    LossSpike,
    OutOfMemory,
    RankFailed,
)
REPORT = "report.json"
CHANGES = "changes.txt"
REQUEUE_MARK = "requeue"  # there while the run has saved itself on a signal and waits to be started again
# Of the disk: the user's to mend, and no reason for a traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# How a rank learns that another is gone.
LOST_TOUCH = re.compile("gloo|Connection (closed|reset)|NCCL|DistBackendError|DistNetworkError|Broken pipe")
REMEMBERED_BYTES = 2**30  # encoder rows kept on each rank


def main(argv: list[str]) -> int:
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
        device = start(rank)
        watchdog = Watchdog(rank, StopRequest(), command.config.devices.hang_seconds)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        return guarded(lambda: run(command, rank, device, watchdog), rank, watchdog)
    finally:
        watchdog.close()


def guarded(action: Callable[[], None], rank: Rank, watchdog: Watchdog) -> int:
    """The exit code of `action`. What ends it is said once, by one rank, and no rank is left waiting for this one."""
    try:
        action()
        leave(watchdog)
        return 0
    except Stopped as stopped:
        log.info("stopped by %s: %s; the same command goes on from there (exit code %d)", watchdog.stop.reason, stopped, REQUEUE)
        leave(watchdog)
        return REQUEUE
    except USER_ERRORS as error:
        said = str(error)
        # What befell another rank may be no user's fault: that rank knows, and a restart may help.
        code = FAILED if isinstance(error, RankFailed) else 1
    except OSError as error:
        code = 1
        if error.errno not in DISK_ERRORS:
            return end_at_once(rank, watchdog)
        said = f"{error}: make room, or give another --output; the same command goes on from the last checkpoint"
    except Exception:  # ours
        return end_at_once(rank, watchdog)
    watchdog.fail()
    if watchdog.says_first(said):
        print(f"error: {said}", file=sys.stderr, flush=True)
    return code


def leave(watchdog: Watchdog):
    """All ranks together: first nobody talks to rank 0's store any more, then it may go."""
    watchdog.close()
    on_first_rank(lambda: None)
    stop()


def end_at_once(rank: Rank, watchdog: Watchdog) -> int:
    """An error that no user made. Among ranks without Python's leave-taking, in which collectives and devices may hang."""
    text = traceback.format_exc()
    while watchdog.is_ending:  # it says what is the matter, and ends this process
        time.sleep(1.0)
    if LOST_TOUCH.search(text):
        last = text.strip().splitlines()[-1][:200]
        print(f"error: rank {rank.rank} has lost touch with another rank, which was killed or ended: {last}", file=sys.stderr)
    else:
        print(f"rank {rank.rank}:\n{text}", file=sys.stderr)
    if rank.world_size > 1:
        watchdog.fail()
        sys.stderr.flush()
        time.sleep(0.2)  # for the store to send it
        os._exit(FAILED)
    return FAILED


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
            on_first_rank(lambda: checkpoint.replace_text(command.output / REQUEUE_MARK, f"{watchdog.stop.reason}\n"))
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
    when the process ends, however that happens. LaunchError where another run has it: one that was told to stop gets the
    time to save."""
    output.mkdir(parents=True, exist_ok=True)
    file, deadline = open(output / ".lock", "a"), time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LaunchError(f"another run is writing to {output}: end it first, or give another --output") from None
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
        on_first_rank(lambda: self.export(last, weights_from, self.output / "model"))
        best = on_first_rank(lambda: self.export_best(last, weights_from))
        return {**self.report(last, evaluation, num_steps), "skipped_steps": num_skipped, "best": best}

    def export_best(self, stage: str, newest: Path) -> dict | None:
        """RUN/model-best, where the best is kept and is not the last. What is known of it."""
        best = checkpoint.read_best(newest.parent) if self.config.checkpoint.keep_best else None
        if best is None:
            return None
        path = newest.parent / best["checkpoint"]
        if path != newest:
            try:
                checkpoint.verify(path)
            except checkpoint.CheckpointError as error:  # the last one is exported already
                log.warning("the best checkpoint is not exported: %s", error)
                return None
            self.export(stage, path, self.output / "model-best")
        directory = self.output / ("model" if path == newest else "model-best")
        return {"step": checkpoint.step_of(path), best["metric"]: best["value"], "model": str(directory)}

    def export(self, stage: str, path: Path, directory: Path):
        info = assemble.ModelInfo(
            llm=str(Path(assemble.base_llm(self.config.model)).absolute()),
            esm2=absolute_if_there(self.config.encoders.esm2),
            esm_if1=absolute_if_there(self.config.encoders.esm_if1),
            esm2_layer=self.config.encoders.esm2_layer,
            esm2_fingerprint=self.encoders.encoders.sequence.fingerprint,
            esm_if1_fingerprint=self.encoders.encoders.structure.fingerprint,
            weights_dir=str(Path(self.config.encoders.weights_dir).absolute()),
            encoder_dtype=self.config.encoders.dtype,
            structure_width=self.encoders.encoders.structure.width,
            sequence_width=self.encoders.encoders.sequence.width,
            template=TEMPLATES[self.config.stages[stage].template, stage],
            stage=stage,
            projector=self.config.model.projector,
            projector_tokens=self.config.model.projector_tokens,
            projector_width=self.config.model.projector_width,
        )
        dtype = precision(self.ds_config)
        adapter = self.config.model.lora if self.config.model.train == "lora" else None
        try:
            assemble.export(directory, checkpoint.read_weights(path), info, self.tokenizer, dtype, adapter)
        except SafetensorError as error:  # its way to say that the disk is full
            raise checkpoint.CheckpointError(f"the model cannot be written to {directory}: {error}") from None
        save_recipe(self.config, directory / "recipe.yaml")

    def report(self, stage: str, evaluation: Evaluation, num_steps: dict[str, int]) -> dict:
        """What report.json holds. accuracy and blind_accuracy are null after align, which has no questions."""
        asked = [(p.question, p.answer) for p in evaluation.predictions] if stage == "instruct" else []
        example = self.example(evaluation.predictions) if self.config.demo else {}
        return {
            "recipe": self.config.recipe,
            "stage": stage,
            "loss": evaluation.loss,
            "accuracy": evaluation.accuracy if asked else None,
            "blind_accuracy": on_first_rank(lambda: self.blind_accuracy(asked)) if asked else None,
            "num_questions": len(asked),
            "num_proteins": evaluation.num_proteins,
            "steps": sum(num_steps.values()),
            "steps_by_stage": num_steps,
            "ranks": self.rank.world_size,
            "model": str(self.output / "model"),
            "tensorboard": str(self.output / "tensorboard"),
            **example,
        }

    def blind_accuracy(self, asked: list[tuple[str, str]]) -> float:
        """On the very questions that the model was asked."""
        training_turns = (turn for _, turns in readable_texts(self.train_shards) for turn in turns)
        return blind_accuracy(training_turns, [Turn(question, answer) for question, answer in asked])

    def example(self, predictions) -> dict:
        """A structure file and a question to begin with: on real data the user has his own."""
        if self.config.data.shards != self.config.demo.directory or not predictions:
            return {}
        question = predictions[0].question
        return {"example_structure": str(Path(self.config.demo.directory) / EXAMPLE), "example_question": question}


def with_cache_names(config: RunConfig) -> RunConfig:
    """What the recipe leaves open of its encoders is taken from data.embeddings."""
    if config.data.embeddings is None:
        return config
    named = on_first_rank(lambda: with_names(config.encoders, config.data.embeddings))
    return dataclasses.replace(config, encoders=named)


def absolute_if_there(name_or_path: str) -> str:
    return str(Path(name_or_path).absolute()) if Path(name_or_path).exists() else name_or_path


def best_text(best: dict | None) -> list[str]:
    if best is None:
        return []
    metric, value = next((name, value) for name, value in best.items() if name in ("loss", "accuracy"))
    return [f"  best                   {best['model']}: held-out {metric} {value:.4f}, after step {best['step']}"]


def report_text(report: dict) -> str:
    """The short report that ends a run."""
    lines = [
        f"{report['recipe']}: {report['steps']} steps on {report['ranks']} rank(s), {duration(report['seconds'])}",
        f"  held-out loss          {report['loss']:.4f} nats per answer token, {report['num_proteins']} proteins",
    ]
    if report["accuracy"] is not None:
        lines += [
            f"  exact-match accuracy   {report['accuracy']:.1%} of {report['num_questions']} held-out questions",
            f"  blind baseline         {report['blind_accuracy']:.1%} (for each question, the commonest training answer)",
        ]
    structure, question = report.get("example_structure", "FILE"), report.get("example_question", "...")
    lines += [
        f"  model                  {report['model']}",
        *best_text(report.get("best")),
        f"  ask it                 python launch/chat.py --model {report['model']} --structure {structure} "
        f'--question "{question}"',
        f"  curves                 tensorboard --logdir {report['tensorboard']}",
        *([f"  time                   {summary_text(report['goodput'])}"] if "goodput" in report else []),
    ]
    return "\n".join(lines)
