"""ProteinGPT: the projector and the LLM. The encoders are not part of it; it takes their rows."""

import torch
import torch.nn.functional as F
from torch import nn

from proteingpt.data.collate import Pack
from proteingpt.model.attention import make_layout
from proteingpt.model.projector import Projector


class ProteinGPT(nn.Module):
    def __init__(self, projector: Projector, llm: nn.Module):
        super().__init__()
        self.projector = projector
        self.llm = llm

    def forward(self, pack: Pack, structure_rows: list[torch.Tensor], sequence_rows: list[torch.Tensor]) -> torch.Tensor:
        """Sum of the weighted losses of the pack's answer tokens, in nats: a float32 scalar (float64 of such a model).

        A sum, not a mean: only the step knows how many answer tokens it has over all its packs and ranks.
        """
        embeddings = self.embed(pack.token_ids, pack.protein_positions, structure_rows, sequence_rows)
        logits = self.llm(
            inputs_embeds=embeddings[None],
            position_ids=pack.position_ids[None],
            logits_to_keep=pack.predict_positions,
            layout=make_layout(pack.group_starts, pack.branch_ids),
            use_cache=False,
        ).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, pack.targets, reduction="none")
        return (losses * pack.weights).sum()

    def embed(self, token_ids, protein_positions, structure_rows, sequence_rows) -> torch.Tensor:
        """(T,) ids -> (T, width), with the protein's rows in their places. A miscount of rows is a shape error."""
        embeddings = self.llm.get_input_embeddings()(token_ids)
        rows = self.projector(structure_rows, sequence_rows).to(embeddings.dtype)
        return embeddings.index_copy(0, protein_positions, rows)
