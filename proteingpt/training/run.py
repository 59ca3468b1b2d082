"""A run, from the command line to the report: its directory, its stages in order, and what can be resumed.

RUN/ holds recipe.yaml (resolved), tensorboard/, STAGE/ with the checkpoints, model/ (exported), report.json and
predictions.jsonl. Started again with the same --output it goes on from the newest valid checkpoint; a finished run only
shows its report.
"""

import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from proteingpt.config import (
    Command,
    ConfigError,
    RunConfig,
    StageConfig,
    differences,
    from_dict,
    parse_command,
    read_recipe,
    recipe_names,
    save_recipe,
)
from proteingpt.data.index import open_index, usable
from proteingpt.data.loader import Share, StageData, TrainingPlan, prefetch
from proteingpt.data.plan import PlanError
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.demo.assets import EXAMPLE, make_assets, with_assets
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, on_first_rank, start, stop
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound
from proteingpt.evaluation.baselines import blind_accuracy
from proteingpt.evaluation.held_out import Evaluation, HeldOut, choose, evaluate
from proteingpt.model import assemble
from proteingpt.training import checkpoint
from proteingpt.training.balance import Balance
from proteingpt.training.engine import Engine, precision
from proteingpt.training.loop import NonFiniteLoss, train
from proteingpt.protein import Turn
from proteingpt.training.monitor import Monitor, duration

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
    checkpoint.CheckpointError,
    NonFiniteLoss,
)
REPORT = "report.json"
REMEMBERED_BYTES = 2**30  # encoder rows kept on each rank


def main(argv: list[str]) -> int:
    try:
        command = parse_command(argv)
        rank = detect(os.environ)
        precision(command.ds_config)
    except USER_ERRORS as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank: said once
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        start_logging(rank)
        device = start(rank)
        run(command, rank, device)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    stop()
    return 0


def start_logging(rank: Rank):
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.logging.disable_progress_bar()
    # DeepSpeed calls collectives by names that torch is retiring, and torch says so at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    log.setLevel(logging.INFO if rank.is_first else logging.WARNING)


def run(command: Command, rank: Rank, device):
    began = time.monotonic()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.world_size))
    on_first_rank(lambda: open_run(command))
    report = on_first_rank(lambda: read_report(command.output))
    if report:
        log.info("%s is finished already", command.output)
    else:
        report = Run(command, rank, device).all_stages()
        report["seconds"] = round(time.monotonic() - began, 1)
        on_first_rank(lambda: checkpoint.replace_text(command.output / REPORT, json.dumps(report, indent=1) + "\n"))
    if rank.is_first:
        print(report_text(report), flush=True)


def open_run(command: Command):
    """Make the run directory, or make sure that it belongs to the same recipe once anything has been learned there."""
    recipe = command.output / "recipe.yaml"
    if recipe.is_file() and (read_report(command.output) or any(command.output.glob("*/step-*"))):
        changed = differences(from_dict(RunConfig, read_recipe(str(recipe))), command.config)
        if changed:
            raise ConfigError(
                f"{command.output} was begun with another recipe ({'; '.join(changed)}): give the same settings to "
                "continue it, or another --output"
            )
        return
    command.output.mkdir(parents=True, exist_ok=True)
    save_recipe(command.config, recipe)


