"""Ranks whose heads run in unlike numbers of chunks train as one process does that asks one question at a time: under
ZeRO 3, where each call of a module is a collective, as well."""

import pytest
from small_run import Case, SmallRun, plain_losses, zero_options

from proteingpt.model import protein_gpt


def train_on_rank(rank, device, case: Case) -> list[float]:
    """The first rank takes 5 answer tokens at a time, the second all at once."""
    whole = protein_gpt.LOGITS_BYTES
    run = SmallRun(case)
    engine = run.engine()
    if rank.is_first:
        protein_gpt.LOGITS_BYTES = 5 * 4 * engine.module.llm.config.vocab_size
    try:
        return run.train(engine, rank, device).losses
    finally:
        protein_gpt.LOGITS_BYTES = whole
        engine.close()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_unlike_chunks_of_the_head(worlds, demo_assets, qwen2, zero):
    """With a head that is tied to the embeddings, and both trained."""
    case = Case(str(demo_assets), str(qwen2), "full", zero_options(zero), stage=(("max_steps", 3),))
    losses, _ = plain_losses(case)
    first, second = worlds(2)(train_on_rank, case)
    assert first == second == pytest.approx(losses, rel=1e-5)
