"""`detect`, fed with the environments that each launcher makes. The dicts hold what the launchers really set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import World

from proteingpt.distributed import LaunchError, Rank, Seat, check_seats, detect, first_host

DEEPSPEED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "gpu01", "MASTER_PORT": "29501",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "gpu02", "MASTER_PORT": "41235", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
}  # fmt: skip
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4242", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}  # fmt: skip


def without(env: dict, *names: str) -> dict:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    "env, rank",
    [
        ({}, Rank(0, 1, 0, "127.0.0.1", 29500, "none")),
        (DEEPSPEED, Rank(3, 4, 1, "gpu01", 29501, "deepspeed")),
        (TORCHRUN, Rank(5, 8, 1, "gpu02", 41235, "torchrun")),
        (OPENMPI, Rank(1, 2, 1, "127.0.0.1", 29500, "openmpi")),
        (MPICH, Rank(1, 2, 1, "127.0.0.1", 29500, "mpich")),
        (SRUN, Rank(3, 4, 1, "gpu08", 16242, "slurm")),
        (BATCH_SCRIPT, Rank(0, 1, 0, "127.0.0.1", 29500, "none")),
    ],
    ids=["none", "deepspeed", "torchrun", "openmpi", "mpich", "srun", "batch script outside srun"],
)
def test_each_launcher_is_recognised_by_what_it_sets(env, rank):
    assert detect({**env, "PATH": "/usr/bin"}) == rank


@pytest.mark.parametrize("env", [OPENMPI, MPICH, SRUN])
def test_an_address_that_the_user_exports_is_taken(env):
    rank = detect({**env, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (rank.master_addr, rank.master_port) == ("head", 1234)


@pytest.mark.parametrize("env", [DEEPSPEED, TORCHRUN])
def test_torch_variables_win_over_the_job_around_them(env):
    """deepspeed or torchrun as one srun task a node, or in a batch script."""
    alone = detect(env)
    assert detect({**BATCH_SCRIPT, **env}) == alone
    assert detect({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **env}) == alone


@pytest.mark.parametrize("env", [OPENMPI, {**MPICH, "PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALNRANKS": "8"}])
def test_mpirun_wins_over_the_srun_step_that_starts_its_daemons(env):
    """mpirun starts one daemon a node with srun; ranks inherit the daemon's SLURM_PROCID, which is a node's number."""
    daemons = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    assert detect({**daemons, **env}) == detect(env)


def test_srun_that_speaks_pmi_is_srun():
    """srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, but no local rank and no address: over two nodes, taking it for an
    mpirun on one node would put ranks 2 and 3 on GPUs 2 and 3 and let every node wait at its own loopback."""
    assert detect({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "12"}) == detect(SRUN)


def test_in_a_heterogeneous_job_rank_0_is_in_group_0_whatever_its_nodes_are_called():
    """As SLURM 22.05 set it for `srun --het-group=0,1` over h100-0 (two tasks, rank 0 first) and a100-0 (one)."""
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_NTASKS": "3",
        "SLURM_JOB_ID": "1",
        "SLURM_HET_SIZE": "2",
    }
    nodes = {
        "SLURM_STEP_NODELIST": "a100-0,h100-0",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "h100-0",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "a100-0",
    }
    ranks = [
        detect({**step, **nodes, "SLURM_PROCID": str(p), "SLURM_LOCALID": str(l)}) for p, l in enumerate([0, 1, 0])
    ]
    assert [rank.master_addr for rank in ranks] == ["h100-0"] * 3
    assert [(rank.rank, rank.local_rank) for rank in ranks] == [(0, 0), (1, 1), (2, 0)]


def test_jobs_that_share_a_node_do_not_share_a_port_and_stay_below_the_ports_linux_takes():
    ports = {detect({**SRUN, "SLURM_JOB_ID": str(job)}).master_port for job in range(990_000, 990_050)}
    assert len(ports) == 50 and min(ports) >= 1024 and max(ports) < 32768


def test_only_rank_0_is_first():
    assert [detect({**SRUN, "SLURM_PROCID": str(n)}).is_first for n in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(
    "env, said",
    [
        ({"RANK": "0"}, "WORLD_SIZE and LOCAL_RANK is not"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK is not"),
        (without(DEEPSPEED, "LOCAL_RANK"), "LOCAL_RANK is not"),
        ({**DEEPSPEED, "RANK": "4"}, "rank 4 of a world of 4, from deepspeed's"),
        ({**DEEPSPEED, "RANK": "-1"}, "rank -1"),
        ({**OPENMPI, "OMPI_COMM_WORLD_RANK": "2"}, "rank 2 of a world of 2, from openmpi's"),
        (without(OPENMPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not"),
        (without(MPICH, "PMI_RANK"), "PMI_RANK is not"),
        ({**SRUN, "SLURM_PROCID": "4"}, "rank 4 of a world of 4, from slurm's"),
    ],
)
def test_variables_that_contradict_themselves_are_refused(env, said):
    with pytest.raises(LaunchError, match=said):
        detect(env)


@pytest.mark.parametrize("env", [{**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}, {**MPICH, "PMI_SIZE": "4"}])
def test_mpirun_over_several_nodes_needs_an_address(env):
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=\$\(hostname\)"):
        detect(env)
    assert detect({**env, "MASTER_ADDR": "gpu01"}).world_size == 4


@pytest.mark.parametrize(
    "alone",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
    ],
    ids=["deepspeed --launcher slurm", "openmpi", "pmi"],
)
def test_tasks_of_srun_that_each_see_a_world_of_one_are_refused(alone):
    with pytest.raises(LaunchError, match="srun started 4 tasks but each sees a world of 1"):
        detect({**SRUN, **alone})
    assert detect({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", **alone}).world_size == 1


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("a,b", "a"),
        ("n1", "n1"),
        ("gpu-a100-[003,007]", "gpu-a100-003"),
        ("login,gpu[07-09]", "login"),
        ("rack[1-2]n[3,5],login", "rack1n3"),
        ("node[01-02]-ib", "node01-ib"),
        ("gpu[7]", "gpu7"),
        ("10.0.0.[3-5]", "10.0.0.3"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist, first):
    assert first_host(nodelist) == first


@given(st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), min_size=1, max_size=4))
def test_first_host_of_plain_names_is_the_first(names):
    assert first_host(",".join(names)) == names[0]


@pytest.mark.parametrize("nodelist", ["", ",a", "[1-2]"])
def test_a_node_list_without_a_name_is_refused_with_what_it_holds(nodelist):
    with pytest.raises(LaunchError, match="names no host"):
        first_host(nodelist)


def wait_on_rank(rank, device) -> str:
    """Collectives on tensors wait half a second here; rank 0 has something to do that takes two."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from proteingpt import distributed

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    assert distributed.on_first_rank(lambda: time.sleep(2) or "an index") == "an index"
    assert distributed.gather_objects(time.sleep(2 * rank.rank) or rank.rank) == [0, 1]
    try:
        distributed.sum_over_ranks([time.sleep(2 * rank.rank) or 1.0], device)
    except RuntimeError:
        return "timed out"
    return "in time"


