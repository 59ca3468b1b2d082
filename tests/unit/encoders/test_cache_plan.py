"""What a cache takes and whether it pays, by hand and against tarfile."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.cluster.spec import parse_cluster
from proteingpt.config import ConfigError
from proteingpt.encoders.cache_plan import estimate, format_estimate, jobs_of, rates_by_kind, tar_bytes
from proteingpt.encoders.rows_file import num_bytes

WIDTHS = {"structure": 512, "sequence": 2560}


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_the_size_of_a_tar_is_what_tarfile_writes(sizes):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{number}.safetensors")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    assert tar_bytes(sizes) == len(file.getvalue())


def test_jobs_are_the_data_shards_by_hand():
    jobs = jobs_of("train", ["a_A", "b_A", "c_A"], [3, 5, 2], [0, 0, 1], WIDTHS, "bfloat16")
    assert [job[:5] for job in jobs] == [("train-00000", "train", 0, 2, 8), ("train-00001", "train", 2, 3, 2)]
    # 2 bytes x 3,072 columns x (residues + 2), and a header
    assert num_bytes("a_A", 3, WIDTHS, "bfloat16") - 5 * 6144 < 320
    assert jobs_of("test", [], [], [], WIDTHS, "float32") == []


def test_the_papers_data_take_the_244_gb_of_the_design():
    """132,092 proteins of 300 residues, 6,144 bytes for each row."""
    one = num_bytes("1abc_A", 300, WIDTHS, "bfloat16")
    assert 132_092 * one == pytest.approx(132_092 * 302 * 6144, rel=2e-4) and 244e9 < 132_092 * one < 246e9


def test_rates_of_a_cluster_are_measured_or_given_or_scaled_and_it_is_said_which():
    kinds = parse_cluster("2xH100-80,3xA100-40").kinds  # trained at 46 % of 989 and 51 % of 312 TFLOP/s
    rates, (first, second) = rates_by_kind(
        kinds, None, [("NVIDIA H100 80GB HBM3", 900.0), ("NVIDIA H100 80GB HBM3", 1100.0)]
    )
    assert rates == [1000.0] * 2 + [pytest.approx(1000 * 0.51 * 312 / (0.46 * 989))] * 3
    assert first == "2 x H100-80 at 1,000, measured now"
    assert second == "3 x A100-40 at 350, assumed: that of H100-80 by the rates of training"
    both = [("NVIDIA H100 80GB HBM3", 1000.0), ("NVIDIA A100-SXM4-40GB", 400.0)]
    assert rates_by_kind(kinds, None, both)[0] == [1000.0] * 2 + [400.0] * 3
    assert rates_by_kind(kinds, [7.0, 5.0], [])[0] == [7.0] * 2 + [5.0] * 3
    with pytest.raises(ConfigError, match="--rates has 1 rates for the 2 kinds of --cluster"):
        rates_by_kind(kinds, [7.0], [])
    with pytest.raises(
        ConfigError, match=r"no rate for H100-80: the device here \(CPU\) is none .* Give --rates, one for each kind"
    ):
        rates_by_kind(kinds, None, [("CPU", 3.0)])


def test_hours_by_hand():
    """Two ranks of 1,000 and 500 residues/s: 1,500. 5.4 million in train, 2.7 million in test."""
    found = estimate(7, {"train": 5_400_000, "test": 2_700_000}, [1000, 500], epochs=3)
    assert found == (7, 1.5, 1.0, 3.0) and found.cache_is_better
    once = estimate(7, {"train": 5_400_000, "test": 2_700_000}, [1000, 500], epochs=1)
    assert once.hours_live == 1.0 and not once.cache_is_better
    often = estimate(7, {"train": 5_400_000, "test": 2_700_000}, [1000, 500], epochs=1, readings_per_epoch=30)
    assert often.hours_live_per_epoch == 30.0 and often.cache_is_better
    assert "cache them (saves 1.5 hours)" in format_estimate(found, 3, 2)
    assert "let them run with the training (saves 0.5 hours)" in format_estimate(once, 1, 2)
