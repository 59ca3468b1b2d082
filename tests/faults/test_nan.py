"""A loss that is not finite on one rank stops every rank, names the sample, and has changed no weight."""

import pytest
import torch
from small_run import Case, SmallRun, zero_options

from proteingpt.training.loop import NonFiniteLoss

POISONED_STEP, POISONED_RANK = 2, 1


class PoisonedEncoders:
    """Gives one protein, from its n-th call on, a NaN: a sample as bad as any on a disk."""

    def __init__(self, encoders, good_calls: int):
        self.encoders, self.good_calls = encoders, good_calls
        self.poisoned = None

    def encode(self, proteins):
        structure, sequence = self.encoders.encode(proteins)
        self.good_calls -= 1
        if self.good_calls < 0:
            self.poisoned = proteins[0].key
            structure[0] = structure[0].clone()
            structure[0][0, 0] = float("nan")
        return structure, sequence


def train_into_nan(rank, device, case) -> dict:
    run = SmallRun(case)
    engine = run.engine()
    packs_before = sum(len(run.work(engine, rank, step).packs) for step in range(POISONED_STEP))
    num_packs = len(run.work(engine, rank, POISONED_STEP).packs)
    good_calls = packs_before + num_packs - 1 if rank.rank == POISONED_RANK else 10**6
    encoders = PoisonedEncoders(run.encoders, good_calls)
    before = {}

    def after_step(step: int):
        if step == POISONED_STEP:
            before.update(state=engine.get_state(), local=local_weights(engine))

    with pytest.raises(NonFiniteLoss) as raised:
        run.train(engine, rank, device, encoders=encoders, after_step=after_step)
    after = engine.get_state()
    return {
        "message": str(raised.value),
        "poisoned": encoders.poisoned,
        "on_this_rank": [pack.keys for pack in run.work(engine, rank, POISONED_STEP).packs],
        "same_state": all(torch.equal(after[k][n], v) for k, kind in before["state"].items() for n, v in kind.items()),
        "same_weights": all(torch.equal(a, b) for a, b in zip(before["local"], local_weights(engine), strict=True)),
        "finite": all(value.isfinite().all() for kind in after.values() for value in kind.values()),
    }


def local_weights(engine) -> list[torch.Tensor]:
    """Copies of what this rank computes with: whole parameters, or its share under ZeRO 3."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


# Packs of 600 tokens: one on each rank. A group a pack: three, of which the last of the poisoned rank's is bad.
@pytest.mark.parametrize("tokens_per_pack, num_packs", [(600, 1), (None, 2)], ids=["one", "several"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_every_rank_stops_before_the_update_and_names_the_samples(
    worlds, demo_assets, qwen2, zero, bf16, tokens_per_pack, num_packs
):
    stage = (("tokens_per_pack", tokens_per_pack),)
    case = Case(str(demo_assets), str(qwen2), "full", zero_options(zero), bf16, stage=stage)
    ranks = worlds(2)(train_into_nan, case)
    bad, good = ranks[POISONED_RANK], ranks[1 - POISONED_RANK]
    assert bad["poisoned"] and good["poisoned"] is None
    assert bad["message"] == good["message"]
    assert f"step {POISONED_STEP} " in good["message"]
    named = good["message"].split("with samples ")[1].split(";")[0].split(", ")
    assert len(bad["on_this_rank"]) == num_packs
    assert named == bad["on_this_rank"][-1] and bad["poisoned"] in named
    for rank in ranks:
        assert rank["same_state"] and rank["same_weights"] and rank["finite"]
