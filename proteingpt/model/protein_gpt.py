"""ProteinGPT: the projector and the LLM. The encoders are not part of it; it takes their rows.

Legend: T tokens, A answer tokens, D width, V vocabulary.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from proteingpt.data.collate import Pack
from proteingpt.model import attention, flex
from proteingpt.model.norms import fuse_norms
from proteingpt.model.projector import Projector

# Bytes of float32 logits held at once; where a pack's are more, the LLM's head runs in chunks of so many, and again in
# the backward pass. Whole, 4,096 answer tokens of Llama 3 would hold 2.1 GB, several times over.
LOGITS_BYTES = 2**28
# Model types whose logits are what their head gives: others scale or cap them behind it, and are not chunked.
PLAIN_HEADS = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


class ProteinGPT(nn.Module):
    def __init__(self, projector: Projector, llm: nn.Module, attention_way: str = "auto"):
        """attention_way: model.attention of the recipe: auto, flex or sdpa."""
        super().__init__()
        attention.check_positions(llm.config)
        fuse_norms(llm)
        self.projector = projector
        self.llm = llm
        self.attention_way = attention_way

    def forward(
        self, pack: Pack, structure_rows: list[torch.Tensor], sequence_rows: list[torch.Tensor]
    ) -> torch.Tensor:
        """Sum of the weighted losses of the pack's answer tokens, in nats: a float32 scalar (float64 of such a model).

        A sum, not a mean: only the step knows how many answer tokens it has over all its packs and ranks.
        """
        embeddings = self.embed(pack.token_ids, pack.protein_positions, structure_rows, sequence_rows)
        way = attention.choose(self.attention_way, embeddings.device)
        padding = flex.padded_length(pack.num_tokens) - pack.num_tokens if way == "flex" else 0
        losses = self.answer_losses(
            pack.targets,
            inputs_embeds=F.pad(embeddings, (0, 0, 0, padding))[None],
            position_ids=F.pad(pack.position_ids, (0, padding))[None],
            logits_to_keep=pack.predict_positions,
            layout=attention.make_layout(pack.group_starts, pack.branch_ids, way),
            use_cache=False,
        )
        return (losses * pack.weights).sum()

    def answer_losses(self, targets: torch.Tensor, **inputs) -> torch.Tensor:
        """(A,) losses of the targets, float32 or float64. inputs: the LLM's."""
        config = self.llm.config
        rows = max(1, LOGITS_BYTES // (4 * config.get_text_config().vocab_size))
        if len(targets) <= rows or config.model_type not in PLAIN_HEADS:
            return token_losses(self.llm(**inputs).logits[0], targets)
        with losses_for_logits(self.llm.get_output_embeddings(), targets, rows):
            return self.llm(**inputs).logits[0]

    def embed(self, token_ids, protein_positions, structure_rows, sequence_rows) -> torch.Tensor:
        """(T,) ids -> (T, width), with the protein's rows in their places. A miscount of rows is a shape error."""
        embeddings = self.llm.get_input_embeddings()(token_ids)
        rows = self.projector(structure_rows, sequence_rows).to(embeddings.dtype)
        return embeddings.index_copy(0, protein_positions, rows)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(A, V), (A,) -> (A,) in nats, computed in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def head_losses(hidden, weight, bias, targets) -> torch.Tensor:
    return token_losses(F.linear(hidden, weight, bias), targets)


@contextmanager
def losses_for_logits(head: nn.Linear, targets: torch.Tensor, rows: int):
    """Within, `head` gives (1, A) losses of its (1, A, D) input instead of logits, `rows` answer tokens at a time.

    The head is still called once: under ZeRO 3 each call of a module is a collective, and ranks differ in their chunks.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        chunks = zip(hidden[0].split(rows), targets.split(rows), strict=True)
        losses = [
            checkpoint(head_losses, part, head.weight, head.bias, wanted, use_reentrant=False)
            for part, wanted in chunks
        ]
        return torch.cat(losses)[None]

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
