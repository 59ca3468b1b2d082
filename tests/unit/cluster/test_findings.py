"""Findings from readings written by hand."""

import dataclasses
import re

import pytest

from proteingpt.cluster.findings import Reading, judge, table

H100 = Reading(
    rank=0, host="n0", device="NVIDIA H100 80GB HBM3", memory_gib=80, free_gib=79, disk_gib=500,
    versions={"torch": "2.13.0"}, clock=1000.0, matmul_tflops=650, all_reduce_gbps=180, latency_us=20, data="abc",
    data_error=None, read_mbps=900,
)  # fmt: skip
A100 = dataclasses.replace(
    H100, rank=1, host="n1", device="NVIDIA A100-PCIE-40GB", memory_gib=40, free_gib=39, matmul_tflops=230
)


def but(reading: Reading, **changes) -> Reading:
    return dataclasses.replace(reading, **changes)


def test_nothing_is_wrong_with_a_healthy_mixed_cluster():
    assert judge([H100, A100]) == []


def test_nothing_is_wrong_with_one_cpu():
    cpu = but(
        H100,
        device="CPU",
        matmul_tflops=0.05,
        free_gib=3,
        all_reduce_gbps=None,
        latency_us=None,
        data=None,
        read_mbps=None,
    )
    assert judge([cpu]) == []


@pytest.mark.parametrize(
    "second, said",
    [
        (but(A100, free_gib=30), r"rank 1 \(n1\): only 30 of 40 GiB of its NVIDIA A100-PCIE-40GB are free"),
        (but(A100, disk_gib=3), "n1: 3 GiB free where the run would write, 20 wanted"),
        (
            but(A100, data=None, data_error="No such file: x", read_mbps=None),
            r"rank 1 \(n1\) cannot read the shards: No such file",
        ),
        (but(A100, read_mbps=8), "n1 reads shards at 8 MB/s, 50 wanted"),
        (but(A100, matmul_tflops=90), "its NVIDIA A100-PCIE-40GB multiplies at 90 TFLOP/s, 29% of its data sheet"),
        (but(A100, versions={"torch": "2.12.0"}), "torch differs: 2.13.0 on ranks 0; 2.12.0 on ranks 1"),
        (
            but(A100, versions={"torch": "2.13.0", "deepspeed": "0.19.8"}),
            "deepspeed differs: absent on ranks 0; 0.19.8 on ranks 1",
        ),
        (but(A100, clock=1090.0), "the clocks of n1 and n0 are 90 s apart"),
        (but(A100, fault="OSError: gone"), r"rank 1 \(n1\) could not be measured, nor the links: OSError: gone"),
        (but(A100, data="other"), "the shards differ between n0 and n1"),
        (but(A100, all_reduce_gbps=0.11), "ranks exchange 0.11 GB/s, 1 wanted"),
    ],
)
def test_each_fault_is_named_alone(second, said):
    (finding,) = judge([H100, second])
    assert re.search(said, finding), finding


def test_one_of_a_kind_that_lags_behind_its_siblings_is_named():
    siblings = [but(H100, rank=n) for n in range(3)]
    slow = but(H100, rank=3, matmul_tflops=450)
    (finding,) = judge([*siblings, slow])
    assert "rank 3 (n0) multiplies at 4.5e+02 TFLOP/s, other NVIDIA H100 80GB HBM3s here at 6.5e+02" in finding


def test_a_fault_of_a_host_is_said_once_for_all_its_ranks():
    assert len(judge([but(H100, rank=n, disk_gib=1) for n in range(4)])) == 1


def test_the_table_has_a_line_for_each_rank_and_its_columns_meet():
    lines = table([H100, A100]).splitlines()
    assert len(lines) == 3
    assert all(line[lines[0].index("device") :].startswith(("device", "NVIDIA")) for line in lines)
