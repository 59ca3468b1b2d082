"""One stage of a run: its plan, its checkpoints, and attempts at it until one comes to its end."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from proteingpt.config import StageConfig
from proteingpt.data.index import join_indexes, num_longer, open_index, usable
from proteingpt.data.loader import StageData, TrainingPlan
from proteingpt.data.mixture import Mixture, parts_of
from proteingpt.data.plan import PlanError
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.set_aside import SetAside
from proteingpt.data.shards import ShardSet
from proteingpt.distributed import gather_objects, on_first_rank
from proteingpt.encoders.pair import num_encoders
from proteingpt.evaluation.held_out import Evaluation, HeldOut, choose
from proteingpt.model import assemble
from proteingpt.protein import PrefixLength
from proteingpt.training import checkpoint
from proteingpt.training.attempt import STEPS_LOOKED_AT, Attempt, due
from proteingpt.training.guard import RollBack, carried_over, read_state
from proteingpt.training.notes import append_new_lines, evaluated_steps

log = logging.getLogger("proteingpt")


class StageRun:
    """evaluations: the file that says which are made."""

    def __init__(self, run, name: str, stage: StageConfig, weights_from: Path | None):
        self.shared, self.name, self.stage, self.weights_from = run, name, stage, weights_from
        self.directory = run.output / name
        self.evaluations = self.directory / "evaluations.jsonl"
        self.prompt = Prompt(run.tokenizer, TEMPLATES[stage.template, name], stage.max_answer_tokens)
        data = self.stage_data(run.train_shards)
        data.set_aside = SetAside(run.output / f"set_aside-{run.rank.rank}.jsonl", run.config.data.max_bad_share)
        self.plan = TrainingPlan(data, stage, run.config.seed, run.config.data.shards_per_window)
        self.check_ranks()
        self.check_same_plan()
        self.resume_from = self.newest_checkpoint()
        self.progress = self.read_progress()

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
                return Attempt(self).run()
            except RollBack as back:
                self.go_back(back)

    def go_back(self, back: RollBack):
        """To the newest checkpoint, or the beginning, with what the guard has learned since. It gives up after a
        few."""
        self.resume_from = self.newest_checkpoint()
        self.progress = self.read_progress()
        state = carried_over(back.state, read_state(self.progress.guard))
        self.progress = dataclasses.replace(self.progress, guard=dataclasses.asdict(state))
        log.info("%s: %s; back to step %d", self.name, back, self.progress.steps_done)

    def set_aside(self, step: int, keys: tuple[str, ...], why: str):
        """RUN/set_aside.jsonl: a line for each sample that has no weight any more."""
        lines = [
            json.dumps({"key": k, "stage": self.name, "step": step, "reason": f"in a step where {why}"}) for k in keys
        ]
        path = self.shared.output / "set_aside.jsonl"
        on_first_rank(lambda: append_new_lines(path, lines))

    def misses_evaluation(self, step: int) -> bool:
        """Whether the run ended between saving `step` and evaluating it."""
        wanted = step == self.plan.num_steps or due(step, self.shared.config.evaluation.every_steps)
        return on_first_rank(lambda: wanted and step not in evaluated_steps(self.evaluations))

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
