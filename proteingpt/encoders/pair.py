"""The two frozen encoders as the model wants them: rows of a list of proteins, structure and sequence."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proteingpt.config import ConfigError, EncodersConfig
from proteingpt.encoders.esm2 import load_esm2
from proteingpt.encoders.esm_if1 import load_esm_if1
from proteingpt.encoders.weights import find_weights
from proteingpt.protein import Protein

Rows = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Encoders:
    """structure: ESM-IF1, sequence: ESM-2; outside the engine, on each rank."""

    structure: object
    sequence: object

    @staticmethod
    def find(config: EncodersConfig):
        """Raises what is wrong with the settings, and loads nothing."""
        for name in ("esm2", "esm_if1"):
            value = getattr(config, name)
            if value is None:
                raise ConfigError(f"encoders.{name} is not set: give a published name or the path of its weights")
            find_weights(value, config.weights_dir)

    @classmethod
    def load(cls, config: EncodersConfig, device) -> "Encoders":
        options = {"weights_dir": config.weights_dir, "device": device, "dtype": getattr(torch, config.dtype)}
        options["backend"] = getattr(config, "backend", "fast")
        return cls(load_esm_if1(config.esm_if1, **options), load_esm2(config.esm2, **options))

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        """(structure rows, sequence rows), each a list of (L + 2, width) tensors, one for each protein."""
        return self.structure.encode(proteins), self.sequence.encode(proteins)


class Remembering:
    """Encoders that keep the rows of the proteins met last, up to `max_bytes` of them.

    For data sets that fit: the demo's, and the held-out proteins, which come back at every evaluation.
    """

    def __init__(self, encoders: Encoders, max_bytes: int):
        self.encoders, self.max_bytes = encoders, max_bytes
        self.kept: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self.num_bytes = 0

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        new = {p.key: p for p in proteins if p.key not in self.kept}
        fresh = dict(zip(new, zip(*self.encoders.encode(list(new.values()))))) if new else {}
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