def read_report(output: Path) -> dict | None:
    path = output / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Run:
    """What the stages share: data, encoders, tokenizer. Everything is checked on rank 0 before anything large loads."""

    def __init__(self, command: Command, rank: Rank, device):
        self.output, self.ds_config, self.rank, self.device = command.output, command.ds_config, rank, device
        self.config = self.with_demo(command.config)
        on_first_rank(self.check)
        self.train_shards = ShardSet(self.config.data.shards, "train")
        self.test_shards = ShardSet(self.config.data.shards, "test")
        self.tokenizer = assemble.load_tokenizer(self.config.model.llm)
        self.encoders = Remembering(Encoders.load(self.config.encoders, device), REMEMBERED_BYTES)

    def with_demo(self, config: RunConfig) -> RunConfig:
        if config.demo is None:
            return config
        made = [
            what
            for what, given in (
                ("synthetic proteins", config.data.shards),
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
        if config.data.shards is None:
            raise ConfigError("data.shards is not set: give --data DIR, a directory that launch/build_shards.py wrote")
        for split in ("train", "test"):
            ShardSet(config.data.shards, split).close()
        assemble.check_llm(config.model.llm)
        assemble.check_init_from(config.model.init_from)
        Encoders.find(config.encoders)

    def all_stages(self) -> dict:
        """Runs what is left to run. The report, on every rank."""
        weights_from, evaluation, num_steps = None, None, {}
        last = list(self.config.stages)[-1]
        for name, stage in self.config.stages.items():
            done = StageRun(self, name, stage, weights_from)
            num_steps[name] = done.plan.num_steps
            if name != last and done.is_finished:
                log.info("stage %s is finished already", name)
            else:
                evaluation = done.run()
            weights_from = done.newest_checkpoint()
        on_first_rank(lambda: self.export(last, weights_from))
        return self.report(last, evaluation, num_steps)

    def export(self, stage: str, path: Path):
        info = assemble.ModelInfo(
            llm=str(Path(self.config.model.llm).absolute()),
            esm2=absolute_if_there(self.config.encoders.esm2),
            esm_if1=absolute_if_there(self.config.encoders.esm_if1),
            esm2_fingerprint=self.encoders.encoders.sequence.fingerprint,
            esm_if1_fingerprint=self.encoders.encoders.structure.fingerprint,
            weights_dir=str(Path(self.config.encoders.weights_dir).absolute()),
            encoder_dtype=self.config.encoders.dtype,
            structure_width=self.encoders.encoders.structure.width,
            sequence_width=self.encoders.encoders.sequence.width,
            template=TEMPLATES[self.config.stages[stage].template, stage],
            stage=stage,
        )
        dtype = precision(self.ds_config)
        assemble.export(self.output / "model", checkpoint.read_weights(path), info, self.tokenizer, dtype)
        save_recipe(self.config, self.output / "model" / "recipe.yaml")

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
        texts = (self.train_shards.read_text(i) for i in range(len(self.train_shards)))
        training_turns = (turn for _, turns in texts for turn in turns)
        return blind_accuracy(training_turns, [Turn(question, answer) for question, answer in asked])

    def example(self, predictions) -> dict:
        """A structure file and a question to begin with: on real data the user has his own."""
        if self.config.data.shards != self.config.demo.directory or not predictions:
            return {}
        question = predictions[0].question
        return {"example_structure": str(Path(self.config.demo.directory) / EXAMPLE), "example_question": question}


class StageRun:
    """One stage: its plan, its checkpoints, and the model and engine while it runs."""

    def __init__(self, run: Run, name: str, stage: StageConfig, weights_from: Path | None):
        self.shared, self.name, self.stage, self.weights_from = run, name, stage, weights_from
        self.directory = run.output / name
        self.prompt = Prompt(run.tokenizer, TEMPLATES[stage.template, name], stage.max_answer_tokens)
        data = self.stage_data(run.train_shards)
        self.plan = TrainingPlan(data, stage, run.config.seed, run.config.data.shards_per_window)
        self.check_ranks()
        self.check_same_plan()
        self.resume_from = self.newest_checkpoint()
        self.progress = self.read_progress()

    def stage_data(self, shards: ShardSet) -> StageData:
        config = self.shared.config
        # Rank 0 first, so that the others find its file beside the shards.
        directory = Path(config.data.shards)
        on_first_rank(lambda: open_index(shards, self.name, self.prompt, directory) and None)
        index = open_index(shards, self.name, self.prompt, directory)
        context = assemble.context_length(assemble.llm_config(config.model.llm))
        keep = usable(index, shards.num_residues, len(self.prompt.prefix_ids), context, config.data.max_residues)
        if not keep.all():
            log.warning(
                "%d of %d %s samples left out: longer than data.max_residues (%s) or the LLM's context (%d tokens)",
                (~keep).sum(), len(keep), shards.split, config.data.max_residues, context,
            )  # fmt: skip
        return StageData(shards, index, self.prompt.prefix_ids, np.flatnonzero(keep))

    def check_ranks(self):
        num_samples, ranks = len(self.plan.data.samples), self.shared.rank.world_size
        if num_samples < ranks:
            raise PlanError(
                f"{ranks} ranks but only {num_samples} training samples: start fewer ranks, or build more shards"
            )
        fewest = int(np.diff(self.plan.epoch(0).step_starts).min())
        if fewest < ranks:
            log.warning("stage %s has steps of %d packs: some of the %d ranks idle", self.name, fewest, ranks)

    def check_same_plan(self):
        seen = gather_objects(self.plan.fingerprint)
        other = [rank for rank, fingerprint in enumerate(seen) if fingerprint != seen[0]]
        if other:
            raise PlanError(f"ranks {other} see other data than rank 0: do all nodes hold the same shards and tokenizer?")

    def newest_checkpoint(self) -> Path | None:
        return on_first_rank(lambda: checkpoint.newest_valid(self.directory))

    def read_progress(self) -> checkpoint.Progress:
        if self.resume_from is None:
            return checkpoint.Progress(self.name, 0, self.plan.num_steps, self.plan.fingerprint)
        progress = checkpoint.read_progress(self.resume_from)
        if progress.plan != self.plan.fingerprint:
            raise checkpoint.CheckpointError(
                f"{self.resume_from} belongs to other data: the shards, the tokenizer or the prompt have changed since"
            )
        return progress

    @property
    def is_finished(self) -> bool:
        return self.progress.steps_done >= self.plan.num_steps

    def run(self) -> Evaluation:
        shared = self.shared
        model = self.build_model()
        engine = Engine(model, self.stage, shared.ds_config)
        if self.resume_from:
            engine.set_state(checkpoint.read_state(self.resume_from), self.progress.steps_done)
            log.info("stage %s goes on from %s", self.name, self.resume_from)
        held_out = self.held_out()
        first, last = self.progress.steps_done, self.plan.num_steps
        monitor = Monitor(shared.output / "tensorboard", self.name, first, last, shared.rank.is_first)
        balance = Balance(shared.config.devices, shared.device, self.progress.speeds)
        capacities = gather_objects(shared.config.devices.tokens_per_forward)
        evaluated = {}

        def share(step: int) -> Share:
            return Share(shared.rank.rank, balance.speeds(step), capacities, engine.is_sharded)

        def after_step(step: int):
            if step == last or step % shared.config.checkpoint.every_steps == 0:
                self.save(engine, balance, step)
            if step == last or due(step, shared.config.evaluation.every_steps):
                evaluated[step] = self.evaluate(engine, held_out, step, monitor)

        work = prefetch(lambda step: self.plan.work(step, share(step)), first, last)
        engine.module.train()
        train(
            engine, shared.encoders, work, self.stage, monitor, balance, shared.device,
            first_step=first, num_steps=last, after_step=after_step,
        )  # fmt: skip
        evaluation = evaluated.get(last) or self.evaluate(engine, held_out, last, monitor)
        monitor.close()
        engine.close()
        return evaluation

    def build_model(self):
        shared = self.shared
        encoders = shared.encoders.encoders
        model = assemble.build_model(
            shared.config.model, encoders.structure.width, encoders.sequence.width, precision(shared.ds_config),
            shared.config.seed,
        )  # fmt: skip
        source = self.resume_from or self.weights_from
        if source:
            assemble.set_weights(model, checkpoint.read_weights(source))
        return model.to(shared.device)

    def save(self, engine: Engine, balance: Balance, step: int):
        state = engine.get_state()  # a collective: every rank, though one writes
        progress = dataclasses.replace(self.progress, steps_done=step, speeds=balance.agreed)
        keep = self.shared.config.checkpoint.keep_last
        on_first_rank(lambda: checkpoint.save(self.directory, state, progress, keep) and None)

    def held_out(self) -> HeldOut:
        config = self.shared.config.evaluation
        data = self.stage_data(self.shared.test_shards)
        groups = choose(data, self.shared.config.seed, config.num_proteins, config.questions_per_protein)
        if not groups:
            raise PlanError(f"the test split of {self.shared.config.data.shards} has nothing to ask in stage {self.name}")
        # Descriptions are long and never match exactly: a few are shown, none is scored.
        num_answered = len(groups) if self.name == "instruct" else config.num_texts
        return HeldOut(data, self.name, self.prompt, groups, num_answered, config.max_new_tokens)

    def evaluate(self, engine: Engine, held_out: HeldOut, step: int, monitor: Monitor) -> Evaluation:
        shared = self.shared
        result = evaluate(
            engine.module, shared.encoders, held_out, shared.rank.rank, shared.rank.world_size, shared.device,
            in_step=engine.is_sharded,
        )  # fmt: skip
        scores = {"held_out_loss": result.loss}
        if self.name == "instruct":
            scores["held_out_accuracy"] = result.accuracy
            on_first_rank(lambda: write_predictions(result.predictions, shared.output / "predictions.jsonl"))
        monitor.scalars(step, scores)
        shown = result.predictions[: shared.config.evaluation.num_texts]
        monitor.texts(step, [text_of(prediction) for prediction in shown])
        log.info("%s %d: %s", self.name, step, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return result


def due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def absolute_if_there(name_or_path: str) -> str:
    return str(Path(name_or_path).absolute()) if Path(name_or_path).exists() else name_or_path


def write_predictions(predictions, path: Path):
    lines = (json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in predictions)
    checkpoint.replace_text(path, "".join(lines))


def text_of(prediction) -> str:
    question = prediction.question or "(describe it)"
    return f"**{prediction.key}**: {question}\n\nanswer: {prediction.answer}\n\nprediction: {prediction.prediction}"


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
        f"  ask it                 python launch/chat.py --model {report['model']} --structure {structure} "
        f'--question "{question}"',
        f"  curves                 tensorboard --logdir {report['tensorboard']}",
    ]
    return "\n".join(lines)
