"""One attempt at a stage: from a checkpoint, or its beginning, to its end, if nothing comes between.

`of` is training.stage's StageRun, which knows the plan and where to begin. All ranks make an attempt and run it
together; one that ends in RollBack is followed by another.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator

from proteingpt.data.loader import Share, Work, prefetch
from proteingpt.data.shares import balance_line
from proteingpt.distributed import on_first_rank
from proteingpt.evaluation.held_out import Evaluation, evaluate
from proteingpt.model import assemble
from proteingpt.model.flops import flops_of_tokens
from proteingpt.training import capacity, checkpoint
from proteingpt.training.balance import Balance
from proteingpt.training.engine import Engine, gathered, precision, sharded_loading
from proteingpt.training.guard import Guard, RollBack, read_state
from proteingpt.training.ledger import EVALUATING, SAVING
from proteingpt.training.loop import train
from proteingpt.training.monitor import Monitor
from proteingpt.training.notes import note_evaluation, write_predictions
from proteingpt.training.progress import ProgressFile
from proteingpt.training.saver import Saver
from proteingpt.training.signals import Stopped
from proteingpt.training.tally import Tally
from proteingpt.training.trackers import open_tracker, run_settings

log = logging.getLogger("proteingpt")

STEPS_LOOKED_AT = 20  # to say at the start how evenly they can be shared out


class Attempt:
    """begun_save: the step of the last save that was begun, None for none. found: evaluations by step."""

    def __init__(self, of):
        self.of, self.shared, self.name = of, of.shared, of.name
        shared, config, device, progress = of.shared, of.shared.config, of.shared.device, of.progress
        self.first, self.last = progress.steps_done, of.plan.num_steps
        self.saver = Saver(
            of.directory, config.checkpoint.keep_last, lambda: shared.ledger.count("failed_saves"),
            lambda: shared.watchdog.beat(f"{of.name}, waiting for the disk"),
        )  # fmt: skip
        self.begun_save = self.saver.saved_step = self.first if of.resume_from else None
        self.engine = Engine(self.build_model(), of.stage, shared.ds_config)
        self.guard = Guard(config.guard, read_state(progress.guard))
        if of.resume_from:
            updates = self.first - self.guard.state.not_taken
            self.engine.set_state(checkpoint.read_state(of.resume_from), updates)
            self.engine.set_scaler(progress.scaler)
            log.info("stage %s goes on from %s", self.name, of.resume_from)
        self.held_out = of.held_out()
        self.tally = self.make_tally()
        self.monitor = self.make_monitor()
        self.balance = Balance(config.devices, device, progress.speeds, progress.limits, progress.devices)
        self.capacities = capacity.agreed(
            config.devices.tokens_per_forward, self.engine, shared.encoders, of.plan, device
        )
        self.found: dict[int, Evaluation] = {}

    # ----------------------------------------------------------------------------------------------- what it is made of

    def build_model(self):
        shared, of = self.shared, self.of
        pair = shared.encoders.encoders
        with sharded_loading(shared.ds_config):
            model = assemble.build_model(
                shared.config.model, pair.structure.width, pair.sequence.width, precision(shared.ds_config),
                shared.config.seed, shared.device, gathered,
            )  # fmt: skip
        if of.resume_from:
            trained = {name: assemble.shape_of(p) for name, p in model.named_parameters() if p.requires_grad}
            checkpoint.check_fits(of.resume_from, trained)
        if source := of.resume_from or of.weights_from:
            assemble.set_weights(model, checkpoint.read_weights(source), gathered)
        return model.to(shared.device)

    def make_tally(self) -> Tally:
        """With what a token costs where the device's peak is known, so that there is an MFU."""
        tally, config = Tally(self.shared.device), self.shared.config.model
        if tally.peak is not None:
            try:
                tally.flops = flops_of_tokens(assemble.llm_config(config.llm), config.train)
            except Exception as error:  # of a model class that is not ours: to be watched must not end a training
                log.warning("there is no MFU: the matrices of %s cannot be counted (%s)", config.llm, error)
        return tally

    def make_monitor(self) -> Monitor:
        shared, name = self.shared, self.name
        is_first, config = shared.rank.is_first, shared.config
        absent = [
            f"learning/held_out_{score}" for score in ("accuracy", "blind_accuracy", "lift") if name != "instruct"
        ]
        absent += ["speed/mfu", "speed_by_rank/mfu"] if self.tally.flops is None else []
        absent += ["speed/pack_fill"] if self.of.stage.tokens_per_pack is None else []
        return Monitor(
            shared.output / "tensorboard", name, self.first, self.last, is_first, shared.ledger if is_first else None,
            trackers=open_tracker(config.track, shared.output, name) if is_first else [], absent=tuple(absent),
            settings=run_settings(config, name, shared.ds_config, shared.rank.world_size),
            progress=ProgressFile(shared.output, {"stages": list(config.stages)}),
        )  # fmt: skip

    def tell_balance(self):
        """How many packs a step has, how much of the ranks' speed that reaches, and what would reach more: in the log
        and as a text in TensorBoard. By the steps to come."""
        stage = self.of.stage
        name = "samples_per_step" if stage.tokens_per_step is None else "tokens_per_step"
        line = balance_line(
            self.of.plan.pack_tokens(self.first, STEPS_LOOKED_AT), self.balance.speeds(self.first),
            self.balance.limited(self.capacities), (f"{self.name}.{name}", getattr(stage, name)),
        )  # fmt: skip
        log.info("stage %s: %s", self.name, line)
        self.monitor.texts(self.first, {"balance": line})

    # ------------------------------------------------------------------------------------------------------- its course

    def run(self) -> Evaluation:
        """Raises RollBack or Stopped with what was saved on the disk, and what training.loop raises."""
        shared, first, last = self.shared, self.first, self.last
        if first < last:
            self.tell_balance()
        self.engine.module.train()
        try:
            # Told to stop while it was loading; or killed before it had evaluated what it saved.
            if shared.agreement.now(bool(shared.stop)) and first < last:
                raise Stopped(f"stage {self.name} had not begun")
            with shared.watchdog.watching(lambda: shared.train_shards.activity.text):
                if first and first < last and self.of.misses_evaluation(first):
                    self.measure(first)
                train(
                    self.engine, shared.encoders, self.read, self.of.stage, self.monitor, self.balance, shared.device,
                    first_step=first, num_steps=last, after_step=self.after_step, guard=self.guard,
                    set_aside=self.of.set_aside, tally=self.tally,
                )  # fmt: skip
                if last not in self.found:
                    self.measure(last)
            self.monitor.goodput(last)
        except (RollBack, Stopped):
            on_first_rank(lambda: self.saver.wait())
            self.engine.close()
            raise
        finally:
            self.monitor.close(finished=last in self.found)
        self.engine.close()
        return self.found[last]

    def read(self, start: int) -> Iterator[Work]:
        """This rank's work from step `start` on, read ahead."""
        return prefetch(
            lambda step: self.of.plan.work(step, self.share(step)), start, self.last,
            timeout_seconds=self.shared.config.data.read_timeout_seconds, activity=self.shared.train_shards.activity,
        )  # fmt: skip

    def share(self, step: int) -> Share:
        speeds, capacities = self.balance.speeds(step), self.balance.limited(self.capacities)
        return Share(self.shared.rank.rank, speeds, capacities, self.engine.is_sharded)

    def after_step(self, step: int):
        shared = self.shared
        shared.watchdog.beat(f"{self.name}, after step {step}")
        self.monitor.note(**self.left_out())
        if step == self.last or due(step, shared.config.checkpoint.every_steps):
            self.save(step)
        if step == self.last or due(step, shared.config.evaluation.every_steps):
            self.measure(step)
        if step == self.last:
            on_first_rank(lambda: self.saver.finish(step))
        if shared.agreement(bool(shared.stop)):
            self.stop_after(step)

    def left_out(self) -> dict[str, int]:
        state = self.guard.state
        return {"skipped_steps": state.not_taken, "quarantined_samples": len(state.quarantined)}

    def stop_after(self, step: int):
        if self.begun_save != step:
            self.save(step)
        on_first_rank(lambda: self.saver.finish(step))
        raise Stopped(f"saved after step {step} of stage {self.name}")

    # ---------------------------------------------------------------------------------------------------- what it keeps

    def save(self, step: int):
        """A copy is taken now, by all ranks; one writes it, in the background."""
        with self.shared.ledger.spending(SAVING):
            on_first_rank(lambda: self.saver.wait())  # before another copy is made
            state = self.engine.get_state(keep=self.shared.rank.is_first)
            progress = self.progress_after(step)
            on_first_rank(lambda: self.saver.start(state, progress))
        self.begun_save = step
        self.shared.ledger.count("saves")
        self.monitor.scalars(step, {f"vitals/{name}": count for name, count in self.left_out().items()})
        self.monitor.goodput(step)

    def progress_after(self, step: int) -> checkpoint.Progress:
        balance = self.balance
        return dataclasses.replace(
            self.of.progress, steps_done=step, speeds=list(balance.agreed), limits=list(balance.limits),
            devices=list(balance.classes), guard=dataclasses.asdict(self.guard.state), scaler=self.engine.get_scaler(),
        )  # fmt: skip

    def measure(self, step: int):
        """Evaluate; a stop in the midst of it is seen, and the evaluation made again after the restart."""
        found = self.evaluate(step)
        if found is None:
            self.stop_after(step)
        self.found[step] = found
        self.keep_if_best(step, found)

    def evaluate(self, step: int) -> Evaluation | None:
        """None where the ranks were asked to stop meanwhile."""
        shared, is_sharded = self.shared, self.engine.is_sharded

        def leave_early() -> bool:
            shared.watchdog.beat(f"{self.name}, evaluating after step {step}")
            # Under ZeRO 3 a forward is a collective: all leave at the same protein.
            return shared.agreement.now(bool(shared.stop)) if is_sharded else bool(shared.stop)

        self.monitor.note(True)
        with shared.ledger.spending(EVALUATING):
            found = evaluate(
                self.engine.module, shared.encoders, self.held_out, shared.rank.rank, shared.rank.world_size,
                shared.device, in_step=is_sharded, leave_early=leave_early,
            )  # fmt: skip
            if shared.agreement.now(bool(shared.stop)):
                return None
        self.tell(step, found)
        return found

    def tell(self, step: int, found: Evaluation):
        """The scores, for people and for a restart."""
        shared, scores = self.shared, {"held_out_loss": found.loss}
        if self.name == "instruct":
            scores["held_out_accuracy"] = found.accuracy
            # To learn it, shards that are elsewhere would all have to come here: then it is done once, at the end.
            if step == self.last or not shared.train_shards.is_remote:
                asked = [(prediction.question, prediction.answer) for prediction in found.predictions]
                blind = on_first_rank(lambda: shared.blind.accuracy(asked))
                scores |= {"held_out_blind_accuracy": blind, "held_out_lift": found.accuracy - blind}
            on_first_rank(lambda: write_predictions(found.predictions, shared.output / "predictions.jsonl"))
        on_first_rank(lambda: note_evaluation(self.of.evaluations, {"step": step, **scores}))
        self.monitor.scalars(step, {f"learning/{name}": value for name, value in scores.items()})
        shown = found.predictions[: shared.config.evaluation.num_texts]
        self.monitor.texts(step, {f"answer_{number}": text_of(prediction) for number, prediction in enumerate(shown)})
        log.info("%s %d: %s", self.name, step, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))

    def keep_if_best(self, step: int, found: Evaluation):
        wanted = self.shared.config.checkpoint.keep_best
        if wanted is None:
            return
        by_accuracy = wanted == "accuracy" and self.name == "instruct"
        metric, value = ("accuracy", found.accuracy) if by_accuracy else ("loss", found.loss)
        if on_first_rank(lambda: is_better(metric, value, checkpoint.read_best(self.of.directory))):
            if self.begun_save != step:
                self.save(step)
            on_first_rank(lambda: self.saver.mark_best(step, metric, value))


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
