"""A rank that becomes slow, by work of its own: it is relieved, and named."""

import time

import torch.nn.functional as F
from small_run import Case, SmallRun, zero_options
from torch import nn

from proteingpt.config import DevicesConfig
from proteingpt.training.balance import Balance

SLOW_FROM, STEPS, SLOW_RANK = 8, 44, 1


def train_beside_a_slow_rank(rank, device, case, repeats: int) -> dict:
    """From SLOW_FROM on SLOW_RANK does every matrix product so many times more. Tokens computed in each step, and what
    the exchanges brought to light."""
    run = SmallRun(case)
    engine = run.engine()
    now, tokens = [0], [0] * STEPS

    def handicap(module, inputs, output):
        if now[0] >= SLOW_FROM and rank.rank == SLOW_RANK:
            for _ in range(repeats):
                F.linear(inputs[0].detach(), module.weight.detach())

    def count(module, inputs):
        tokens[now[0]] += inputs[0].num_tokens

    for module in engine.module.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(handicap)
    engine.module.register_forward_pre_hook(count)
    balance = Balance(DevicesConfig(exchange_every_steps=3), device)
    began = time.monotonic()
    recorder = run.train(engine, rank, device, after_step=lambda step: now.__setitem__(0, step), balance=balance)
    engine.close()
    exchanged = [(step, seen.speeds, seen.slow) for step, seen in recorder.exchanged]
    return {"tokens": tokens, "exchanged": exchanged, "samples": recorder.samples, "seconds": time.monotonic() - began}


def share(ranks, steps) -> float:
    """Of the tokens of these steps, those that SLOW_RANK computed."""
    sums = [sum(done["tokens"][step] for step in steps) for done in ranks]
    return sums[SLOW_RANK] / sum(sums)


def test_it_is_relieved_within_20_steps_and_named(worlds, demo_assets, qwen2):
    stage = (("tokens_per_pack", 200), ("samples_per_step", 24), ("max_steps", STEPS), ("epochs", 20))
    case = Case(str(demo_assets), str(qwen2), "projector", zero_options("zero2"), stage=stage)
    ranks = worlds(2)(train_beside_a_slow_rank, case, 60)
    assert ranks[0]["exchanged"] == ranks[1]["exchanged"] and ranks[0]["samples"] == ranks[1]["samples"]
    before, after = share(ranks, range(SLOW_FROM)), share(ranks, range(SLOW_FROM + 20, STEPS))
    assert after < 0.75 * before
    by_step = {step: (speeds, slow) for step, speeds, slow in ranks[0]["exchanged"]}
    last_speeds, last_slow = by_step[max(by_step)]
    assert last_speeds[SLOW_RANK] < 0.75 * last_speeds[1 - SLOW_RANK] and last_slow == [SLOW_RANK]
