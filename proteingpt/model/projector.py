"""One linear map for each encoder, into the LLM's width. Structure rows first, then sequence rows, as published."""

import torch
from torch import nn


class Projector(nn.Module):
    """ESM-IF1 rows (structure_width) and ESM-2 rows (sequence_width) -> llm_width, each with a bias."""

    def __init__(self, structure_width: int, sequence_width: int, llm_width: int):
        super().__init__()
        self.structure = nn.Linear(structure_width, llm_width)
        self.sequence = nn.Linear(sequence_width, llm_width)

    def forward(self, structure_rows: list[torch.Tensor], sequence_rows: list[torch.Tensor]) -> torch.Tensor:
        """Rows of each protein, (L + 2, width) -> (P, llm_width): every protein's structure rows, then its sequence's."""
        dtype = self.structure.weight.dtype
        lengths = [len(rows) for rows in structure_rows]
        structure = self.structure(torch.cat(structure_rows).to(dtype)).split(lengths)
        sequence = self.sequence(torch.cat(sequence_rows).to(dtype)).split(lengths)
        return torch.cat([part for pair in zip(structure, sequence, strict=True) for part in pair])
