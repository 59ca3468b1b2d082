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
import ssh_nodes
from commands import REPOSITORY, environment, execute, workplace
from killing import content
from slurm_cluster import Cluster, missing
from ssh_nodes import ADDRESSES
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
        scalars = events.Scalars("learning/loss")
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


HOSTFILE = f"{ADDRESSES[0]} slots=2\n{ADDRESSES[1]} slots=1\n"


@pytest.mark.nightly
def test_unequal_slots_over_two_hosts_give_the_losses_of_one_host(tmp_path):
    """`deepspeed --hostfile` by pdsh and ssh, between two network namespaces. Gloo is told the device that joins them,
    as on any machine whose name is not its address, by DeepSpeed's own file for environments."""
    if lacking := ssh_nodes.missing():
        pytest.skip(f"two hosts cannot be made here: {lacking} missing")
    folder = workplace(tmp_path)
    (folder / "hosts").write_text(HOSTFILE)
    nodes = ssh_nodes.Nodes(tmp_path)
    single = execute(f"deepspeed --num_accelerators 3 launch/train.py {RECIPE} --output runs/one", folder)
    assert single.returncode == 0, single.stderr[-3000:]
    (folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={ssh_nodes.DEVICE}\nOMP_NUM_THREADS=1\n")
    try:
        nodes.start()
        launcher = (
            f"deepspeed --hostfile hosts --ssh_port {ssh_nodes.SSH_PORT} --no_ssh_check --master_addr {ADDRESSES[0]}"
        )
        done = execute(nodes.on_first(f"{launcher} launch/train.py {RECIPE} --output runs/two"), folder)
    finally:
        nodes.stop()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert losses(folder / "runs/two") == losses(folder / "runs/one")


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
    return cluster.submit(
        f"launch/slurm/{script}", arguments, options=options, cwd=folder, environment=environment() | variables
    )


def log_of(folder: Path, job: int) -> str:
    return "\n".join(path.read_text() for path in folder.glob(f"*-{job}*.log"))


@nightly
def test_a_mixed_job_trains_across_unlike_nodes_and_comes_back_after_a_stop(cluster, folder, expected):
    """One rank on each of two nodes. Rank 0's node comes last in the alphabet, as h100 after a100."""
    sizes = ["--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --gres=gpu:h100:1 --constraint=h100 --time=33"]
    sizes.append("--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --gres=gpu:a100:1 --constraint=a100")
    job = submit(cluster, folder, "train_mixed.sbatch", f"{RECIPE} --output runs/mixed", " : ".join(sizes))
    assert cluster.facts(job, "TimeLimit") == ["00:33:00"] * 2
    cluster.wait_for(lambda: list(folder.glob("runs/mixed/*/step-*")), 120)
    cluster.command(f"scancel --signal=USR1 {job}")
    cluster.wait_for(lambda: cluster.facts(job, "Restarts") == ["1", "1"], 60)
    # Mixed jobs are started by the backfill scheduler alone, which on an idle cluster looks again when a job has
    # changed.
    cluster.command(f"scontrol update job={job} StartTime=now")
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert losses(folder / "runs/mixed") == expected


@nightly
def test_a_job_that_is_told_to_stop_saves_goes_back_into_the_queue_and_ends_with_the_same_losses(
    cluster, folder, expected
):
    job = submit(cluster, folder, "train.sbatch", f"{RECIPE} --output runs/requeued", "--ntasks-per-node=2")
    cluster.wait_for(lambda: list(folder.glob("runs/requeued/*/step-*")), 120)
    cluster.command(f"scancel --signal=USR1 {job}")
    cluster.wait_for(lambda: "requeueing job" in log_of(folder, job), 60)
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert cluster.facts(job, "Restarts") == ["1"]
    assert losses(folder / "runs/requeued") == expected
    assert not list(folder.glob("requeues-*"))


def program(folder: Path, name: str, lines: str) -> str:
    """A shell script in the place of Python."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@nightly
def test_a_job_that_never_gets_anywhere_gives_up_and_its_tasks_have_their_cores(cluster, folder):
    """A run that always asks to be requeued, as one does whose time is over before its first checkpoint."""
    fruitless = program(folder, "fruitless", "echo cores: $SLURM_CPUS_PER_TASK\nexit 85")
    job = submit(
        cluster,
        folder,
        "train.sbatch",
        "--output runs/nowhere",
        "--cpus-per-task=3",
        PYTHON=fruitless,
        MAX_FRUITLESS="1",
    )
    assert cluster.wait(job) == "FAILED"
    assert cluster.facts(job, "Restarts") == ["1"]
    said = log_of(folder, job)
    assert "requeued 1 times without anything new in runs/nowhere: giving up" in said
    assert said.count("cores: 3") == 2


@nightly
def test_ranks_that_die_on_their_way_out_do_not_undo_a_saved_stop(cluster, folder):
    """RUN/requeue says that the run has saved; the second start finds it finished."""
    lines = '[ -z "$SLURM_RESTART_COUNT" ] && touch runs/marked/requeue && exit 70\nrm runs/marked/requeue'
    (folder / "runs/marked").mkdir(parents=True)
    job = submit(cluster, folder, "train.sbatch", "--output runs/marked", PYTHON=program(folder, "dies", lines))
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)
    assert cluster.facts(job, "Restarts") == ["1"]


@nightly
def test_tasks_of_an_array_whose_time_is_over_come_back_each_by_itself(cluster, folder):
    """SLURM's own time limit, of a minute, of which the signal takes all: each task is requeued once, and no task with
    it but itself, as its first one would by the number that it shares with the array."""
    slow = program(folder, "slow", '[ -z "$SLURM_RESTART_COUNT" ] && exec sleep 200\nexit 0')
    job = submit(cluster, folder, "cache_embeddings.sbatch", "--out shards/none", "--array=0-1 --time=1", PYTHON=slow)
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)
    assert cluster.facts(job, "Restarts") == ["1", "1"]


@nightly
@pytest.mark.parametrize(
    "script, option", [("train", "--output"), ("cache_embeddings", "--out"), ("evaluate", "--out")]
)
def test_a_job_without_its_place_is_refused_at_once(cluster, folder, script, option):
    job = submit(cluster, folder, f"{script}.sbatch", "--ds_config ds_configs/zero2.json")
    assert cluster.wait(job) == "FAILED" and f"give {option} DIR" in log_of(folder, job)


@nightly
def test_a_job_submitted_from_elsewhere_says_from_where(cluster, tmp_path):
    script = REPOSITORY / "launch/slurm/train.sbatch"
    job = cluster.submit(str(script), "--output runs/x", cwd=tmp_path, environment=environment())
    assert cluster.wait(job) == "FAILED" and "launch/slurm/common.sh: No such file" in log_of(tmp_path, job)


@nightly
def test_shards_are_built_by_a_job(cluster, folder, expected):
    structures = folder / "structures"
    structures.mkdir()
    shutil.copy(folder / "shards/demo/example.pdb", structures / "made.pdb")
    job = submit(cluster, folder, "build_shards.sbatch", "--structures structures --out shards/built", "--ntasks=2")
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert (folder / "shards/built/manifest.json").is_file()


@nightly
def test_a_model_is_evaluated_by_a_job(cluster, folder, expected):
    asked = "--model runs/deepspeed/model --data shards/demo --out report --proteins 2 --questions 2 --max-new-tokens 4"
    job = submit(cluster, folder, "evaluate.sbatch", asked, "--ntasks-per-node=2")
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert (folder / "report/index.html").is_file()


@nightly
def test_an_array_of_jobs_writes_the_bytes_of_one_run(cluster, folder, expected):
    """Three jobs at the same time, over both nodes, into one directory."""
    encoders = " ".join(f"--{name} {path}" for name, path in demo_encoders(folder).items())
    job = submit(
        cluster, folder, "cache_embeddings.sbatch", f"--data shards/demo --out shards/rows {encoders}", "--array=0-2"
    )
    assert cluster.wait(job) == "COMPLETED", log_of(folder, job)[-3000:]
    assert len(list(folder.glob(f"cache-embeddings-{job}_*.log"))) == 3
    done = execute(f"python launch/cache_embeddings.py --data shards/demo --out shards/alone {encoders}", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = content(folder / "shards/alone"), content(folder / "shards/rows")
    assert together == alone and "manifest.json" in alone


def demo_encoders(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in (folder / "shards/demo").rglob("*.pt")}
    return {
        "esm2": next(p for n, p in found.items() if "esm2" in n),
        "esm-if": next(p for n, p in found.items() if "if1" in n),
    }


def test_every_script_is_valid_bash_and_names_its_program():
    scripts = [*REPOSITORY.glob("launch/slurm/*"), *REPOSITORY.glob("launch/mpi/*")]
    assert len(scripts) >= 7
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        programs = set(re.findall(r"launch/(\w+\.py)", script.read_text())) - {"PROGRAM.py"}
        assert all((REPOSITORY / "launch" / program).is_file() for program in programs), script
