"""Checkpoints: what trains, its Adam moments and the step, by parameter name. No frozen weight, no rank, no ZeRO stage.

A checkpoint is written aside, checksummed, fsynced and renamed, so that one that has its name is whole; `latest` is
replaced last. A broken one is named and passed over for the one before. Reading runs nothing that is in the files and
believes nothing they say: safetensors and JSON, of bounded size, each value checked before a tensor is loaded.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from proteingpt.config import replace_text

log = logging.getLogger(__name__)

FORMAT = 1
KINDS = ("weights", "exp_avg", "exp_avg_sq")  # what Engine.get_state gives, a file of each
FILES = tuple(f"{kind}.safetensors" for kind in KINDS)
DESCRIPTION = "checkpoint.json"
MAX_DESCRIPTION_BYTES = 2**24  # the speeds of a thousand ranks take a hundredth
BEST = "best.json"


class CheckpointError(ValueError):
    """A checkpoint that is broken, belongs to another run, or cannot be written."""


@dataclass(frozen=True)
class Progress:
    """steps_done: optimizer steps behind this checkpoint, the whole of the data's state. plan: its fingerprint.
    speeds, limits: what training.balance has agreed upon, of ranks with these `devices`, by name. identity:
    fingerprints of what the run was made of, by their names. guard: the state of training.guard. scaler: that of fp16's
    loss scale."""

    stage: str
    steps_done: int
    num_steps: int
    plan: str
    speeds: list | None = None
    identity: dict | None = None
    limits: list | None = None
    devices: list | None = None
    guard: dict | None = None
    scaler: dict | None = None


def save(directory: Path, state: dict[str, dict[str, torch.Tensor]], progress: Progress, keep_last: int) -> Path:
    """Write checkpoint `step-NNNNNNNN` under `directory`. Called by rank 0 alone. CheckpointError where the disk does
    not take it: what was there before is whole, and what was begun is removed."""
    target = directory / f"step-{progress.steps_done:08d}"
    aside = directory / f".{target.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".step-*"):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        write_aside(aside, state, progress)
        put_in_place(aside, target)
        replace_text(directory / "latest", target.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"checkpoint {target} cannot be written: {error}") from error
    prune(directory, target, keep_last)
    return target


def write_aside(aside: Path, state: dict[str, dict[str, torch.Tensor]], progress: Progress):
    aside.mkdir()
    for kind, tensors in state.items():
        save_file(tensors, aside / f"{kind}.safetensors")
    checksums = {path.name: sha256(path) for path in sorted(aside.iterdir())}
    description = {"format": FORMAT, **asdict(progress), "sha256": checksums}
    (aside / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        fsync(path)


def put_in_place(aside: Path, target: Path):
    """One of the same step, broken or the run would have gone on from it, makes room first: two renames, no copying."""
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(directory: Path, newest: Path, keep_last: int):
    """Keep the best, `newest`, just written, and those before it, `keep_last` in all. Later ones are broken, or the run
    would have gone on from them; counted as kept, they would push whole ones out."""
    kept = [path for path in checkpoints(directory) if step_of(path) <= step_of(newest)][:keep_last]
    best = read_best(directory)
    for path in checkpoints(directory):
        if path not in kept and not (best and path.name == best["checkpoint"]):
            shutil.rmtree(path, ignore_errors=True)


def mark_best(path: Path, metric: str, value: float):
    """Say of checkpoint `path` that it is its stage's best so far: it is kept until another is."""
    replace_text(path.parent / BEST, json.dumps({"checkpoint": path.name, "metric": metric, "value": value}) + "\n")


def read_best(directory: Path) -> dict | None:
    """{"checkpoint": name, "metric": name, "value": number} of the best, None if none is marked or it is gone."""
    try:
        best = read_json(directory / BEST)
    except (OSError, ValueError):
        return None
    known = isinstance(best, dict) and best.keys() == {"checkpoint", "metric", "value"}
    names = {path.name for path in checkpoints(directory)}
    sound = known and best["checkpoint"] in names and isinstance(best["value"], float) and math.isfinite(best["value"])
    return best if sound else None


def checkpoints(directory: Path) -> list[Path]:
    """Those with their final name, newest first. Their names say it: `latest` is for people, and may be stale."""
    named = (path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_valid(directory: Path) -> Path | None:
    """The newest checkpoint whose checksums hold, None if none was ever saved. What is broken is named in the log and
    passed over; CheckpointError where all are, since to begin again in silence would throw a run away."""
    saved = checkpoints(directory)
    for path in saved:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            log.warning("%s; taking the checkpoint before it", error)
    if saved:
        raise CheckpointError(
            f"all {len(saved)} checkpoints in {directory} are broken, each as named above: restore one of them, or "
            f"remove {directory} to train this stage from its beginning"
        )
    return None


def verify(path: Path):
    """CheckpointError that names the file which is missing, cannot be read, or whose bytes have changed."""
    checksums = read_description(path)["sha256"]
    for name in FILES:
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path} has lost its {name}")
        try:
            found = sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is broken: {name} cannot be read: {error}") from None
        if found != checksums.get(name):
            raise CheckpointError(f"checkpoint {path} is broken: the checksum of {name} is wrong")


