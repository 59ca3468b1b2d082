"""Answers: a protein's questions decoded together, by transformers' own generate."""

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from proteingpt.data.prompts import Prompt
from proteingpt.model import attention
from proteingpt.model.protein_gpt import ProteinGPT

EMPTY = "N/A"  # what an empty answer counts as, as in the published scoring


class EndOfAnswer(StoppingCriteria):
    """Ends a row once its text holds the end symbol. By text, not by ids: a tokenizer may merge the symbol with what
    stands before it."""

    def __init__(self, prompt: Prompt):
        self.tokenizer, self.end = prompt.tokenizer, prompt.end_text
        self.window = len(self.end.encode()) + 1  # tokens that surely hold the symbol, one byte each at worst

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, -self.window :])
        return torch.tensor([self.end in tail for tail in tails], device=input_ids.device)


@torch.no_grad()
def answer(
    model: ProteinGPT,
    prompt: Prompt,
    structure_rows: torch.Tensor,
    sequence_rows: torch.Tensor,
    questions: list[str],
    *,
    max_new_tokens: int,
    in_step: bool = False,
) -> list[str]:
    """Greedy answers to `questions` about one protein, whose encoder rows are (L + 2, width) each.

    in_step: every rank calls this equally often and decodes until all are done, as ZeRO 3 needs it.
    """
    embeddings, mask = left_padded(model, prompt, structure_rows, sequence_rows, questions)
    model.llm.set_attn_implementation("sdpa")
    try:
        ids = model.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=prompt.tokenizer.eos_token_id,
            pad_token_id=prompt.tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([EndOfAnswer(prompt)]),
            synced_gpus=in_step,
        )
    finally:
        model.llm.set_attn_implementation(attention.NAME)
    return [clean(text, prompt) for text in prompt.tokenizer.batch_decode(ids)]


def clean(text: str, prompt: Prompt) -> str:
    """The answer up to its end symbol, without special tokens; EMPTY where nothing is left."""
    text = text.split(prompt.end_text)[0].split(prompt.tokenizer.eos_token)[0].strip()
    return text or EMPTY


def left_padded(model, prompt, structure_rows, sequence_rows, questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (Q, T, width) and mask (Q, T) of prefix + question, padded on the left as generate wants it."""
    device = structure_rows.device
    num_rows = len(structure_rows) + len(sequence_rows)
    front = prompt.prefix_ids
    prefix_ids = torch.tensor(front + [0] * num_rows, device=device)
    places = torch.arange(len(front), len(front) + num_rows, device=device)
    prefix = model.embed(prefix_ids, places, [structure_rows], [sequence_rows])
    embed = model.llm.get_input_embeddings()
    branches = [embed(torch.tensor(ids, dtype=torch.int64, device=device)) for ids in prompt.question_ids(questions)]
    longest = max(len(branch) for branch in branches)
    rows, masks = [], []
    for branch in branches:
        padding = longest - len(branch)
        rows.append(torch.cat([prefix.new_zeros(padding, prefix.shape[1]), prefix, branch]))
        masks.append(torch.arange(longest + len(prefix), device=device) >= padding)
    return torch.stack(rows), torch.stack(masks).long()
