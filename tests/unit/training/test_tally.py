"""What a rank counts of itself, by hand."""

import pytest
import torch

from proteingpt.training.tally import RankReport, Tally, memory_bytes, mfu_of_all

CPU = torch.device("cpu")


def test_rates_are_over_the_time_since_the_last_report():
    """10 FLOPs a token, 100 an answer token, on a device of 1000 FLOP/s."""
    tally = Tally(CPU, (10.0, 100.0), peak=1000.0)
    tally.add(tokens=60, answers=2, seconds=1.5)
    tally.add(tokens=40, answers=3, seconds=0.5)
    first = tally.take()
    assert (first.tokens_per_second, first.flops) == (50.0, (100 * 10 + 5 * 100) / 2) and first.mfu == pytest.approx(
        0.75
    )
    tally.add(tokens=30, answers=0, seconds=1.0)
    assert (second := tally.take()).tokens_per_second == 30.0 and second.mfu == pytest.approx(0.3)
    assert tally.take().tokens_per_second == 0.0


def test_a_cpu_has_no_data_sheet_and_so_no_mfu():
    tally = Tally(CPU, (10.0, 100.0))
    tally.add(100, 1, 1.0)
    found = tally.take()
    assert found.device == "CPU" and found.mfu is None and found.flops is None and found.memory_total_gib is None


def test_a_device_whose_tokens_have_no_known_cost_has_none_either():
    tally = Tally(CPU, None, peak=1000.0)
    tally.add(100, 1, 1.0)
    assert tally.take().mfu is None


def test_of_all_devices_counts_what_they_could_do_together():
    fast, slow = (
        RankReport("GPU", "h", 1.0, flops, peak, 1.0, 80.0) for flops, peak in ((400.0, 1000.0), (270.0, 300.0))
    )
    assert mfu_of_all([fast, slow]) == pytest.approx(670 / 1300)
    assert mfu_of_all([fast, RankReport("CPU", "h", 1.0, None, None, 1.0, None)]) is None and mfu_of_all([]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the GPU's memory is shown")
def test_memory_is_the_peak_that_the_kernel_reports():
    with open("/proc/self/status") as status:
        kibibytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.05)
