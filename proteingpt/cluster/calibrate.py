"""A real step of the trainer's engine on this device, timed: for benchmarks, and for a file that estimates read.

A forward's seconds are held to lie on a line in its FLOPs; how they are counted cancels out, as long as file and estimate
count alike. The update is timed apart. Given up: a rank alone, so what exchange between ranks costs is not in it.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from proteingpt.cluster.shapes import pack_pairs, step_flops
from proteingpt.cluster.work import make_pack
from proteingpt.config import ModelConfig, StageConfig, replace_text
from proteingpt.data.collate import Pack
from proteingpt.model import assemble, attention
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.training.balance import device_name
from proteingpt.training.engine import Engine, precision

WIDTHS = (512, 2560)  # of ESM-IF1's rows and ESM-2 3B's
STAGE = dict(
    template="released", epochs=1, questions_per_group=29, max_answer_tokens=256, warmup_steps=0, warmup_lr=0.0,
    init_lr=1e-4, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.05,
)  # fmt: skip
FORMAT = 1


class CalibrationError(ValueError):
    """A calibration file that cannot serve."""


@dataclass(frozen=True)
class Line:
    """Seconds of a forward and backward: overhead_seconds + FLOPs / flops_per_second."""

    overhead_seconds: float
    flops_per_second: float

    def seconds(self, flops: float) -> float:
        return self.overhead_seconds + flops / self.flops_per_second


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


def fit_line(flops: list[float], seconds: list[float]) -> Line:
    """Least squares of the relative errors; through the origin where the overhead would be negative."""
    x, y = np.array(flops, np.float64), np.array(seconds, np.float64)
    overhead, slope = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0] if len(x) > 1 else (0, 0)
    if overhead < 0 or slope <= 0:
        overhead, slope = 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    return Line(float(overhead), float(1 / slope))


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


# -------------------------------------------------------------------------------------------------------------- measuring


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
    return [[torch.randn(len(p) + 2, w, device=device, dtype=dtype, generator=generator) for p in pack.proteins] for w in WIDTHS]


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


def calibrate(
    llm_config, name: str, settings: ModelConfig, ds_config: dict, sizes: list[int], num_steps: int, device: torch.device
) -> Calibration:
    """Of engine steps on packs of `sizes` tokens, in this process alone. torch.distributed must have begun."""
    dtype = precision(ds_config)
    model = build(llm_config, settings, dtype, device)
    stage = StageConfig(**STAGE, tokens_per_step=max(sizes), tokens_per_pack=max(sizes))
    engine = Engine(model, stage, ds_config)
    engine.module.train()
    packs = [make_pack(size, llm_config.vocab_size) for size in sizes]
    lines, updates = {}, []
    for choice in ("off", "on"):
        set_checkpointing(model.llm, choice == "on")
        flops, seconds = [], []
        for pack in packs:
            rows = random_rows(pack, dtype, device)
            for _ in range(2):  # compiles, allocates
                timed_step(engine, pack, rows, device)
            timed = [timed_step(engine, pack, rows, device) for _ in range(num_steps)]
            seconds.append(float(np.median([forward for forward, _ in timed])))
            updates += [update for _, update in timed]
            counted = (pack.num_tokens, len(pack.targets), pack_pairs(pack))
            flops.append(step_flops(llm_config, *counted, settings.train, choice == "on"))
        lines[choice] = fit_line(flops, seconds)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine.close()
    return Calibration(
        device_name(device), name, settings.train, str(dtype).removeprefix("torch."), llm_config.num_hidden_layers, trained,
        float(np.median(updates)), lines,
    )  # fmt: skip
