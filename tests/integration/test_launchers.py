"""One recipe through every launcher, and real SLURM jobs: the losses are those of `deepspeed` to the last digit.

SLURM runs for real (tests/slurm_cluster.py); where it is not installed its tests say so and are skipped.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, environment, execute, workplace
from slurm_cluster import Cluster, missing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RECIPE = (
    "--ds_config ds_configs/zero2.json --demo.num_proteins 20 --evaluation.num_proteins 4 --align.max_steps 3 "
    "--instruct.samples_per_step 16 --instruct.max_steps 12 --checkpoint.every_steps 2 --devices.balance equal"
)
OPEN_MPI = shutil.which("mpirun.openmpi")  # Debian's, beside which the wheel's mpirun is MPICH's
LAUNCHERS = {
    "torchrun": "torchrun --standalone --nproc-per-node 2 launch/train.py",
    "mpich": "launch/mpi/run.sh -n 2 -- launch/train.py",
    "openmpi": f"MPIRUN={OPEN_MPI} launch/mpi/run.sh --oversubscribe -n 2 -- launch/train.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def expected(folder) -> list[float]:
    """The losses of both stages under the deepspeed launcher."""
    done = execute(f"deepspeed --num_accelerators 2 launch/train.py {RECIPE} --output runs/deepspeed", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder / "runs/deepspeed")


def losses(run: Path) -> list[float]:
    """As TensorBoard keeps them, in fp32, at steps 1, 2, ... of each stage."""
    values = []
    for stage, num_steps in (("align", 3), ("instruct", 12)):
        events = EventAccumulator(str(run / "tensorboard" / stage))
        events.Reload()
        scalars = events.Scalars("loss")
        assert [scalar.step for scalar in scalars] == list(range(1, num_steps + 1))
        values += [scalar.value for scalar in scalars]
    return values


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_losses(folder, expected, launcher):
    if launcher == "openmpi" and OPEN_MPI is None:
        pytest.skip("Open MPI (mpirun.openmpi) is not installed")
    done = execute(f"{LAUNCHERS[launcher]} {RECIPE} --output runs/{launcher}", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder / "runs" / launcher) == expected


@pytest.mark.nightly
def test_preflight_under_a_launcher_lists_every_rank(folder, expected):
    done = execute("launch/mpi/run.sh -n 2 -- launch/preflight.py --data shards/demo --json", folder)
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert [reading["rank"] for reading in said["readings"]] == [0, 1]
    assert all(reading["all_reduce_gbps"] > 0 and reading["data"] for reading in said["readings"])
    assert (done.returncode == 0) == (said["findings"] == [])


# -------------------------------------------------------------------------------------------------------------- SLURM

nightly = pytest.mark.nightly


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing():
        pytest.skip(f"SLURM cannot run here: {', '.join(missing())} missing")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def submit(cluster, folder, script: str, arguments: str, options: str = "", **variables: str) -> int:
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return cluster.submit(f"launch/slurm/{script}", arguments, options=options, cwd=folder, environment=environment() | variables)


def log_of(folder: Path, job: int) -> str:
    return "\n".join(path.read_text() for path in folder.glob(f"*-{job}*.log"))


@nightly
def test_a_mixed_job_trains_across_unlike_nodes(cluster, folder, expected):
    """One rank on each of two nodes. Rank 0's node comes last in the alphabet, as h100 after a100."""
    options = "--nodes=1 --ntasks-per-node=1 --gres=gpu:h100:1 --constraint=h100 : --nodes=1 --ntasks-per-node=1 --gres=gpu:a100:1 --constraint=a100"
    job = submit(cluster, folder, "train_mixed.sbatch", f"{RECIPE} --output runs/mixed", options)
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert losses(folder / "runs/mixed") == expected


@nightly
def test_a_job_that_is_told_to_stop_saves_goes_back_into_the_queue_and_ends_with_the_same_losses(cluster, folder, expected):
    job = submit(cluster, folder, "train.sbatch", f"{RECIPE} --output runs/requeued", "--ntasks-per-node=2")
    cluster.wait_for(lambda: list(folder.glob("runs/requeued/*/step-*")), 120)
    cluster.command(f"scancel --signal=USR1 {job}")
    cluster.wait_for(lambda: "requeueing job" in log_of(folder, job), 60)
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert re.search(r"Restarts=1\b", cluster.command(f"scontrol show job {job}"))
    assert losses(folder / "runs/requeued") == expected


@nightly
def test_a_job_that_never_gets_anywhere_gives_up(cluster, folder):
    """A run that always asks to be requeued, as one does whose time is over before its first checkpoint."""
    fruitless = folder / "fruitless"
    fruitless.write_text("#!/bin/sh\nexit 85\n")
    fruitless.chmod(0o755)
    (folder / "runs/nowhere").mkdir(parents=True)
    job = submit(cluster, folder, "train.sbatch", "--output runs/nowhere", PYTHON=str(fruitless), MAX_FRUITLESS="1")
    assert cluster.wait(job) == "FAILED"
    assert re.search(r"Restarts=1\b", cluster.command(f"scontrol show job {job}"))
    assert "requeued 1 times without a new checkpoint in runs/nowhere: giving up" in log_of(folder, job)


@nightly
def test_a_job_without_an_output_is_refused_at_once(cluster, folder):
    job = submit(cluster, folder, "train.sbatch", "--ds_config ds_configs/zero2.json")
    assert cluster.wait(job) == "FAILED" and "give --output DIR" in log_of(folder, job)


@nightly
def test_shards_are_built_and_their_rows_cached_by_jobs(cluster, folder, expected):
    """build_shards.sbatch and cache_embeddings.sbatch, on two ranks each."""
    structures = folder / "structures"
    structures.mkdir()
    shutil.copy(folder / "shards/demo/example.pdb", structures / "made.pdb")
    job = submit(cluster, folder, "build_shards.sbatch", "--structures structures --out shards/built", "--ntasks=2")
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert (folder / "shards/built/manifest.json").is_file()
    encoders = " ".join(f"--{name} {path}" for name, path in demo_encoders(folder).items())
    job = submit(cluster, folder, "cache_embeddings.sbatch", f"--data shards/demo --out shards/rows {encoders}", "--ntasks-per-node=2")
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert (folder / "shards/rows/manifest.json").is_file()


def demo_encoders(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in (folder / "shards/demo").rglob("*.pt")}
    return {"esm2": next(p for n, p in found.items() if "esm2" in n), "esm-if": next(p for n, p in found.items() if "if1" in n)}


def test_every_script_is_valid_bash_and_names_its_program():
    scripts = [*REPOSITORY.glob("launch/slurm/*"), *REPOSITORY.glob("launch/mpi/*")]
    assert len(scripts) >= 7
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        programs = set(re.findall(r"launch/(\w+\.py)", script.read_text())) - {"PROGRAM.py"}
        assert all((REPOSITORY / "launch" / program).is_file() for program in programs), script
