"""Checkpoints: what trains, its Adam moments and the step, by parameter name. No frozen weight, no rank, no ZeRO stage.

A checkpoint is written aside, checksummed, fsynced and renamed, so that one that has its name is whole; `latest` is
replaced last. A broken one is named and passed over for the one before.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)

FORMAT = 1
KINDS = ("weights", "exp_avg", "exp_avg_sq")  # what Engine.get_state gives, a file of each
FILES = tuple(f"{kind}.safetensors" for kind in KINDS)
DESCRIPTION = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that is broken, or belongs to another run."""


@dataclass(frozen=True)
class Progress:
    """steps_done: optimizer steps behind this checkpoint, the whole of the data's state. plan: its fingerprint.
    speeds: what training.balance has agreed upon."""

    stage: str
    steps_done: int
    num_steps: int
    plan: str
    speeds: list | None = None


def save(directory: Path, state: dict[str, dict[str, torch.Tensor]], progress: Progress, keep_last: int) -> Path:
    """Write checkpoint `step-NNNNNNNN` under `directory`. Called by rank 0 alone."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{progress.steps_done:08d}"
    aside = directory / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for kind, tensors in state.items():
        save_file(tensors, aside / f"{kind}.safetensors")
    checksums = {path.name: sha256(path) for path in sorted(aside.iterdir())}
    description = {"format": FORMAT, **asdict(progress), "sha256": checksums}
    (aside / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    for path in [*aside.iterdir(), aside]:
        fsync(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    fsync(directory)
    replace_text(directory / "latest", target.name + "\n")
    prune(directory, target, keep_last)
    return target


def prune(directory: Path, newest: Path, keep_last: int):
    """Keep `newest`, just written, and those before it, `keep_last` in all. Later ones are broken, or the run would
    have gone on from them; counted as kept, they would push whole ones out."""
    kept = [path for path in checkpoints(directory) if step_of(path) <= step_of(newest)][:keep_last]
    for path in checkpoints(directory):
        if path not in kept:
            shutil.rmtree(path)


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
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is broken: {DESCRIPTION}: {error}") from None
    wanted = {"format", "sha256", *Progress.__dataclass_fields__}
    if not isinstance(description, dict) or not wanted <= description.keys():
        raise CheckpointError(f"checkpoint {path} is broken: {DESCRIPTION} lacks some of {', '.join(sorted(wanted))}")
    if description["format"] != FORMAT or not isinstance(description["sha256"], dict):
        raise CheckpointError(f"checkpoint {path} has format {description['format']!r}, this version reads {FORMAT}")
    return description


def read_progress(path: Path) -> Progress:
    description = read_description(path)
    return Progress(**{name: description[name] for name in Progress.__dataclass_fields__})


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


def replace_text(path: Path, text: str):
    """Put `text` at `path` so that a reader sees the old or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
