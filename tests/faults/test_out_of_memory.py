"""A forward that a rank has no memory for: the step is replayed with its packs shared out anew, and nothing is lost."""

import resource

import pytest
import torch
from small_run import Case, SmallRun, plain_losses, zero_options

from proteingpt.config import DevicesConfig
from proteingpt.data.plan import PlanError
from proteingpt.training.balance import Balance
from proteingpt.training.loop import OutOfMemory, RankFailed

RELATIVE = 1e-5
MEBIBYTE = 2**20
SMALL_RANK = 1


def data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024


def train_short_of_memory(rank, device, case, most_tokens: int, broken: bool = False, small=(SMALL_RANK,)) -> dict:
    """Each token of a forward takes a MiB beside, and the small ranks have room for most_tokens of them: so
    the kernel is told. broken: it raises something else instead."""
    run = SmallRun(case)
    engine = run.engine()
    forwards, failed = [], []

    def take(module, inputs):
        forwards.append(inputs[0].num_tokens)
        if rank.rank in small and broken:
            raise KeyError("a bug of that rank's")
        if rank.rank in small:
            held = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (most_tokens + 40) * MEBIBYTE, held[1]))
            try:
                torch.empty(inputs[0].num_tokens, MEBIBYTE, dtype=torch.uint8)
            except RuntimeError:
                failed.append(inputs[0].num_tokens)
                raise
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, held)

    engine.module.register_forward_pre_hook(take)
    balance = Balance(DevicesConfig(balance="equal"), device)
    try:
        recorder = run.train(engine, rank, device, balance=balance)
    except (PlanError, OutOfMemory, RankFailed, KeyError) as error:
        return {"raised": type(error).__name__, "said": str(error)}
    engine.close()
    done = {"losses": recorder.losses, "norms": recorder.grad_norms, "limits": balance.limits}
    return {**done, "forwards": forwards, "failed": failed}


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(zero="zero2"):
        stage = (("tokens_per_pack", 300), ("max_steps", 4))
        return Case(str(demo_assets), str(qwen2), "full", zero_options(zero), stage=stage, tokens_per_forward=900)

    return make


@pytest.fixture(scope="module")
def plain(make_case):
    return plain_losses(make_case())


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_its_limit_is_halved_and_the_step_replayed(worlds, make_case, plain, zero):
    """Packs of up to 300 tokens, up to three in a forward: more than about 350 tokens do not fit."""
    first, second = worlds(2)(train_short_of_memory, make_case(zero), 350)
    for done in (first, second):
        assert done["losses"] == pytest.approx(plain[0], rel=RELATIVE)
        assert done["norms"] == pytest.approx(plain[1], rel=RELATIVE)
        assert done["limits"] == [None, min(second["failed"]) // 2]
    assert all(tokens > 350 for tokens in second["failed"]) and not first["failed"]
    # Once it is known, the rank is given no more than that.
    after = second["forwards"][second["forwards"].index(second["failed"][-1]) + 1 :]
    assert after and max(after) <= second["limits"][SMALL_RANK]


def test_a_pack_that_fits_nowhere_ends_the_run_with_what_to_do(worlds, demo_assets, qwen2):
    """It is split no further."""
    case = Case(str(demo_assets), str(qwen2), "full", zero_options("zero2"), tokens_per_forward=600)
    for done in worlds(2)(train_short_of_memory, case, 60, False, (0, 1)):
        assert done["raised"] == "PlanError"
        assert "fits no rank" in done["said"] and "lower tokens_per_pack" in done["said"]


def test_a_rank_that_has_no_memory_even_for_what_it_repeats_in_silence_ends_the_run(worlds, make_case):
    """It would be given nothing, repeat the shortest pack all the same, and the step would be replayed for ever."""
    for done in worlds(2)(train_short_of_memory, make_case(), 10):
        assert done["raised"] == "OutOfMemory"
        assert "rank 1 has no memory for" in done["said"] and "leave the device out" in done["said"]


def test_another_error_of_one_rank_ends_both_and_none_waits(worlds, make_case):
    first, second = worlds(2)(train_short_of_memory, make_case(), 350, True)
    assert second["raised"] == "KeyError"
    assert first["raised"] == "RankFailed" and "rank 1 at step 0: KeyError" in first["said"]