def test_what_rank_0_does_alone_may_take_longer_than_a_collective_waits():
    """In a world of its own, since a collective that was left cannot be mended."""
    world = World(2)
    try:
        assert "timed out" in world(wait_on_rank)  # or the bound would not be there
    finally:
        world.kill()


# -------------------------------------------------------------------------------------------------- who sits where

ON_CPU, ON_GPU = Seat("n0", ""), Seat("n0", "GPU-a")


@pytest.mark.parametrize(
    "seats", [[ON_CPU] * 3, [ON_GPU, Seat("n0", "GPU-b"), Seat("n1", "GPU-c")], [ON_GPU, Seat("n1", "GPU-a")]]
)
def test_ranks_that_sit_well_are_let_through(seats):
    """CPUs are shared; the same name on another host is another GPU."""
    check_seats(seats)


@pytest.mark.parametrize(
    "seats, said",
    [
        ([ON_GPU, Seat("n0", "GPU-b"), ON_GPU], "ranks 0 and 2 sit on one GPU of n0: start one rank per GPU"),
        ([ON_GPU, Seat("n1", "")], r"rank 1 on n1 sees no GPU, rank 0 on n0 does: .*nvidia-smi"),
        ([Seat("n1", ""), Seat("n1", ""), ON_GPU], "rank 0 on n1 sees no GPU, rank 2 on n0 does"),
        ([ON_GPU, Seat("n0", "", "is number 1 on its node, where 1 is seen")], "rank 1 on n0 is number 1 on its node"),
    ],
)
def test_ranks_that_would_wait_for_each_other_for_ever_are_named(seats, said):
    with pytest.raises(LaunchError, match=said):
        check_seats(seats)
