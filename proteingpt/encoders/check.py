"""Checks encoder weights that a user has: are they whole, do they run in the chosen precision, are the rows right?

Right means equal to fair-esm's own code on the same weights, and, where a structure and its published embedding are
given, equal to that. Each check is a line of a table; one that fails does not stop the others.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from proteingpt.data.structure import read_entry
from proteingpt.encoders.esm2 import load_esm2, read_esm2
from proteingpt.encoders.esm_if1 import load_esm_if1, read_esm_if1
from proteingpt.encoders.weights import find_weights
from proteingpt.protein import Protein

# Norm of the difference over that of the reference's rows. Half precision rounds at other places in the two.
TOLERANCE = {
    "ESM-2": {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2},
    "ESM-IF1": {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2},
}
# A published embedding was made elsewhere, from fair-esm's reading of the structure, by weights in float32.
GOLDEN_TOLERANCE = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Result(NamedTuple):
    encoder: str
    check: str
    passed: bool
    detail: str


def check_encoders(
    *,
    esm2: str | None,
    esm_if1: str | None,
    weights_dir: str = "weights",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    structure: Path | None = None,
    chain: str = "A",
    embedding: Path | None = None,
) -> Iterator[Result]:
    """Results as they come. `structure` and `embedding` go together: the golden value of ESM-IF1.

    Raises ValueError where nothing is asked for, or half of a golden value, or for a device that is not there.
    """
    if esm2 is None and esm_if1 is None:
        raise ValueError("nothing to check: give --esm2, --esm-if or both")
    if (structure is None) != (embedding is None) or (structure is not None and esm_if1 is None):
        raise ValueError("a golden value is --structure and --embedding together, with --esm-if")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"the device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    options = {"weights_dir": weights_dir, "device": device, "dtype": dtype}
    if esm2 is not None:
        yield from _check("ESM-2", esm2, load_esm2, _esm2_file, options)
    if esm_if1 is not None:
        yield from _check("ESM-IF1", esm_if1, load_esm_if1, _esm_if1_file, options)
    if embedding is not None:
        yield _attempt("ESM-IF1", "published embedding", lambda: _golden(esm_if1, options, structure, chain, embedding))


def _check(name: str, source: str, load: Callable, read: Callable, options: dict) -> Iterator[Result]:
    whole = _attempt(name, "names and shapes", lambda: read(find_weights(source, options["weights_dir"])))
    yield whole
    if not whole.passed:
        return
    if name == "ESM-2":
        yield _attempt(name, "rotary frequencies", lambda: _frequencies(find_weights(source, options["weights_dir"])))
    proteins = probes()
    rows: list[torch.Tensor] = []

    def finite() -> tuple[bool, str]:
        rows.extend(row.cpu() for row in load(source, **options).encode(proteins))
        bad = [protein.key for protein, row in zip(proteins, rows, strict=True) if not row.isfinite().all()]
        precision = str(options["dtype"]).removeprefix("torch.")
        return not bad, f"in {precision}: " + (f"not those of {', '.join(bad)}" if bad else f"{len(rows)} proteins")

    yield _attempt(name, "finite rows", finite)
    gc.collect()  # one model at a time
    if rows:
        limit = TOLERANCE[name][options["dtype"]]
        reference = lambda: load(source, backend="reference", **options)  # noqa: E731
        yield _attempt(name, "equal to fair-esm", lambda: _agreement(reference(), rows, limit))


def _attempt(encoder: str, check: str, work: Callable[[], tuple[bool, str]]) -> Result:
    try:
        return Result(encoder, check, *work())
    except (ValueError, OSError, RuntimeError) as error:
        return Result(encoder, check, False, f"{type(error).__name__}: {error}")


def _esm2_file(path: Path) -> tuple[bool, str]:
    cfg, tensors = read_esm2(path)
    return True, f"{_size(tensors)}; {cfg.encoder_layers} layers, {cfg.encoder_embed_dim} wide"


def _esm_if1_file(path: Path) -> tuple[bool, str]:
    args, tensors = read_esm_if1(path)
    return True, f"{_size(tensors)}; {args.encoder_layers} layers, {args.encoder_embed_dim} wide"


def _size(tensors: dict[str, torch.Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()):,} parameters"


def _frequencies(path: Path) -> tuple[bool, str]:
    """They are stored with each layer, and are one and the same in every published model."""
    cfg, tensors = read_esm2(path)
    stored = [tensors[f"layers.{number}.self_attn.rot_emb.inv_freq"] for number in range(cfg.encoder_layers)]
    other = [number for number, value in enumerate(stored) if not torch.equal(value, stored[0])]
    return not other, f"layers {other} differ from layer 0" if other else f"the same in all {len(stored)} layers"


def _agreement(reference, rows: Sequence[torch.Tensor], limit: float) -> tuple[bool, str]:
    wanted = [row.cpu() for row in reference.encode(probes())]
    error = max(relative_error(a, b) for a, b in zip(rows, wanted, strict=True))
    return error <= limit, f"error {error:.1e}, at most {limit:.0e}"


def _golden(source: str, options: dict, structure: Path, chain: str, embedding: Path) -> tuple[bool, str]:
    wanted = torch.load(embedding, map_location="cpu", weights_only=True)
    if not isinstance(wanted, torch.Tensor):
        raise ValueError(f"{embedding} holds a {type(wanted).__name__}, wanted a tensor (residues + 2, 1, width)")
    wanted = wanted.detach().reshape(-1, wanted.shape[-1])
    protein = observed_part(read_entry(structure).protein(chain))
    (found,) = load_esm_if1(source, **options).encode([protein])
    if found.shape != wanted.shape:
        return False, f"{tuple(found.shape)} rows from {structure.name}, {tuple(wanted.shape)} in {embedding.name}"
    error, limit = relative_error(found.cpu(), wanted), GOLDEN_TOLERANCE[options["dtype"]]
    return error <= limit, f"error {error:.1e}, at most {limit:.0e}"


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite where either is not finite."""
    error = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
    return error if np.isfinite(error) else float("inf")


