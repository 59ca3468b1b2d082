"""A real step of the trainer's engine on this device, timed: for benchmarks, and for a file that estimates read.

A forward's seconds are held to be a fixed part, one for each FLOP of matrix products, and two for each of attention, on
prefixes and from branches, which need a mask; how FLOPs are counted cancels out, as long as file and estimate count
alike. So packs of each size are timed with many questions a protein, with one, and with one protein alone. The update
is timed apart. Given up: a rank alone, so what exchange between ranks costs is not in it.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from proteingpt.cluster.shapes import Flops, pack_pairs, step_flops
from proteingpt.cluster.work import ANSWER, BEFORE, QUESTION, fake_group, make_pack
from proteingpt.config import ModelConfig, StageConfig, replace_text
from proteingpt.data.collate import Pack, branch_length, collate
from proteingpt.model import assemble, attention
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.protein import prefix_length
from proteingpt.training.balance import device_name
from proteingpt.training.engine import Engine, precision

WIDTHS = (512, 2560)  # of ESM-IF1's rows and ESM-2 3B's
STAGE = dict(
    template="released", epochs=1, questions_per_group=29, max_answer_tokens=256, warmup_steps=0, warmup_lr=0.0,
    init_lr=1e-4, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.05,
)  # fmt: skip
FORMAT = 2


class CalibrationError(ValueError):
    """A calibration file that cannot serve."""


@dataclass(frozen=True)
class Line:
    """Seconds of a forward and backward: a part that is always there, and one for each FLOP of each kind."""

    overhead_seconds: float
    seconds_per_flop: float
    seconds_per_prefix_flop: float
    seconds_per_branch_flop: float

    def seconds(self, work: Flops) -> float:
        each = (self.seconds_per_flop, self.seconds_per_prefix_flop, self.seconds_per_branch_flop)
        return self.overhead_seconds + sum(seconds * flops for seconds, flops in zip(each, work))


@dataclass(frozen=True)
class Calibration:
    """lines: of activation checkpointing off and on. update_seconds: of a step's reduction and update, of `trained`
    parameters on one rank. layers: of the LLM, which the overhead goes with."""

    device: str
    llm: str
    train: str
    precision: str
    layers: int
    trained: int
    update_seconds: float
    lines: dict[str, Line]


def fit_line(work: list[Flops], seconds: list[float]) -> Line:
    """Least squares of the relative errors, of those with no part below zero: among all choices of parts that are
    zero."""
    y = np.array(seconds, np.float64)
    columns = np.array([(1.0, *flops) for flops in work], np.float64)
    scale = np.maximum(columns.max(0), 1e-300)
    found = []
    for others in chain.from_iterable(combinations((0, 2, 3), size) for size in range(4)):
        kept = [1, *others]
        wanted = columns[:, kept] / scale[kept] / y[:, None]
        values = np.zeros(4)
        values[kept] = np.linalg.lstsq(wanted, np.ones(len(y)), rcond=None)[0]
        if values.min() >= 0 and values[1] > 0:
            error = float(np.square(wanted @ values[kept] - 1).sum())
            found.append((error, len(kept), tuple((values / scale).tolist())))
    return Line(*min(found)[2])


def write_calibration(found: Calibration, path: Path):
    replace_text(path, json.dumps({"format": FORMAT, **asdict(found)}, indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise KeyError("format")
        return Calibration(**{**values, "lines": {name: Line(**line) for name, line in values["lines"].items()}})
    except OSError as error:
        raise CalibrationError(f"--calibration {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"--calibration {path} is not what --calibrate writes ({type(error).__name__}: {error}): measure anew"
        ) from None


# ------------------------------------------------------------------------------------------------------------ measuring


def build(llm_config, settings: ModelConfig, dtype: torch.dtype, device: torch.device) -> ProteinGPT:
    """Random weights, made where they stay."""
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation=attention.NAME)
        projector = assemble.make_projector(settings, *WIDTHS, llm_config.hidden_size).to(dtype)
    assemble.prepare_llm(llm, settings, 0, dtype, nullcontext)
    return ProteinGPT(projector, llm, settings.attention)


def set_checkpointing(llm, on: bool):
    if on:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        llm.gradient_checkpointing_disable()


def random_rows(pack: Pack, dtype: torch.dtype, device: torch.device) -> list[list[torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(1)
    return [
        [torch.randn(len(p) + 2, w, device=device, dtype=dtype, generator=generator) for p in pack.proteins]
        for w in WIDTHS
    ]


def timed_step(engine: Engine, pack: Pack, rows, device: torch.device) -> tuple[float, float]:
    """Seconds of forward and backward, and of the rest of an optimizer step."""
    began = time.perf_counter()
    with engine.accumulating(False):
        loss = engine.forward(pack.to(device), *rows)
        engine.backward(loss, pack.num_answer_tokens, is_last=True)
        float(loss.detach())  # as the trainer does, and so that the clock is that of the work
    through = time.perf_counter()
    engine.reduce()
    engine.step(1e-4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return through - began, time.perf_counter() - through


def lone_pack(tokens: int) -> Pack:
    """One protein with one question."""
    around = BEFORE + branch_length(QUESTION, ANSWER) + prefix_length(0)
    residues = max(1, (tokens - around) // (prefix_length(1) - prefix_length(0)))
    return collate([fake_group(residues, [(QUESTION, ANSWER)])])


def timed_in_turns(engine: Engine, packs: list[Pack], num_steps: int, dtype, device) -> list[list[tuple[float, float]]]:
    """`num_steps` timed_steps of each pack, round after round, so that whatever else the machine does befalls all
    alike."""
    rows = [random_rows(pack, dtype, device) for pack in packs]
    for pack, of_pack in zip(packs, rows):
        for _ in range(2):  # compiles, allocates
            timed_step(engine, pack, of_pack, device)
    rounds = [[timed_step(engine, *both, device) for both in zip(packs, rows)] for _ in range(num_steps)]
    return [list(of_pack) for of_pack in zip(*rounds)]


def calibrate(
    llm_config,
    name: str,
    settings: ModelConfig,
    ds_config: dict,
    sizes: list[int],
    num_steps: int,
    device: torch.device,
) -> Calibration:
    """Of engine steps on packs of `sizes` tokens, in this process alone. torch.distributed must have begun."""
    dtype = precision(ds_config)
    model = build(llm_config, settings, dtype, device)
    stage = StageConfig(**STAGE, tokens_per_step=max(sizes), tokens_per_pack=max(sizes))
    engine = Engine(model, stage, ds_config)
    engine.module.train()
    many_and_one = [make_pack(size, llm_config.vocab_size, turns=turns) for size in sizes for turns in (29, 1)]
    packs = many_and_one + [lone_pack(size) for size in sizes]
    lines, updates = {}, []
    for choice in ("off", "on"):
        set_checkpointing(model.llm, choice == "on")
        timed = timed_in_turns(engine, packs, num_steps, dtype, device)
        seconds = [float(np.median([forward for forward, _ in of_pack])) for of_pack in timed]
        updates += [update for of_pack in timed for _, update in of_pack]
        counts = [(pack.num_tokens, len(pack.targets), pack_pairs(pack)) for pack in packs]
        lines[choice] = fit_line([step_flops(llm_config, *c, settings.train, choice == "on") for c in counts], seconds)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine.close()
    return Calibration(
        device_name(device), name, settings.train, str(dtype).removeprefix("torch."), llm_config.num_hidden_layers,
        trained, float(np.median(updates)), lines,
    )  # fmt: skip
