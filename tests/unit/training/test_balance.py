"""Speeds: known on every rank for every step before it is read, and soon right."""

import inspect
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import DevicesConfig
from proteingpt.data.loader import prefetch
from proteingpt.data.shares import assign
from proteingpt.training import balance as balance_module
from proteingpt.training.balance import DEVICE_SPEEDS, IGNORED, LAG, MEMORY, STAYS, Balance, behind, first_guess, steady

DEPTH = inspect.signature(prefetch).parameters["depth"].default


# ------------------------------------------------------------------------------------------------ what ranks run


def observe_and_agree(rank, device, config, rates, agreed=None, steps=range(30)) -> dict:
    """rates: of each rank in each step, tokens per second. Speeds by step as known at the end, and the state."""
    balance = Balance(config, device, agreed)
    in_force = {}
    for step in steps:
        in_force[step] = balance.speeds(step)
        balance.observe(int(rates[rank.rank][step]), 1.0)
        balance.exchange(step + 1)
    return {"in_force": in_force, "agreed": balance.agreed, "ahead": balance.speeds(steps[-1] + 1 + LAG)}


def train_with_a_slow_rank(rank, device, config, slow_from: int, num_steps: int) -> list[tuple[int, ...]]:
    """Steps of 24 packs of 100 tokens. Rank 1 falls to half the speed. Packs of each rank in each step."""
    balance, counts = Balance(config, device), []
    for step in range(num_steps):
        shares = assign([100] * 24, balance.speeds(step))
        counts.append(tuple(sum(map(len, share)) for share in shares))
        rate = 500.0 if rank.rank == 1 and step >= slow_from else 1000.0
        tokens = 100 * counts[-1][rank.rank]
        balance.observe(tokens, tokens / rate)
        balance.exchange(step + 1)
    return counts


def read_ahead(rank, device, num_steps: int, lag: int) -> tuple[dict, dict]:
    """The loop agrees after every step, while a thread reads ahead as far as it can. ({step: speeds that it was shared
    out by}, {step: speeds in force by all that was agreed})."""
    usual, balance_module.LAG = balance_module.LAG, lag
    balance = Balance(DevicesConfig(exchange_every_steps=1), device)
    used, everything = {}, list(balance.agreed)

    def make(step: int) -> int:
        used[step] = balance.speeds(step)
        return step

    for step in prefetch(make, 0, num_steps):
        while len(used) < min(num_steps, step + DEPTH + 2):  # the queue, one in the thread's hand, and this one
            time.sleep(0.001)
        balance.observe(100 * (step + 1), 1.0)
        balance.exchange(step + 1)
        everything += [entry for entry in balance.agreed[-1:] if entry not in everything]
    balance_module.LAG = usual
    return used, {step: [s for first, s in everything if first <= step][-1] for step in range(num_steps)}


# ------------------------------------------------------------------------------------------------------ agreement


MEASURED = DevicesConfig(exchange_every_steps=5)
STEADY = [[1000.0] * 60, [400.0] * 60]


def test_speeds_come_into_force_lag_steps_after_they_were_agreed(worlds):
    first, second = worlds(2)(observe_and_agree, MEASURED, STEADY)
    assert first == second
    assert all(first["in_force"][step] == [1.0, 1.0] for step in range(5 + LAG))
    assert all(first["in_force"][step] == [1000.0, 400.0] for step in range(5 + LAG, 30))
    assert [step for step, _ in first["agreed"]] == [0] + [step + LAG for step in (5, 10, 15, 20, 25, 30)]


def test_the_first_steps_are_not_looked_at(worlds):
    """They compile and allocate. Before anything else is measured nothing is agreed."""
    rates = [[1.0] * IGNORED + [1000.0] * 60, [2000.0] * 62]
    config = DevicesConfig(exchange_every_steps=IGNORED + 1)
    done = worlds(2)(observe_and_agree, config, rates, None, range(IGNORED + 1))
    assert done[0]["agreed"] == [(0, [1.0, 1.0]), (IGNORED + 1 + LAG, [1000.0, 2000.0])]
    nothing = worlds(2)(observe_and_agree, DevicesConfig(exchange_every_steps=1), rates, None, range(IGNORED))
    assert nothing[0]["agreed"] == [(0, [1.0, 1.0])]


