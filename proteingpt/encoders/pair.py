"""The two frozen encoders as the model wants them: rows of a list of proteins, structure and sequence.

Each protein is encoded by itself, so that its rows are a function of the protein alone, to the bit: they do not depend
on what shares its pack, on what an interrupted run had already met, or on whether they come from a cache. Given up: the
few percent that proteins packed into one forward save on a CPU (more on a GPU; benchmarks/README.md).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from proteingpt.config import NO_ENCODER, ConfigError, EncodersConfig
from proteingpt.encoders.esm2 import load_esm2, read_esm2
from proteingpt.encoders.esm_if1 import load_esm_if1, read_esm_if1
from proteingpt.encoders.weights import find_weights
from proteingpt.protein import Protein

Rows = tuple[list[torch.Tensor], list[torch.Tensor]]


class NoEncoder:
    """Stands for an encoder that is left out: no rows, of no width."""

    width, fingerprint = 0, ""

    def __init__(self, device):
        self.device = torch.device(device)

    def encode(self, proteins: Sequence[Protein]) -> list[torch.Tensor]:
        return [torch.zeros(0, 0, device=self.device) for _ in proteins]


@dataclass(frozen=True)
class Encoders:
    """structure: ESM-IF1, sequence: ESM-2; outside the engine, on each rank."""

    structure: object
    sequence: object
    read = None  # of a cache: a protein's rows, for the thread that reads ahead

    @staticmethod
    def find(config: EncodersConfig):
        """Raises what is wrong with the settings, and loads nothing."""
        for name in ("esm2", "esm_if1"):
            value = getattr(config, name)
            if value is None:
                raise ConfigError(
                    f"encoders.{name} is not set: give a published name, the path of its weights, or none"
                )
            if value != NO_ENCODER:
                find_weights(value, config.weights_dir)

    @staticmethod
    def widths(config: EncodersConfig) -> dict[str, int]:
        """{part: columns of its rows}, from the heads of the files."""

        def width(name_or_path: str, read_settings: Callable) -> int:
            if name_or_path == NO_ENCODER:
                return 0
            return read_settings(find_weights(name_or_path, config.weights_dir))[0].encoder_embed_dim

        return {"structure": width(config.esm_if1, read_esm_if1), "sequence": width(config.esm2, read_esm2)}

    @classmethod
    def load(cls, config: EncodersConfig, device) -> "Encoders":
        options = {"weights_dir": config.weights_dir, "device": device, "dtype": getattr(torch, config.dtype)}
        options["backend"] = getattr(config, "backend", "fast")
        structure = sequence = NoEncoder(device)
        if config.esm_if1 != NO_ENCODER:
            structure = load_esm_if1(config.esm_if1, **options)
        if config.esm2 != NO_ENCODER:
            sequence = load_esm2(config.esm2, layer=getattr(config, "esm2_layer", None), **options)
        return cls(structure, sequence)

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        """(structure rows, sequence rows), each a list of (L + 2, width) tensors, one for each protein; (0, 0) of an
        encoder that is left out."""
        structure = [rows for protein in proteins for rows in self.structure.encode([protein])]
        return structure, [rows for protein in proteins for rows in self.sequence.encode([protein])]

    def encode_together(self, proteins: Sequence[Protein]) -> Rows:
        """The same rows but for their rounding, several proteins in a forward."""
        return self.structure.encode(proteins), self.sequence.encode(proteins)


def rows_of(pack, encoders, device) -> Rows:
    """The rows of a pack's proteins on the device: those that the loader has read from a cache, else the encoders'."""
    if pack.rows is None:
        return encoders.encode(pack.proteins)
    return tuple([rows.to(device, non_blocking=True) for rows in part] for part in zip(*pack.rows))


def num_encoders(encoders) -> int:
    """How many of the two give rows, of a pair or what stands for one: each takes L + 2 positions of a prompt."""
    return sum(bool(part.width) for part in (encoders.structure, encoders.sequence))


class Remembering:
    """Encoders that keep the rows of the proteins met last, up to `max_bytes` of them.

    For data sets that fit: the demo's, and the held-out proteins, which come back at every evaluation.
    """

    def __init__(self, encoders: Encoders, max_bytes: int):
        self.encoders, self.max_bytes = encoders, max_bytes
        self.kept: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self.num_bytes = 0

    def encode(self, proteins: Sequence[Protein], made: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {}) -> Rows:
        """made: rows by key that were computed elsewhere, to be taken instead of computing them."""
        missing = {p.key: p for p in proteins if p.key not in self.kept}
        new = {key: protein for key, protein in missing.items() if key not in made}
        fresh = dict(zip(new, zip(*self.encoders.encode(list(new.values()))))) if new else {}
        fresh |= {key: made[key] for key in missing if key in made}
        rows = [self.kept.get(p.key) or fresh[p.key] for p in proteins]
        for key, pair in fresh.items():
            self.keep(key, pair)
        for p in proteins:
            if p.key in self.kept:
                self.kept.move_to_end(p.key)
        return [structure for structure, _ in rows], [sequence for _, sequence in rows]

    def keep(self, key: str, pair: tuple[torch.Tensor, torch.Tensor]):
        self.kept[key] = pair
        self.num_bytes += sum(rows.nbytes for rows in pair)
        while self.num_bytes > self.max_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.num_bytes -= sum(rows.nbytes for rows in oldest)
