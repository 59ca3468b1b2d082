"""From each encoder's rows into the LLM's width: structure first, then sequence, as published.

`linear` is the published map. Beyond the paper: `mlp`, two layers with a GELU between, and `resampler`, learned queries
that attend to the rows (after Perceiver, arXiv 2103.03206), so that a protein of any length takes the same few
positions. Given up there: which token tells of which residue. No module is called more often for more proteins, since
under ZeRO 3 each call is a collective.

Legend: N rows of all proteins, W their width, K tokens of a resampler, I inner width, D the LLM's width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from proteingpt.protein import part_length

RESAMPLER_LAYERS = 2
HEAD_WIDTH = 64


class Projector(nn.Module):
    """ESM-IF1 rows (structure_width) and ESM-2 rows (sequence_width) -> llm_width.

    A width of 0 is an encoder that is left out: it has no map, and its proteins no rows of it. kind, num_tokens,
    inner_width: model.projector, projector_tokens and projector_width of the recipe.
    """

    def __init__(
        self,
        structure_width: int,
        sequence_width: int,
        llm_width: int,
        kind: str = "linear",
        num_tokens: int | None = None,
        inner_width: int | None = None,
    ):
        super().__init__()
        self.num_tokens = num_tokens

        def part(width: int) -> nn.Module | None:
            if not width:
                return None
            if kind == "linear":
                return nn.Linear(width, llm_width)
            if kind == "mlp":
                return Mlp(width, inner_width or llm_width, llm_width)
            assert kind == "resampler", kind
            return Resampler(width, inner_width or llm_width, llm_width, num_tokens)

        self.structure, self.sequence = part(structure_width), part(sequence_width)

    def forward(self, structure_rows: list[torch.Tensor], sequence_rows: list[torch.Tensor]) -> torch.Tensor:
        """Rows of each protein, (L + 2, W) -> (P, D): every protein's structure, then its sequence."""
        both = ((self.structure, structure_rows), (self.sequence, sequence_rows))
        parts = [self.project(part, rows) for part, rows in both if part is not None]
        return torch.cat([part for of_one_protein in zip(*parts, strict=True) for part in of_one_protein])

    def project(self, part: nn.Module, rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """All rows at once, cut up again."""
        lengths = [len(r) for r in rows]
        joined = torch.cat(rows).to(next(part.parameters()).dtype)
        made = part(joined, lengths) if isinstance(part, Resampler) else part(joined)
        return made.split([self.positions(length) for length in lengths])

    def positions(self, num_rows: int) -> int:
        """That so many rows of an encoder take in the prompt."""
        return part_length(num_rows, self.num_tokens)


class Mlp(nn.Module):
    """(N, W) -> (N, D)."""

    def __init__(self, width: int, inner_width: int, llm_width: int):
        super().__init__()
        self.first = nn.Linear(width, inner_width)
        self.second = nn.Linear(inner_width, llm_width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(rows)))


class Resampler(nn.Module):
    """(N, W) rows of B proteins, of lengths that add up to N -> (B * K, D); of a protein without rows, none."""

    def __init__(self, width: int, inner_width: int, llm_width: int, num_tokens: int):
        super().__init__()
        self.inside = nn.Linear(width, inner_width)
        self.queries = nn.Parameter(torch.randn(num_tokens, inner_width) * inner_width**-0.5)
        self.layers = nn.ModuleList(ResamplerLayer(inner_width) for _ in range(RESAMPLER_LAYERS))
        self.norm = nn.LayerNorm(inner_width)
        self.outside = nn.Linear(inner_width, llm_width)

    def forward(self, rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        there = [length for length in lengths if length]
        rows = self.inside(rows)
        tokens = self.queries.repeat(len(there), 1)
        for layer in self.layers:
            tokens = layer(tokens, rows, there, len(self.queries))
        return self.outside(self.norm(tokens))


class ResamplerLayer(nn.Module):
    """Tokens attend to their own protein's rows, then pass through a GELU layer of four times their width."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = max(1, width // HEAD_WIDTH) if width % HEAD_WIDTH == 0 else 1
        self.token_norm, self.row_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.merge = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor, lengths: list[int], num_tokens: int) -> torch.Tensor:
        """(B * K, I) tokens and (N, I) rows -> (B * K, I)."""
        queries = self.heads(self.query(self.token_norm(tokens)))
        keys, values = map(self.heads, self.key_value(self.row_norm(rows)).chunk(2, dim=-1))
        parts = [num_tokens] * len(lengths)
        own = zip(queries.split(parts, dim=1), keys.split(lengths, dim=1), values.split(lengths, dim=1), strict=True)
        seen = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in own]
        # The empty piece is for proteins that all have no rows, which leave nothing else to join.
        joined = torch.cat([*seen, queries[:, :0]], dim=1).transpose(0, 1).flatten(1)
        tokens = tokens + self.merge(joined)
        return tokens + self.mlp(self.mlp_norm(tokens))

    def heads(self, rows: torch.Tensor) -> torch.Tensor:
        """(M, I) -> (heads, M, I / heads)."""
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