@pytest.mark.parametrize("slow_step", range(2, 10))
def test_one_slow_step_moves_nothing(worlds, slow_step):
    """Such as one beside which a checkpoint was written."""
    rates = [[1000.0] * 60, [1000.0] * 60]
    rates[1][slow_step] = 10.0
    done = worlds(2)(observe_and_agree, MEASURED, rates)
    assert all(speeds in ([1.0, 1.0], [1000.0, 1000.0]) for _, speeds in done[0]["agreed"])


def test_steady_by_hand():
    assert steady([300.0]) == 300.0
    assert steady([10.0, 300.0]) == 300.0  # one of them may be slow for a reason of its own
    assert steady([300.0, 1.0, 900.0]) == 300.0  # of three the middle one
    assert steady([1.0, 100.0, 300.0, 900.0]) == 150.0  # twice as many tokens in 1/100 + 1/300 of the time
    assert steady([5.0, 6.0, 100.0, 300.0, 100.0, 300.0, 8000.0, 9000.0]) == 150.0  # of eight the middle four


speeds_seen = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=2 * MEMORY)


@given(speeds_seen, st.randoms(use_true_random=False))
def test_steady_lies_within_and_knows_no_order(rates, random):
    within = 1 + 1e-9
    assert min(rates) / within <= steady(rates) <= max(rates) * within
    shuffled = random.sample(rates, len(rates))
    assert steady(shuffled) == steady(rates)


@given(st.lists(st.floats(1.0, 1e6), min_size=2, max_size=MEMORY - 1), st.floats(1e-3, 1e12))
def test_one_step_alone_never_takes_the_speed_beyond_the_others(rates, strange):
    within = 1 + 1e-9
    assert min(rates) / within <= steady([*rates, strange]) <= max(rates) * within


def test_a_rate_that_changes_for_good_is_the_speed_within_the_memory(worlds):
    """Eight of the ten that are looked at: the two before are the fastest, and left out."""
    rates = [[1000.0] * 60, [1000.0] * 10 + [500.0] * 50]
    done = worlds(2)(observe_and_agree, DevicesConfig(exchange_every_steps=1), rates, None, range(18))
    before, last = [speeds for _, speeds in done[0]["agreed"][-2:]]
    assert before[0] == last[0] == 1000.0 and last[1] == 500.0 < before[1] < 600.0


@pytest.mark.parametrize("balance", ["equal", "fixed"])
def test_without_measuring_speeds_never_change_and_a_checkpoints_are_not_taken_over(worlds, balance):
    """Two CPUs are equal in the table of devices."""
    agreed = [(0, [5.0, 1.0]), (8, [4.0, 1.0])]
    done = worlds(2)(observe_and_agree, DevicesConfig(balance=balance), STEADY, agreed)
    assert done[0]["agreed"] == [(0, [1.0, 1.0])] and done[0]["ahead"] == [1.0, 1.0]


@pytest.mark.parametrize("saved_at", [5, 12, 23, 40])
@pytest.mark.parametrize("every", [1, 5])
def test_a_checkpoint_restores_the_speeds_of_every_step_after_it(worlds, saved_at, every):
    """Also those that were agreed but not yet in force, and after the way through JSON."""
    config = DevicesConfig(exchange_every_steps=every)
    rates = [[1000.0 + step for step in range(60)], [400.0 + step**2 for step in range(60)]]
    saved = worlds(2)(observe_and_agree, config, rates, None, range(saved_at))[0]["agreed"]
    saved = json.loads(json.dumps(saved))
    # What follows agrees on nothing new before those are all in force.
    silent = [[0.0] * 60] * 2
    restored = worlds(2)(observe_and_agree, config, silent, saved, range(saved_at, saved_at + LAG + 1))
    whole = worlds(2)(observe_and_agree, config, rates, None, range(saved_at + LAG + 1))[0]
    assert restored[0] == restored[1]
    assert restored[0]["in_force"] == {step: whole["in_force"][step] for step in restored[0]["in_force"]}


