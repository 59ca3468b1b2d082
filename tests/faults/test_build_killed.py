"""Builds that are killed, for real: they go on where they were and end with the bytes of one that was not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import content, killed_at

from proteingpt.data import crew
from proteingpt.data.build import build

REPOSITORY = Path(__file__).parents[2]
OPTIONS = dict(samples_per_shard=2, test_fraction=0.3)


def write_pdb(path: Path, num_residues: int) -> None:
    lines = [f"HEADER    TRANSPORT PROTEIN                       02-JAN-94   {path.stem.upper()}"]
    for number in range(1, num_residues + 1):
        for offset, name in enumerate(("N", "CA", "C")):
            lines.append(
                f"ATOM  {3 * number + offset:5d}  {name:<3s} ALA A{number:4d}    "
                f"{3.8 * number + offset:8.3f}{1.0:8.3f}{2.0:8.3f}{1.0:6.2f}{10.0:6.2f}           {name[0]}"
            )
    path.write_text("\n".join(lines + ["END", ""]))


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("structures")
    for n in range(1, 7):
        write_pdb(directory / f"{n}abc.pdb", 4 + n)
    (directory / "7bad.pdb").write_text("no structure\n")
    return directory


@pytest.fixture(scope="module")
def whole(structures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    build(structures, out, **OPTIONS)
    return content(out)


def build_and_die(structures: Path, out: Path, last_event: int) -> bool:
    def work():
        crew.BATCH_FILES = 2
        build(structures, out, **OPTIONS)

    return killed_at(last_event, out, work)


def test_killed_at_any_touch_of_a_file_a_build_ends_with_the_same_bytes(structures, whole, tmp_path):
    """At every point in turn, with one more kill at a random later start."""
    rng = random.Random(1)
    last_event = 0
    while True:
        last_event += 1
        out = tmp_path / f"out{last_event}"
        if not build_and_die(structures, out, last_event):
            break
        if last_event % 3 == 0 and not build_and_die(structures, out, rng.randrange(1, 40)):
            assert content(out) == whole, last_event
            continue
        try:
            build(structures, out, **OPTIONS)
        except ValueError as error:
            # It was killed when all was done but for the removal of what it had kept.
            assert "already holds shards" in str(error)
        assert content(out) == whole, f"killed at event {last_event}"
        shutil.rmtree(out)
    assert last_event > 50, "so few touches: the hook does not see the build"


def test_the_command_killed_at_random_times_goes_on(tmp_path):
    """The whole process group, two workers included, by SIGKILL."""
    structures, out = tmp_path / "structures", tmp_path / "out"
    structures.mkdir()
    for n in range(500):
        write_pdb(structures / f"{n:03d}a.pdb", 40 + n % 7)
    command = [sys.executable, "launch/build_shards.py", "--structures", structures, "--workers", "2", "--out"]
    rng = random.Random(2)
    kept = []
    for _ in range(2):
        process = subprocess.Popen(
            [*map(str, command), str(out)], cwd=REPOSITORY, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while process.poll() is None and len(list((out / ".build").glob("*.json"))) <= len(kept):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        kept = list((out / ".build").glob("*.json"))
    assert kept, "it was never killed midway"
    report = build(structures, out)
    assert 0 < report.num_continued < 500
    build(structures, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
