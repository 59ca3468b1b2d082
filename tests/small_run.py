"""A training run small enough for a test, on the demo's shards, every part real; and the same run written out plainly.

`plain_losses` is the definition that the trainer is held to: one process, one question at a time, transformers' own
attention, torch's own AdamW, and texts cut and joined here rather than by the package.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.config import DevicesConfig, EncodersConfig, ModelConfig, StageConfig
from proteingpt.data.index import build_index
from proteingpt.data.loader import Share, StageData, TrainingPlan, Work
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardSet
from proteingpt.encoders.pair import Encoders, Remembering
from proteingpt.model import assemble
from proteingpt.protein import PrefixLength
from proteingpt.training.balance import Balance
from proteingpt.training.engine import KEPT_AT_MOST, Engine, gathered, precision, sharded_loading
from proteingpt.training.loop import train
from proteingpt.training.schedule import learning_rate

SEED = 11
STAGE = dict(
    template="released", epochs=1, max_steps=6, samples_per_step=12, questions_per_group=4, max_answer_tokens=8,
    # With qwen2's tokens two packs a step, of two groups and of one.
    tokens_per_pack=600,
    warmup_steps=2, warmup_lr=5e-4, init_lr=4e-3, min_lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """assets: of demo.assets.make_assets; llm: a model directory. zero: the DeepSpeed JSON's zero_optimization.
    more: of that JSON, as items. speeds: of the ranks, as the plan is told; equal where none are given.
    tokens_per_forward: of every rank. kept_at_most: trained values whose gradients an engine keeps to itself."""

    assets: str
    llm: str
    train: str = "full"
    zero: dict | None = None
    bf16: bool = False
    activation_checkpointing: bool = False
    stage: tuple = ()  # what differs from STAGE, as items
    more: tuple = ()
    speeds: tuple = ()
    tokens_per_forward: int | None = None
    kept_at_most: int = KEPT_AT_MOST
    model: tuple = ()  # further fields of ModelConfig, as items

    @property
    def stage_config(self) -> StageConfig:
        return StageConfig(**{**STAGE, **dict(self.stage)})

    @property
    def model_config(self) -> ModelConfig:
        recomputes = self.activation_checkpointing
        return ModelConfig(llm=self.llm, train=self.train, activation_checkpointing=recomputes, **dict(self.model))

    @property
    def ds_config(self) -> dict:
        zero = {"overlap_comm": False, **(self.zero or {"stage": 0})}
        return {"zero_optimization": zero, "bf16": {"enabled": self.bf16}, **dict(self.more)}


class Recorder:
    """What the loop asks of a Monitor."""

    def __init__(self):
        self.losses, self.grad_norms, self.samples, self.exchanged = [], [], [], []

    def step(self, number, report):
        self.losses.append(report.loss)
        self.grad_norms.append(report.grad_norm)
        self.samples.append(report.num_samples)

    def ranks(self, step, exchanged):
        self.exchanged.append((step, exchanged))


class SmallRun:
    """The parts of a case, as training/run.py puts them together."""

    def __init__(self, case: Case):
        self.case, self.stage = case, case.stage_config
        self.shards = ShardSet(case.assets, "train")
        tokenizer, template = assemble.load_tokenizer(case.llm), TEMPLATES["released", "instruct"]
        self.prompt = Prompt(tokenizer, template, self.stage.max_answer_tokens)
        self.data = self.stage_data(self.shards)
        self.plan = TrainingPlan(self.data, self.stage, SEED)
        config = EncodersConfig(
            esm2=f"{case.assets}/esm2_demo.pt", esm_if1=f"{case.assets}/esm_if1_demo.pt", dtype="float32"
        )
        self.encoders = Remembering(Encoders.load(config, torch.device("cpu")), 2**28)

    def stage_data(self, shards: ShardSet) -> StageData:
        index = build_index(shards, "instruct", self.prompt)
        length = PrefixLength(2, self.case.model_config.projector_tokens)
        return StageData(shards, index, self.prompt.prefix_ids, np.arange(len(shards)), prefix_length=length)

    def model(self):
        pair = self.encoders.encoders
        return assemble.build_model(
            self.case.model_config, pair.structure.width, pair.sequence.width, precision(self.case.ds_config), SEED,
            whole=gathered,
        )  # fmt: skip

    def engine(self, state=None, steps_done: int = 0) -> Engine:
        """As training/run.py makes it: fresh, or from the state of a checkpoint."""
        with sharded_loading(self.case.ds_config):
            model = self.model()
        if state:
            assemble.set_weights(model, state["weights"], gathered)
        engine = Engine(model, self.stage, self.case.ds_config, self.case.kept_at_most)
        if state:
            engine.set_state(state, steps_done)
        engine.module.train()
        return engine

    def work(self, engine: Engine, rank, step: int, balance: Balance | None = None) -> Work:
        """This rank's part of a step; shared out by the balance's limits, and by its speeds where the case has none."""
        measured = balance.speeds(step) if balance else [1.0] * rank.world_size
        speeds = list(self.case.speeds) or measured
        capacities = [self.case.tokens_per_forward] * rank.world_size
        capacities = balance.limited(capacities) if balance else capacities
        return self.plan.work(step, Share(rank.rank, speeds, capacities, engine.is_sharded))

    def groups(self, step: int) -> list[tuple[int, tuple[int, ...]]]:
        """All groups of a step, as the plan is told nothing of ranks."""
        return list(itertools.chain(*self.plan.packs(step)[0]))

    def train(
        self, engine: Engine, rank, device, first_step: int = 0, encoders=None, after_step=lambda step: None,
        guard=None, balance=None, set_aside=lambda step, keys, why: None,
    ):  # fmt: skip
        """The real loop, from first_step to the stage's end."""
        last = self.plan.num_steps
        balance = balance or Balance(DevicesConfig(balance="equal"), device)

        def read(first: int):
            return (self.work(engine, rank, step, balance) for step in range(first, last))

        recorder = Recorder()
        train(
            engine, encoders or self.encoders, read, self.stage, recorder, balance, device, first_step=first_step,
            num_steps=last, after_step=after_step, guard=guard, set_aside=set_aside,
        )  # fmt: skip
        return recorder


