"""One stage of a run: its plan, its checkpoints, and the model and engine while it trains."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from proteingpt.config import StageConfig
from proteingpt.data.index import join_indexes, num_longer, open_index, usable
from proteingpt.data.loader import Share, StageData, TrainingPlan, prefetch
from proteingpt.data.mixture import Mixture, parts_of
from proteingpt.data.plan import PlanError
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.set_aside import SetAside
from proteingpt.data.shards import ShardSet
from proteingpt.data.shares import balance_line
from proteingpt.distributed import gather_objects, on_first_rank
from proteingpt.encoders.pair import num_encoders
from proteingpt.evaluation.held_out import Evaluation, HeldOut, choose, evaluate
from proteingpt.model import assemble
from proteingpt.model.flops import flops_of_tokens
from proteingpt.protein import PrefixLength
from proteingpt.training import capacity, checkpoint
from proteingpt.training.balance import Balance
from proteingpt.training.engine import Engine, gathered, precision, sharded_loading
from proteingpt.training.guard import Guard, RollBack, carried_over, read_state
from proteingpt.training.loop import train
from proteingpt.training.ledger import EVALUATING, SAVING
from proteingpt.training.monitor import Monitor
from proteingpt.training.notes import append_new_lines, evaluated_steps, note_evaluation, write_predictions
from proteingpt.training.progress import ProgressFile
from proteingpt.training.saver import Saver
from proteingpt.training.signals import Stopped
from proteingpt.training.tally import Tally
from proteingpt.training.trackers import open_tracker, run_settings

log = logging.getLogger("proteingpt")

STEPS_LOOKED_AT = 20  # to say at the start how evenly they can be shared out

EVALUATIONS = "evaluations.jsonl"


class StageRun:
    """One stage: its plan, its checkpoints, and the model and engine while it runs."""

    def __init__(self, run, name: str, stage: StageConfig, weights_from: Path | None):
        self.shared, self.name, self.stage, self.weights_from = run, name, stage, weights_from
        self.directory = run.output / name
        self.prompt = Prompt(run.tokenizer, TEMPLATES[stage.template, name], stage.max_answer_tokens)
        data = self.stage_data(run.train_shards)
        data.set_aside = SetAside(run.output / f"set_aside-{run.rank.rank}.jsonl", run.config.data.max_bad_share)
        self.plan = TrainingPlan(data, stage, run.config.seed, run.config.data.shards_per_window)
        self.check_ranks()
        self.check_same_plan()
        self.resume_from = self.newest_checkpoint()
        self.progress = self.read_progress()
        self.saver = Saver(
            self.directory, run.config.checkpoint.keep_last, lambda: run.ledger.count("failed_saves"),
            lambda: run.watchdog.beat(f"{name}, waiting for the disk"),
        )  # fmt: skip
        self.note_saved()

    def stage_data(self, shards: "ShardSet | Mixture") -> StageData:
        config = self.shared.config
        indexes = []
        for part in parts_of(shards):
            # Rank 0 first, so that the others find its files beside the shards.
            on_first_rank(lambda: open_index(part, self.name, self.prompt, part.directory) and None)
            indexes.append(open_index(part, self.name, self.prompt, part.directory))
        index = join_indexes(indexes)
        context = assemble.context_length(assemble.llm_config(config.model.llm))
        longest, crop = config.data.max_residues, config.data.long_proteins == "crop"
        prefix_ids = self.prompt.prefix_ids
        live = self.shared.encoders.encoders
        read, length = live.read, PrefixLength(num_encoders(live), config.model.projector_tokens)
        keep = usable(index, shards.num_residues, len(prefix_ids), context, longest, length, crop=crop)
        if not keep.all():
            log.warning(
                "%d of %d %s samples left out: longer than data.max_residues (%s) or the LLM's context (%d tokens)",
                (~keep).sum(), len(keep), shards.split, longest, context,
            )  # fmt: skip
        if crop and (cropped := num_longer(shards.num_residues, keep, longest)):
            log.info("%d of %d %s proteins are cropped to %d residues", cropped, len(keep), shards.split, longest)
        cut = longest if crop else None
        return StageData(
            shards, index, prefix_ids, np.flatnonzero(keep), prefix_length=length, max_residues=cut, rows_of=read
        )

    def check_ranks(self):
        num_samples, ranks = len(self.plan.data.samples), self.shared.rank.world_size
        if num_samples < ranks:
            raise PlanError(
                f"{ranks} ranks but only {num_samples} training samples: start fewer ranks, or build more shards"
            )
        fewest = min(map(len, self.plan.pack_tokens(0, STEPS_LOOKED_AT)))
        if fewest < ranks:
            log.warning("stage %s has steps of %d packs: some of the %d ranks idle", self.name, fewest, ranks)

    def check_same_plan(self):
        # The plan's fingerprint is of lengths: other texts or structures of the same lengths show in that of the
        # shards.
        seen = gather_objects((self.plan.fingerprint, self.plan.data.shards.fingerprint))
        other = [rank for rank, fingerprint in enumerate(seen) if fingerprint != seen[0]]
        if other:
            raise PlanError(
                f"ranks {other} see other data than rank 0: do all nodes hold the same shards and tokenizer?"
            )

    def newest_checkpoint(self) -> Path | None:
        return on_first_rank(lambda: checkpoint.newest_valid(self.directory))

    def read_progress(self) -> checkpoint.Progress:
        if self.resume_from is None:
            fingerprint, identity = self.plan.fingerprint, self.shared.identity
            return checkpoint.Progress(self.name, 0, self.plan.num_steps, fingerprint, identity=identity)
        progress, allowed = checkpoint.read_progress(self.resume_from), self.shared.allow_changed
        changed = checkpoint.identity_differences(progress.identity, self.shared.identity, allowed)
        if progress.plan != self.plan.fingerprint and not changed and not allowed:
            changed = ["the shards, the tokenizer, the prompt or the version of the plan have changed since"]
        if changed:
            raise checkpoint.CheckpointError(
                f"{self.resume_from} belongs to another run: {'; '.join(changed)}; bring back what it was begun with, "
                "give another --output, or permit it on purpose with --allow-changed NAME"
            )
        now = {"num_steps": self.plan.num_steps, "plan": self.plan.fingerprint, "identity": self.shared.identity}
        return dataclasses.replace(progress, **now)

    @property
    def is_finished(self) -> bool:
        return self.progress.steps_done >= self.plan.num_steps

    def run(self) -> Evaluation:
        while True:
            try:
                return self.attempt()
            except RollBack as back:
                self.go_back(back)

    def note_saved(self):
        """begun_save: the step of the last save that was begun, None for none."""
        self.begun_save = self.saver.saved_step = self.progress.steps_done if self.resume_from else None

    def go_back(self, back: RollBack):
        """To the newest checkpoint, or the beginning, with what the guard has learned since. It gives up after a
        few."""
        self.resume_from = self.newest_checkpoint()
        self.progress = self.read_progress()
        state = carried_over(back.state, read_state(self.progress.guard))
        self.progress = dataclasses.replace(self.progress, guard=dataclasses.asdict(state))
        self.note_saved()
        log.info("%s: %s; back to step %d", self.name, back, self.progress.steps_done)

    def attempt(self) -> Evaluation:
        """From the checkpoint to the stage's end, if nothing comes between."""
        shared = self.shared
        model = self.build_model()
        engine = Engine(model, self.stage, shared.ds_config)
        guard = Guard(shared.config.guard, read_state(self.progress.guard))
        if self.resume_from:
            updates = self.progress.steps_done - guard.state.not_taken
            engine.set_state(checkpoint.read_state(self.resume_from), updates)
            engine.set_scaler(self.progress.scaler)
            log.info("stage %s goes on from %s", self.name, self.resume_from)
        held_out = self.held_out()
        first, last = self.progress.steps_done, self.plan.num_steps
        tally = self.tally()
        monitor = self.monitor(first, last, tally)
        kept = (self.progress.speeds, self.progress.limits, self.progress.devices)
        balance = Balance(shared.config.devices, shared.device, *kept)
        given = shared.config.devices.tokens_per_forward
        capacities = capacity.agreed(given, engine, shared.encoders, self.plan, shared.device)
        if first < last:
            self.tell_balance(monitor, first, balance.speeds(first), balance.limited(capacities))
        evaluated = {}

        def share(step: int) -> Share:
            return Share(shared.rank.rank, balance.speeds(step), balance.limited(capacities), engine.is_sharded)

        def after_step(step: int):
            shared.watchdog.beat(f"{self.name}, after step {step}")
            monitor.note(skipped_steps=guard.state.not_taken, quarantined_samples=len(guard.state.quarantined))
            if step == last or due(step, shared.config.checkpoint.every_steps):
                save(step)
            if step == last or due(step, shared.config.evaluation.every_steps):
                measure(step)
            if step == last:
                on_first_rank(lambda: self.saver.finish(last))
            if shared.agreement(bool(shared.stop)):
                self.stop_after(step, save)

        def save(step: int):
            self.save(engine, balance, guard, step)
            left_out = {"skipped_steps": guard.state.not_taken, "quarantined_samples": len(guard.state.quarantined)}
            monitor.scalars(step, {f"vitals/{name}": count for name, count in left_out.items()})
            monitor.goodput(step)

        def measure(step: int):
            """Evaluate; a stop in the midst of it is seen, and the evaluation made again after the restart."""
            found = self.evaluate(engine, held_out, step, monitor)
            if found is None:
                self.stop_after(step, save)
            evaluated[step] = found
            self.keep_if_best(step, found, save)

        def read(start: int):
            return prefetch(
                lambda step: self.plan.work(step, share(step)), start, last,
                timeout_seconds=shared.config.data.read_timeout_seconds, activity=shared.train_shards.activity,
            )  # fmt: skip

        engine.module.train()
        try:
            # Told to stop while it was loading; or killed before it had evaluated what it saved.
            if shared.agreement.now(bool(shared.stop)) and first < last:
                raise Stopped(f"stage {self.name} had not begun")
            with shared.watchdog.watching(lambda: shared.train_shards.activity.text):
                if first and first < last and self.misses_evaluation(first):
                    measure(first)
                train(
                    engine, shared.encoders, read, self.stage, monitor, balance, shared.device, first_step=first,
                    num_steps=last, after_step=after_step, guard=guard, set_aside=self.set_aside, tally=tally,
                )  # fmt: skip
                if last not in evaluated:
                    measure(last)
            monitor.goodput(last)
        except (RollBack, Stopped):
            on_first_rank(lambda: self.saver.wait())
            engine.close()
            raise
        finally:
            monitor.close(finished=last in evaluated)
        engine.close()
        return evaluated[last]

    def tally(self) -> Tally:
        """With what a token costs where the device's peak is known, so that there is an MFU."""
        tally, config = Tally(self.shared.device), self.shared.config.model
        if tally.peak is not None:
            try:
                tally.flops = flops_of_tokens(assemble.llm_config(config.llm), config.train)
            except Exception as error:  # of a model class that is not ours: to be watched must not end a training
                log.warning("there is no MFU: the matrices of %s cannot be counted (%s)", config.llm, error)
        return tally

    def monitor(self, first: int, last: int, tally: Tally) -> Monitor:
        shared, name = self.shared, self.name
        is_first, config = shared.rank.is_first, shared.config
        absent = [
            f"learning/held_out_{score}" for score in ("accuracy", "blind_accuracy", "lift") if name != "instruct"
        ]
        absent += ["speed/mfu", "speed_by_rank/mfu"] if tally.flops is None else []
        absent += ["speed/pack_fill"] if self.stage.tokens_per_pack is None else []
        return Monitor(
            shared.output / "tensorboard", name, first, last, is_first, shared.ledger if is_first else None,
            trackers=open_tracker(config.track, shared.output, name) if is_first else [], absent=tuple(absent),
            settings=run_settings(config, name, shared.ds_config, shared.rank.world_size),
            progress=ProgressFile(shared.output, {"stages": list(config.stages)}),
        )  # fmt: skip

    def tell_balance(self, monitor: Monitor, step: int, speeds: list[float], capacities: list[int | None]):
        """How many packs a step has, how much of the ranks' speed that reaches, and what would reach more: in the log
        and as a text in TensorBoard. By the steps to come."""
        name = "samples_per_step" if self.stage.tokens_per_step is None else "tokens_per_step"
        setting = (f"{self.name}.{name}", getattr(self.stage, name))
        line = balance_line(self.plan.pack_tokens(step, STEPS_LOOKED_AT), speeds, capacities, setting)
        log.info("stage %s: %s", self.name, line)
        monitor.texts(step, {"balance": line})

    def build_model(self):
        shared = self.shared
        encoders = shared.encoders.encoders
        with sharded_loading(shared.ds_config):
            model = assemble.build_model(
                shared.config.model, encoders.structure.width, encoders.sequence.width, precision(shared.ds_config),
                shared.config.seed, shared.device, gathered,
            )  # fmt: skip
        source = self.resume_from or self.weights_from
        if self.resume_from:
            trained = {name: assemble.shape_of(p) for name, p in model.named_parameters() if p.requires_grad}
            checkpoint.check_fits(self.resume_from, trained)
        if source:
            assemble.set_weights(model, checkpoint.read_weights(source), gathered)
        return model.to(shared.device)

    def set_aside(self, step: int, keys: tuple[str, ...], why: str):
        """RUN/set_aside.jsonl: a line for each sample that has no weight any more."""
        lines = [
            json.dumps({"key": k, "stage": self.name, "step": step, "reason": f"in a step where {why}"}) for k in keys
        ]
        path = self.shared.output / "set_aside.jsonl"
        on_first_rank(lambda: append_new_lines(path, lines))

    def save(self, engine: Engine, balance: Balance, guard: Guard, step: int):
        """A copy is taken now, by all ranks; one writes it, in the background."""
        with self.shared.ledger.spending(SAVING):
            on_first_rank(lambda: self.saver.wait())  # before another copy is made
            state = engine.get_state(keep=self.shared.rank.is_first)
            progress = self.progress_after(step, engine, balance, guard)
            on_first_rank(lambda: self.saver.start(state, progress))
        self.begun_save = step
        self.shared.ledger.count("saves")

    def progress_after(self, step: int, engine: Engine, balance: Balance, guard: Guard) -> checkpoint.Progress:
        return dataclasses.replace(
            self.progress, steps_done=step, speeds=list(balance.agreed), limits=list(balance.limits),
            devices=list(balance.classes), guard=dataclasses.asdict(guard.state), scaler=engine.get_scaler(),
        )  # fmt: skip

    def stop_after(self, step: int, save: Callable[[int], None]):
        if self.begun_save != step:
            save(step)
        on_first_rank(lambda: self.saver.finish(step))
        raise Stopped(f"saved after step {step} of stage {self.name}")

    def keep_if_best(self, step: int, found: Evaluation, save: Callable[[int], None]):
        wanted = self.shared.config.checkpoint.keep_best
        if wanted is None:
            return
        by_accuracy = wanted == "accuracy" and self.name == "instruct"
        metric, value = ("accuracy", found.accuracy) if by_accuracy else ("loss", found.loss)
        if on_first_rank(lambda: is_better(metric, value, checkpoint.read_best(self.directory))):
            if self.begun_save != step:
                save(step)
            on_first_rank(lambda: self.saver.mark_best(step, metric, value))

    def misses_evaluation(self, step: int) -> bool:
        """Whether the run ended between saving `step` and evaluating it."""
        wanted = step == self.plan.num_steps or due(step, self.shared.config.evaluation.every_steps)
        return on_first_rank(lambda: wanted and step not in evaluated_steps(self.directory / EVALUATIONS))

    def held_out(self) -> HeldOut:
        config = self.shared.config.evaluation
        data = self.stage_data(self.shared.test_shards)
        groups = choose(data, self.shared.config.seed, config.num_proteins, config.questions_per_protein)
        groups = on_first_rank(lambda: [group for group in groups if data.group_or_none(*group)])
        if not groups:
            raise PlanError(f"the test split of {data.shards.address} has nothing to ask in stage {self.name}")
        # Descriptions are long and never match exactly: a few are shown, none is scored.
        num_answered = len(groups) if self.name == "instruct" else config.num_texts
        return HeldOut(data, self.name, self.prompt, groups, num_answered, config.max_new_tokens)

    def evaluate(self, engine: Engine, held_out: HeldOut, step: int, monitor: Monitor) -> Evaluation | None:
        """None where the ranks were asked to stop meanwhile."""
        shared = self.shared

        def leave_early() -> bool:
            shared.watchdog.beat(f"{self.name}, evaluating after step {step}")
            # Under ZeRO 3 a forward is a collective: all leave at the same protein.
            return shared.agreement.now(bool(shared.stop)) if engine.is_sharded else bool(shared.stop)

        monitor.note(True)
        with shared.ledger.spending(EVALUATING):
            result = evaluate(
                engine.module, shared.encoders, held_out, shared.rank.rank, shared.rank.world_size, shared.device,
                in_step=engine.is_sharded, leave_early=leave_early,
            )  # fmt: skip
            if shared.agreement.now(bool(shared.stop)):
                return None
        scores = {"held_out_loss": result.loss}
        if self.name == "instruct":
            scores["held_out_accuracy"] = result.accuracy
            # To learn it, shards that are elsewhere would all have to come here: then it is done once, at the end.
            if step == self.plan.num_steps or not shared.train_shards.is_remote:
                asked = [(prediction.question, prediction.answer) for prediction in result.predictions]
                blind = on_first_rank(lambda: shared.blind.accuracy(asked))
                scores |= {"held_out_blind_accuracy": blind, "held_out_lift": result.accuracy - blind}
            on_first_rank(lambda: write_predictions(result.predictions, shared.output / "predictions.jsonl"))
        on_first_rank(lambda: note_evaluation(self.directory / EVALUATIONS, {"step": step, **scores}))
        monitor.scalars(step, {f"learning/{name}": value for name, value in scores.items()})
        shown = result.predictions[: shared.config.evaluation.num_texts]
        monitor.texts(step, {f"answer_{number}": text_of(prediction) for number, prediction in enumerate(shown)})
        log.info("%s %d: %s", self.name, step, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        return result


def due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def is_better(metric: str, value: float | None, best: dict | None) -> bool:
    """Than the best of the stage so far, if that was measured likewise. Equal is not better: the earlier one stays."""
    if value is None or not math.isfinite(value):
        return False
    if best is None or best["metric"] != metric:
        return True
    return value > best["value"] if metric == "accuracy" else value < best["value"]


def text_of(prediction) -> str:
    question = prediction.question or "(describe it)"
    return (
        f"**{prediction.key}**: {question}\n\ntrue answer: {prediction.answer}\n\nthe model's: {prediction.prediction}"
    )