def test_speeds_of_another_number_of_ranks_are_dropped(worlds):
    agreed = [(0, [5.0, 1.0, 1.0]), (8, [4.0, 1.0]), (16, [3.0, 1.0, 1.0])]
    done = worlds(2)(observe_and_agree, MEASURED, STEADY, agreed, range(1))
    assert done[0]["agreed"] == [(8, [4.0, 1.0])] and done[0]["in_force"] == {0: [4.0, 1.0]}
    done = worlds(2)(observe_and_agree, MEASURED, STEADY, [agreed[0], agreed[2]], range(1))
    assert done[0]["agreed"] == [(0, [1.0, 1.0])]


def begin_with(rank, device, mode: str, measured_on) -> tuple:
    balance = Balance(DevicesConfig(balance=mode), device, [(0, [700.0, 100.0])], [None, 512], measured_on)
    return balance.speeds(3), balance.limits


def test_what_other_devices_reached_is_not_taken_for_these(worlds):
    """Ranks 0 and 1 have CPUs. An older checkpoint, which does not say what it had, is believed."""
    taken, fresh = [700.0, 100.0], [1.0, 1.0]
    world = worlds(2)
    assert world(begin_with, "measured", ["CPU", "CPU"])[0] == (taken, [None, 512])
    assert world(begin_with, "measured", None)[1] == (taken, [None, 512])
    assert world(begin_with, "measured", ["NVIDIA H100", "CPU"])[0] == (fresh, [None, 512])
    assert world(begin_with, "measured", ["CPU", "NVIDIA H100"])[1] == (fresh, [None, None])
    assert world(begin_with, "measured", ["CPU"] * 3)[0] == (fresh, [None, None])
    assert world(begin_with, "equal", ["CPU", "CPU"])[0] == (fresh, [None, 512])


def test_the_state_stays_small(worlds):
    rates = [[1000.0 + step for step in range(400)]] * 2
    done = worlds(2)(observe_and_agree, DevicesConfig(exchange_every_steps=1), rates, None, range(400))
    assert len(json.dumps(done[0]["agreed"])) < 1000


# --------------------------------------------------------------------------------------------------------- relief


@pytest.mark.parametrize("slow_from", [13, 14, 15, 16, 17])
def test_a_rank_that_slows_to_half_is_relieved_within_20_steps(worlds, slow_from):
    """24 packs: 12 each, and then 16 and 8."""
    for counts in worlds(2)(train_with_a_slow_rank, DevicesConfig(), slow_from, slow_from + 30):
        assert set(counts[:slow_from]) == {(12, 12)}
        assert set(counts[slow_from + 20 :]) == {(16, 8)}


def test_equal_shares_stay_equal_beside_a_slow_rank(worlds):
    counts = worlds(2)(train_with_a_slow_rank, DevicesConfig(balance="equal"), 10, 40)[0]
    assert set(counts) == {(12, 12)}


# ------------------------------------------------------------------------------------- behind its class, and limits


@pytest.mark.parametrize(
    "speeds, classes, wanted",
    [
        ([100, 100, 100, 40], "aaaa", [3]),
        ([100, 100, 100, 76], "aaaa", []),
        ([100, 40], "aa", [1]),
        ([100, 40], "ab", []),  # another kind of device: not slow, only slower
        ([100, 100, 40, 40, 20], "aabbb", [4]),
        ([100, 100, 10, 10], "aaaa", [2, 3]),
        ([5], "a", []),
    ],
)
def test_a_rank_is_behind_the_median_of_its_fellows(speeds, classes, wanted):
    assert behind(speeds, list(classes)) == wanted


def stay_behind(rank, device, rates) -> tuple[list, list]:
    balance, seen = Balance(DevicesConfig(exchange_every_steps=1), device), []
    for step, rate in enumerate(rates[rank.rank]):
        balance.observe(int(rate), 1.0, 4.0)
        exchanged = balance.exchange(step + 1)
        seen.append(exchanged and (exchanged.slow, exchanged.waiting))
    return seen


def test_a_rank_that_stays_behind_is_named_until_it_is_not(worlds):
    """Rates count from the third step on; then the middle of up to ten."""
    rates = [[1000.0] * 16, [520.0] * 8 + [1000.0] * 8]
    first, second = worlds(2)(stay_behind, rates)
    assert first == second and first[:IGNORED] == [None] * IGNORED
    slow = [one[0] for one in first[IGNORED:]]
    named = [n for n, ranks in enumerate(slow) if ranks]
    assert named[0] == STAYS - 1 and all(slow[n] == [1] for n in named)
    # Of six slow steps that are looked at and five fast ones, ten: three of the middle six are slow, which makes 684.
    # After one more it is two of six, and 764.
    assert named[-1] == 6 + 5 - 1
    assert first[-1][1] == [0.75, 0.75]  # one second of four is work