def read_description(path: Path) -> dict:
    """What checkpoint.json holds; CheckpointError where it cannot be read or is none of ours."""
    try:
        description = read_json(path / DESCRIPTION)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is broken: {DESCRIPTION}: {error}") from None
    wanted = {"format", "sha256", *(field.name for field in fields(Progress) if field.name not in OPTIONAL)}
    if not isinstance(description, dict) or not wanted <= description.keys():
        raise CheckpointError(f"checkpoint {path} is broken: {DESCRIPTION} lacks some of {', '.join(sorted(wanted))}")
    if description["format"] != FORMAT or not isinstance(description["sha256"], dict):
        raise CheckpointError(f"checkpoint {path} has format {description['format']!r}, this version reads {FORMAT}")
    wrong = [name for name, fits in SOUND.items() if not fits(description.get(name))]
    if wrong:
        raise CheckpointError(f"checkpoint {path} is broken: {DESCRIPTION} has a {wrong[0]} that cannot be")
    return description


def read_json(path: Path):
    """ValueError also for what is too long, or too deep for the parser's stack."""
    with open(path, "rb") as file:
        content = file.read(MAX_DESCRIPTION_BYTES + 1)
    if len(content) > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"more than {MAX_DESCRIPTION_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_texts(value) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def are_speeds(value) -> bool:
    """[[step, [a number for each rank]], ...], as training.balance keeps them."""
    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(entry, list) and len(entry) == 2 and is_count(entry[0]) and isinstance(entry[1], list)
            and all(type(speed) in (int, float) and math.isfinite(speed) and speed >= 0 for speed in entry[1])
            for entry in value
        )
    )  # fmt: skip


def are_limits(value) -> bool:
    return value is None or isinstance(value, list) and all(limit is None or is_count(limit) for limit in value)


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_guard(value) -> bool:
    """Of training.guard's state: strikes are [[key, count], ...], quarantined are keys, all else numbers or lists of
    them."""
    if not isinstance(value, dict):
        return value is None
    numbers = {name: v for name, v in value.items() if name not in ("strikes", "quarantined")}
    strikes, quarantined = value.get("strikes", []), value.get("quarantined", [])
    return (
        all(is_number(v) or isinstance(v, list) and all(map(is_number, v)) for v in numbers.values())
        and isinstance(strikes, list) and isinstance(quarantined, list)
        and all(isinstance(s, list) and len(s) == 2 and isinstance(s[0], str) and is_count(s[1]) for s in strikes)
        and all(isinstance(key, str) for key in quarantined)
    )  # fmt: skip


OPTIONAL = {field.name for field in fields(Progress) if field.default is None}
SOUND = {
    "stage": lambda value: isinstance(value, str),
    "steps_done": is_count,
    "num_steps": is_count,
    "plan": lambda value: isinstance(value, str),
    "speeds": are_speeds,
    "identity": lambda value: value is None or is_texts(value),
    "limits": are_limits,
    "devices": lambda value: value is None or isinstance(value, list) and all(isinstance(name, str) for name in value),
    "guard": is_guard,
    "scaler": lambda value: value is None or isinstance(value, dict) and all(map(is_number, value.values())),
}


def read_progress(path: Path) -> Progress:
    description = read_description(path)
    return Progress(**{name: description.get(name) for name in Progress.__dataclass_fields__})


def identity_differences(saved: Mapping | None, found: Mapping, allowed: Collection[str] = ()) -> list[str]:
    """A line for each thing that a run was made of and that is another now, but for the allowed ones. What an older
    checkpoint did not note is not compared."""
    return [
        f"{name} has changed (was {saved[name][:12]}, is {found[name][:12]})"
        for name in sorted((saved or {}).keys() & found.keys())
        if saved[name] != found[name] and name not in allowed
    ]


def check_fits(path: Path, shapes: Mapping[str, tuple[int, ...]]):
    """CheckpointError unless each file holds exactly the tensors named in `shapes`, in float32 and of that shape. Reads
    their headers only, so that nothing large is loaded for a checkpoint that does not fit."""
    for name in FILES:
        try:
            with safe_open(path / name, "pt") as file:
                found = {key: file.get_slice(key) for key in file.keys()}
                found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in found.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} is broken: {name}: {error}") from None
        wanted = {key: ("F32", tuple(shape)) for key, shape in shapes.items()}
        wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if wrong:
            key = wrong[0]
            raise CheckpointError(
                f"checkpoint {path} does not fit what trains here: in {name}, {key} is {found.get(key, 'not there')}, "
                f"expected {wanted.get(key, 'nothing of that name')}; {len(wrong)} such in all"
            )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """float32 weights of what trains, by parameter name."""
    return load_file(path / "weights.safetensors")


def read_state(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: load_file(path / f"{kind}.safetensors") for kind in KINDS}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
