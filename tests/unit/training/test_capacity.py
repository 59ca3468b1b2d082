"""What a device holds: the line by hand, the memory of this process, and a dry run that changes nothing learned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import Case, Recorder, SmallRun, zero_options

from proteingpt.config import ConfigError, DevicesConfig, from_dict
from proteingpt.training import capacity
from proteingpt.training.capacity import CapacityError, fit, free_in_container, free_on_host, peak_of, whole_packs

CPU = torch.device("cpu")


def test_the_line_by_hand():
    """10 GB of weights and 1 MB a token: 26 GB are 16,000 tokens."""
    assert fit([4000, 8000], [14e9, 18e9], 26e9) == 16_000
    assert fit([4000, 8000], [14e9, 18e9], 12e9) == 2000
    assert fit([4000, 8000], [14e9, 18e9], 9e9) == 0


def test_a_peak_that_did_not_grow_says_no_more_than_that_it_fitted():
    assert fit([4000, 8000], [14e9, 14e9], 26e9) == fit([4000, 8000], [14e9, 13e9], 26e9) == 8000


@given(st.integers(1, 10**6), st.integers(1, 2**20), st.integers(0, 2**40), st.integers(1, 10**5))
def test_what_is_found_fits_and_a_little_more_does_not(size, per_token, base, tokens):
    peaks = [base + per_token * n for n in (size, 2 * size)]
    found = fit([size, 2 * size], peaks, base + per_token * (tokens + 0.5))
    assert abs(found - tokens) <= 1 + tokens * 1e-6


def test_packs_are_counted_whole():
    assert [whole_packs(n, 1000) for n in (1000, 1999, 16_123)] == [1000, 1000, 16_000]
    with pytest.raises(CapacityError, match="a forward of 1000 tokens does not fit this device, about 999 would"):
        whole_packs(999, 1000)


def test_the_peak_of_a_process_is_what_it_held_in_between():
    """256 MB that are gone when it is asked."""
    before = capacity.of_process("VmRSS")
    peak = peak_of(lambda: torch.ones(2**26).sum(), CPU)
    assert 2**28 - 2**24 < peak - before < 2**28 + 2**26  # the allocator gives back a little of what was there before
    assert capacity.of_process("VmRSS") - before < 2**26
    assert peak_of(lambda: None, CPU) < peak - 2**27, "the peak before is forgotten"


def test_a_container_leaves_what_is_between_its_limit_and_its_use(tmp_path):
    assert free_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_in_container(tmp_path) == [4000]
    (tmp_path / "memory.current").write_text("5001\n")
    assert free_in_container(tmp_path) == [0]
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("700")
    (old / "memory.usage_in_bytes").write_text("300")
    assert free_in_container(tmp_path / "old") == [400]


def test_ranks_of_a_host_share_what_is_free():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_on_host() <= total
    alone, third = (capacity.memory_budget(CPU, ranks) - capacity.of_process("VmRSS") for ranks in (1, 3))
    assert third == pytest.approx(alone / 3, rel=0.2)


def test_the_setting_is_a_number_auto_or_null():
    assert [from_dict(DevicesConfig, {"tokens_per_forward": v}).tokens_per_forward for v in (None, "auto", 5)] == [
        None, "auto", 5,
    ]  # fmt: skip
    either = "an int or auto"
    for value, expected in (("car", either), (2.5, either), (True, either), (0, "> 0, auto")):
        with pytest.raises(ConfigError, match=f"tokens_per_forward is {value!r}, expected {expected}"):
            from_dict(DevicesConfig, {"tokens_per_forward": value})


# ------------------------------------------------------------------------------------------------ what ranks run


def train_after_dry_run(rank, device, case: Case, dry: bool) -> dict:
    """A run of four steps, behind a dry run or not. Losses, gradient norms, the state, and what was measured."""
    run = SmallRun(case)
    engine = run.engine()
    torch.manual_seed(5)
    found = capacity.agreed("auto" if dry else None, engine, run.encoders, run.plan, device)
    drawn = torch.rand(3)
    recorder: Recorder = run.train(engine, rank, device)
    state = engine.get_state()
    engine.close()
    return {"losses": recorder.losses, "norms": recorder.grad_norms, "drawn": drawn, "state": state, "found": found}


@pytest.mark.parametrize("train", ["projector", "full"])
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_dry_run_changes_nothing_learned(worlds, demo_assets, qwen2, zero, train):
    """To the last bit, on two ranks: losses, gradients, weights, moments and the random state."""
    case = Case(str(demo_assets), str(qwen2), train, zero_options(zero), stage=(("max_steps", 4),))
    without, behind = (worlds(2)(train_after_dry_run, case, dry) for dry in (False, True))
    for plain, dry in zip(without, behind):
        assert plain["found"] == [None, None]
        assert all(tokens >= 600 and tokens % 600 == 0 for tokens in dry["found"])
        assert dry["losses"] == plain["losses"] and dry["norms"] == plain["norms"]
        assert torch.equal(dry["drawn"], plain["drawn"])
        for kind, tensors in plain["state"].items():
            assert all(torch.equal(dry["state"][kind][name], value) for name, value in tensors.items())


class Full:
    """Encoders on a device that has no memory left for them."""

    def encode(self, proteins):
        raise torch.OutOfMemoryError("no memory")


def measure_in_a_small_device(rank, device, case: Case):
    run = SmallRun(case)
    engine = run.engine()
    try:
        capacity.agreed("auto", engine, Full() if rank.rank == 1 else run.encoders, run.plan, device)
    except CapacityError as error:
        return str(error)
    finally:
        engine.close()


def test_a_device_too_small_for_a_pack_is_named_on_all_ranks(worlds, demo_assets, qwen2):
    case = Case(str(demo_assets), str(qwen2), "projector", zero_options("zero2"))
    first, second = worlds(2)(measure_in_a_small_device, case)
    assert first == second and first.startswith("rank 1 on ") and "a forward of 600 tokens does not fit" in first


def measure(rank, device, case: Case):
    run = SmallRun(case)
    engine = run.engine()
    found = capacity.agreed("auto", engine, run.encoders, run.plan, device)
    engine.close()
    return found, sorted(run.data.set_aside.reasons)


def damage(directory: Path, sample: int):
    """A bit of its coordinates."""
    record = json.loads((directory / "train-00000.index.jsonl").read_text().splitlines()[sample])
    content = bytearray((directory / "train-00000.tar").read_bytes())
    content[record["members"]["backbone.npy"][0] + 200] ^= 8
    (directory / "train-00000.tar").write_bytes(content)


def test_packs_that_cannot_be_read_are_measured_by_others(worlds, demo_assets, qwen2, tmp_path):
    """All of the first step's largest pack, so that both forwards of the dry run lack it."""
    directory = tmp_path / "damaged"
    shutil.copytree(demo_assets, directory)
    case = Case(str(directory), str(qwen2), "projector", zero_options("zero2"))
    run = SmallRun(case)
    packs, tokens = run.plan.packs(0)
    bad = sorted({sample for sample, _ in packs[tokens.index(max(tokens))]})
    for sample in bad:
        damage(directory, sample)
    for found, reasons in worlds(2)(measure, case):
        assert len(found) == 2 and all(tokens >= 600 and tokens % 600 == 0 for tokens in found)
        assert set(reasons) >= {run.shards.keys[sample] for sample in bad}