# ------------------------------------------------------------------------------------------------ what ranks run


def train_on_rank(rank, device, case: Case, first_step: int = 0, state=None, save_at: int | None = None) -> dict:
    """Runs to the stage's end. Losses, gradient norms and samples of the steps, and the state at the start (if it was
    given one), after `save_at` steps and at the end."""
    run = SmallRun(case)
    engine = run.engine(state, first_step)
    states = {"begun_with": engine.get_state() if state else None}

    def after_step(step: int):
        if step == save_at:
            states["saved"] = engine.get_state()

    recorder = run.train(engine, rank, device, first_step, after_step=after_step)
    states["ended_with"] = engine.get_state()
    engine.close()
    done = {"losses": recorder.losses, "grad_norms": recorder.grad_norms, "samples": recorder.samples}
    return {**done, **(states if rank.is_first else {})}  # a state is the same on every rank, and large


# ------------------------------------------------------------------------------------------- the plain definition


def plain_losses(
    case: Case, left_out: frozenset[str] = frozenset(), skipped: frozenset[int] = frozenset()
) -> tuple[list[float], list[float]]:
    """(loss per answer token, gradient norm before clipping) of each step, one question at a time. left_out: keys of
    samples of weight 0: the gradient is still per answer token of the whole step, the loss shown is of those that
    count.
    skipped: steps that are not taken."""
    run, stage = SmallRun(case), case.stage_config
    tokenizer = AutoTokenizer.from_pretrained(case.llm)
    llm = AutoModelForCausalLM.from_pretrained(case.llm, dtype=torch.float32, attn_implementation="eager")
    projector = run.model().projector  # drawn from the seed
    trained = [*projector.parameters(), *(llm.parameters() if case.train == "full" else ())]
    llm.requires_grad_(case.train == "full")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=stage.betas,
    )
    losses, norms = [], []
    for step in sorted(set(range(run.plan.num_steps)) - skipped):
        questions = [
            (run.shards.read(sample).protein, run.shards.read_text(sample)[1][turn])
            for sample, turns in run.groups(step)
            for turn in turns
        ]
        terms = [plain_question(llm, projector, tokenizer, run, *question) for question in questions]
        heard = [term for (protein, _), term in zip(questions, terms) if protein.key not in left_out]
        num_tokens = sum(count for _, count in terms)
        loss = sum(term for term, _ in heard) / num_tokens
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.plan.num_steps, stage)
        optimizer.step()
        losses.append(float(loss.detach()) * num_tokens / sum(count for _, count in heard))
    return losses, norms


def plain_question(llm, projector, tokenizer, run: SmallRun, protein, turn):
    """(sum of answer-token losses, answer tokens) of one question in the released code's prompt."""
    (structure,), (sequence,) = run.encoders.encoders.encode([protein])

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = [tokenizer.bos_token_id, *ids("###Human: <protein>")]
    after = ids(f"</protein> {turn.question} ###Assistant: ")
    answer = ids(f"{turn.answer}###")[: run.stage.max_answer_tokens]
    if run.case.model_config.projector == "linear":
        rows = torch.cat(
            [structure @ projector.structure.weight.T + projector.structure.bias]
            + [sequence @ projector.sequence.weight.T + projector.sequence.bias]
        )
    else:
        rows = projector([structure], [sequence])  # of one protein; tests/unit/model/test_projector.py writes it out
    table = llm.get_input_embeddings().weight
    embeddings = torch.cat([table[before], rows, table[after + answer]])
    logits = llm(inputs_embeds=embeddings[None]).logits[0]
    answered = logits[-len(answer) - 1 : -1]
    return F.cross_entropy(answered, torch.tensor(answer), reduction="sum"), len(answer)


def zero_options(name: str) -> dict:
    """zero_optimization of ds_configs/NAME.json, or of plain data parallelism, which has no file."""
    if name == "zero0":
        return {"stage": 0}
    path = Path(__file__).parents[1] / "ds_configs" / f"{name}.json"
    return json.loads(path.read_text())["zero_optimization"]