def observed_part(protein: Protein) -> Protein:
    """Without unresolved residues, as the published embeddings were made. ValueError where none is resolved."""
    kept = np.flatnonzero(protein.resolved)
    return dataclasses.replace(
        protein,
        sequence="".join(protein.sequence[i] for i in kept),
        backbone=protein.backbone[kept],
        confidence=None if protein.confidence is None else protein.confidence[kept],
    )


def probes() -> list[Protein]:
    """Made-up chains: one residue, odd letters, gaps, a pLDDT, and one longer than ESM-IF1's neighbourhood."""
    return [
        _probe(1, "M"),
        _probe(25, "LAGVSERTIDPKQNFYMHWCXBUZO"),
        _probe(60, "ACDEFGHIKLJ*", missing=(0, 17, 18)),
        _probe(150, "MKVLITGAGSGIGLE", confidence=0.7),
    ]


def _probe(length: int, letters: str, missing: Sequence[int] = (), confidence: float | None = None) -> Protein:
    """A random chain with CA 3.8 angstrom apart, and N and C beside each."""
    rng = np.random.default_rng((7, length))
    step, offsets = rng.normal(size=(length, 3)), rng.normal(size=(length, 3, 3))
    alpha = np.cumsum(3.8 * step / np.linalg.norm(step, axis=1, keepdims=True), axis=0)
    offsets *= 1.5 / np.linalg.norm(offsets, axis=2, keepdims=True)
    offsets[:, 1] = 0
    backbone = (alpha[:, None] + offsets).astype(np.float32)
    backbone[list(missing)] = np.nan
    plddt = None if confidence is None else np.full(length, confidence, np.float32)
    return Protein(f"probe{length}", "A", (letters * length)[:length], backbone, plddt)


def format_result(result: Result) -> str:
    return f"{'ok' if result.passed else 'FAILED':<8}{result.encoder:<9}{result.check:<21}{result.detail}"