def tell(rank, device, balance: str) -> list:
    """(speeds, shares, told) of each exchange, and how often this rank was asked to tell."""
    made, asked = Balance(DevicesConfig(exchange_every_steps=3, balance=balance), device), []
    seen = []
    for step in range(12):
        made.observe(1000 if rank.rank == 0 else 250, 1.0)
        exchanged = made.exchange(step + 1, lambda: asked.append(step) or f"rank {rank.rank} at {step}")
        seen += [(exchanged.speeds, exchanged.shares, exchanged.told)] if exchanged else []
    return [*seen, len(asked)]


@pytest.mark.parametrize("balance", ["measured", "equal", "fixed"])
def test_what_ranks_tell_travels_with_their_speeds_also_where_those_change_nothing(worlds, balance):
    first, second = worlds(2)(tell, balance)
    assert first == second and first[-1] == 4
    speeds, shares, told = zip(*first[:-1])
    assert speeds == ([1000.0, 250.0],) * 4
    assert told == tuple([f"rank 0 at {step}", f"rank 1 at {step}"] for step in (2, 5, 8, 11))
    # By what is in force at that step: what was agreed after three steps counts from step 3 + LAG on.
    in_force = [[0.8, 0.2] if balance == "measured" and step >= 3 + LAG else [0.5, 0.5] for step in (3, 6, 9, 12)]
    assert list(shares) == [pytest.approx(share) for share in in_force]


def lower_and_share(rank, device, saved) -> tuple:
    balance = Balance(DevicesConfig(), device, None, saved)
    begun = list(balance.limits)
    balance.lower(1, 1000)
    once = list(balance.limits)
    balance.lower(1, 300)
    balance.lower(1, 5000)
    return begun, once, balance.limits, balance.limited([4096, 100]), balance.limited([None, None])


def test_a_limit_is_half_of_what_did_not_fit_and_never_rises(worlds):
    assert worlds(2)(lower_and_share, None)[0] == (
        [None, None], [None, 500], [None, 150], [4096, 100], [None, 150],
    )  # fmt: skip
    assert worlds(2)(lower_and_share, [70, None])[0][3] == [70, 100]
    assert worlds(2)(lower_and_share, [70, None, 9])[0][0] == [None, None]  # of another number of ranks


# ------------------------------------------------------------------------------------------------------ read ahead


def test_what_is_agreed_reaches_no_step_that_was_read_already(worlds):
    assert LAG > DEPTH
    for lag in (LAG, DEPTH + 1):
        used, in_force = worlds(1)(read_ahead, 40, lag)[0]
        assert used == in_force and len({tuple(speeds) for speeds in used.values()}) > 20


def test_one_step_less_would_be_too_few(worlds):
    """Or the test above would prove nothing."""
    used, in_force = worlds(1)(read_ahead, 40, DEPTH)[0]
    assert used != in_force


# ------------------------------------------------------------------------------------------------- the first guess


# LLM-Foundry's published table of 7B training: H100 10,643, A100-80 4,641, A100-40 3,679 tokens per second.
@pytest.mark.parametrize(
    "name, speed",
    [
        ("NVIDIA H100 80GB HBM3", 10_643.0),
        ("NVIDIA H100 PCIe", 10_643.0),
        ("NVIDIA A100-SXM4-80GB", 4_641.0),
        ("NVIDIA A100 80GB PCIe", 4_641.0),
        ("NVIDIA A100-SXM4-40GB", 3_679.0),
        ("NVIDIA A100-PCIE-40GB", 3_679.0),
        ("Another GPU", 1.0),
    ],
)
def test_devices_are_told_apart_by_the_names_that_their_driver_gives(monkeypatch, name, speed):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert first_guess(torch.device("cuda", 0)) == speed


def test_cpus_are_equal():
    assert first_guess(torch.device("cpu")) == 1.0
    assert all(speed > 1 for speed in DEVICE_SPEEDS.values())
