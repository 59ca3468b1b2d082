"""The rates are what they are said to be; what is measured, and what cannot be, is told."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, execute

from proteingpt.cluster import preflight


def test_the_matmul_rate_counts_two_operations_for_each_product(monkeypatch):
    """One product of 1024 x 1024 matrices a second is 2 x 1024^3 operations a second."""
    monkeypatch.setattr(preflight, "seconds_each", lambda action, device, repeats: 1.0)
    assert preflight.matmul_rate(torch.device("cpu")) == pytest.approx(2 * 1024**3 / 1e12)


def test_alone_it_measures_this_machine_and_says_so(tmp_path, capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "a.tar").write_bytes(bytes(2**20))
    assert preflight.main(["--data", str(tmp_path), "--output", str(tmp_path / "runs" / "x"), "--json"]) in (0, 1)
    (reading,) = json.loads(capfd.readouterr().out.splitlines()[-1])["readings"]
    assert reading["device"] == "CPU" and reading["matmul_tflops"] > 0 and reading["read_mbps"] > 0
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    assert reading["memory_gib"] == pytest.approx(total / 2**20)
    assert reading["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_shards_that_are_not_there_are_named_and_the_exit_code_says_so(tmp_path, capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert preflight.main(["--data", str(tmp_path / "none")]) == 1
    assert "wrong: rank 0" in (printed := capfd.readouterr().out) and str(tmp_path / "none") in printed


def test_a_rank_that_cannot_measure_itself_is_named_with_the_reason(tmp_path, capfd, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "a.tar").mkdir()  # an unreadable shard, of a kind that nobody thought of
    assert preflight.main(["--data", str(tmp_path)]) == 1
    assert re.search(
        r"wrong: rank 0 \(.*\) could not be measured, nor the links: IsADirectoryError", capfd.readouterr().out
    )


@pytest.mark.nightly
def test_a_disk_that_hangs_ends_it_with_what_it_was_doing(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")  # to be read, it waits for a writer, who never comes
    done = execute(f"python launch/preflight.py --data {tmp_path} --seconds 3", REPOSITORY)
    assert done.returncode == 1
    assert f"has been reading {tmp_path} for 3 s" in done.stderr
