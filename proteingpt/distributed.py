"""Who am I among the ranks, and the few collectives the trainer uses.

`detect` is a pure function of the environment and knows every launcher: deepspeed, torchrun, mpirun (Open MPI, MPICH,
Intel MPI), srun, or none. The collectives are no-ops of one rank, and every rank calls them unconditionally.
"""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from datetime import timedelta

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
COLLECTIVE_SECONDS = 1800.0  # torch's own bound for gloo, and three times its bound for NCCL
# For values and for what rank 0 does alone: a first index of a very large set, a checkpoint that is verified, take
# their time.
PATIENT_SECONDS = 86400.0

_patient = None  # the group of those collectives: gloo, also beside NCCL, which would spin on the GPU meanwhile


class LaunchError(ValueError):
    """The launcher's environment contradicts itself."""


@dataclass(frozen=True)
class Rank:
    """This process among `world_size`; local_rank is its number on its own node, and so its GPU."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0


# Launchers that start one process a rank and number them in variables of their own: name -> (marker, rank, world size,
# local rank, local size). Intel MPI speaks MPICH's PMI.
MPI_VARIABLES = {
    "openmpi": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def detect(env: Mapping[str, str]) -> Rank:
    """This process's place, from the environment that its launcher made. LaunchError where it contradicts itself."""
    if "RANK" in env or "WORLD_SIZE" in env:
        rank = from_torch_variables(env)
    elif is_srun_task(env):
        rank = from_slurm(env)
    elif any(marker in env for marker, *_ in MPI_VARIABLES.values()):
        rank = from_mpi(env)
    else:
        rank = Rank(0, 1, 0, LOOPBACK, DEFAULT_PORT, "none")
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in env else 1
    if rank.world_size == 1 and num_tasks > 1:
        raise LaunchError(
            f"srun started {num_tasks} tasks but each sees a world of 1: {num_tasks} separate runs would write to one "
            "place; start one task per GPU with srun python launch/..., without another launcher in between"
        )
    if not 0 <= rank.rank < rank.world_size:
        raise LaunchError(f"rank {rank.rank} of a world of {rank.world_size}, from {rank.launcher}'s variables")
    return rank


def from_torch_variables(env: Mapping[str, str]) -> Rank:
    """deepspeed and torchrun set the same variables."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in env]
    if missing:
        raise LaunchError(f"RANK or WORLD_SIZE is set but {' and '.join(missing)} is not: unset them or use a launcher")
    return Rank(
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        local_rank=int(env["LOCAL_RANK"]),
        master_addr=env.get("MASTER_ADDR", LOOPBACK),
        master_port=int(env.get("MASTER_PORT", DEFAULT_PORT)),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed",
    )


def from_mpi(env: Mapping[str, str]) -> Rank:
    name = next(name for name, (marker, *_) in MPI_VARIABLES.items() if marker in env)
    rank, world_size, local_rank, local_size = (env.get(variable) for variable in MPI_VARIABLES[name][1:])
    if rank is None:
        raise LaunchError(f"{MPI_VARIABLES[name][2]} is set but {MPI_VARIABLES[name][1]} is not: is this under mpirun?")
    one_node = local_size is None or local_size == world_size
    if "MASTER_ADDR" not in env and not one_node:
        raise LaunchError(
            "mpirun over several nodes tells no rank where rank 0 is: add -x MASTER_ADDR=$(hostname) (Open MPI) or "
            "-genv MASTER_ADDR $(hostname) (MPICH) on the node of rank 0"
        )
    return Rank(
        rank=int(rank),
        world_size=int(world_size),
        local_rank=int(rank if local_rank is None else local_rank),
        master_addr=env.get("MASTER_ADDR", LOOPBACK),
        master_port=int(env.get("MASTER_PORT", DEFAULT_PORT)),
        launcher=name,
    )


def is_srun_task(env: Mapping[str, str]) -> bool:
    """Whether srun itself numbered this process. With --mpi=pmi2 it sets PMI's variables too, to the same values; under
    an mpirun inside a job the tasks are its daemons, one a node, and the numbers differ."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or "OMPI_COMM_WORLD_SIZE" in env:
        return False
    pairs = (("PMI_SIZE", "SLURM_STEP_NUM_TASKS"), ("PMI_RANK", "SLURM_PROCID"))
    return all(env.get(pmi) in (None, env.get(slurm)) for pmi, slurm in pairs)


def from_slurm(env: Mapping[str, str]) -> Rank:
    """One srun task a rank. Inside a batch script but outside srun there is no step, and so no ranks."""
    job = int(env.get("SLURM_JOB_ID", 0))
    # A step's list is in alphabetical order. In a heterogeneous job rank 0 is on the first node of group 0, whatever
    # its name; elsewhere the first in the alphabet is the first.
    lists = ("SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((env[name] for name in lists if env.get(name)), LOOPBACK)
    return Rank(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        master_addr=env.get("MASTER_ADDR", first_host(nodes)),
        # Jobs that share a node must not share a port; below 32768, where Linux takes ports for outgoing connections.
        master_port=int(env.get("MASTER_PORT", 12000 + job % 20000)),
        launcher="slurm",
    )


def first_host(nodelist: str) -> str:
    """First name of a SLURM node list: `gpu[07-09,12],login` -> `gpu07`, `rack[1-2]n[3,5]` -> `rack1n3`."""
    first = re.match(r"[^\[\],](?:[^\[\],]|\[\w[^\]]*\])*", nodelist)
    if not first:
        raise LaunchError(f"SLURM's node list {nodelist!r} names no host")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


# ------------------------------------------------------------------------------------------------------ collectives


def start(rank: Rank, timeout_seconds: float = COLLECTIVE_SECONDS):
    """Join the process group (NCCL on GPUs, gloo on CPUs) and choose this rank's device. Returns the device.

    timeout_seconds: of collectives on tensors, for which all ranks come at about the same time; the others wait
    PATIENT_SECONDS.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    seat = seat_of(rank)
    # Where the launcher shows each rank its own GPU alone (srun --gpus-per-task=1), that is number 0.
    local_rank = 0 if on_gpu and torch.cuda.device_count() == 1 else rank.local_rank
    if on_gpu and not seat.fault:
        torch.cuda.set_device(local_rank)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads its device from here
    options = {"backend": "nccl" if on_gpu else "gloo", "timeout": timedelta(seconds=timeout_seconds)}
    if rank.world_size == 1:
        # No port, so that single-process runs never collide.
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    else:
        # By the environment, since torchrun has opened the port already and says so in a variable of its own.
        os.environ |= {"MASTER_ADDR": rank.master_addr, "MASTER_PORT": str(rank.master_port)}
        try:
            limit = timedelta(seconds=timeout_seconds)
            store, *_ = next(dist.rendezvous("env://", rank.rank, rank.world_size, timeout=limit))
            check_seats(all_seats(store, rank, seat))
            dist.init_process_group(**options, store=store, rank=rank.rank, world_size=rank.world_size)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise LaunchError(
                f"port {rank.master_port} of {rank.master_addr} is in use, by another run or program: end it, or "
                "choose another (deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N)"
            ) from None
    global _patient
    _patient = (
        None if rank.world_size == 1 else dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENT_SECONDS))
    )
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


@dataclass(frozen=True)
class Seat:
    """Where a rank sits. gpu: the device's own name for itself, empty on a CPU. fault: why it cannot sit there."""

    host: str
    gpu: str
    fault: str = ""


def seat_of(rank: Rank) -> Seat:
    import torch

    number, seen = rank.local_rank, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen > 1 and number >= seen:
        return Seat(
            socket.gethostname(), "", f"is number {number} on its node, counted from 0, where {seen} GPUs are seen"
        )
    gpu = str(torch.cuda.get_device_properties(0 if seen == 1 else number).uuid) if seen else ""
    return Seat(socket.gethostname(), gpu)


def all_seats(store, rank: Rank, mine: Seat) -> list[Seat]:
    """Of every rank. Through the store that they meet at, before any talks to another in its device's own way."""
    store.set(f"seat/{rank.rank}", json.dumps(astuple(mine)))
    told = store.multi_get([f"seat/{n}" for n in range(rank.world_size)])
    # Rank 0 holds the store: were it to leave over what it has read, the others could not read it.
    store.add("seats read", 1)
    while rank.is_first and store.add("seats read", 0) < rank.world_size:
        time.sleep(0.01)
    return [Seat(*json.loads(seat)) for seat in told]


def check_seats(seats: list[Seat]):
    """LaunchError, the same on every rank, where gloo would wait for NCCL until both give up, or NCCL would refuse."""
    for number, seat in enumerate(seats):
        if seat.fault:
            raise LaunchError(f"rank {number} on {seat.host} {seat.fault}: start one rank per GPU")
        first = next(n for n, other in enumerate(seats) if (other.host, other.gpu) == (seat.host, seat.gpu))
        if seat.gpu and first < number:
            raise LaunchError(f"ranks {first} and {number} sit on one GPU of {seat.host}: start one rank per GPU")
    with_gpu = {bool(seat.gpu): number for number, seat in reversed(list(enumerate(seats)))}
    if len(with_gpu) == 2:
        has, lacks = with_gpu[True], with_gpu[False]
        raise LaunchError(
            f"rank {lacks} on {seats[lacks].host} sees no GPU, rank {has} on {seats[has].host} does: was one asked for "
            "there, is its driver loaded (nvidia-smi), is torch a CUDA build?"
        )


def stop():
    import torch.distributed as dist

    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: list[float], device) -> list[float]:
    """Elementwise sum over the ranks, in fp64, the same on each."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value) -> list:
    """Every rank's value, on every rank, in rank order. For small Python values."""
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient)
    return values


def from_first_rank(value):
    """Rank 0's value, on every rank."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def on_first_rank(action):
    """Rank 0 runs `action()`; every rank returns its value once it is done. What it raises ends every rank: rank 0 with
    the error, the others in silence, since one message is enough."""
    import torch.distributed as dist

    value = error = None
    if dist.get_rank() == 0:
        try:
            value = action()
        except Exception as raised:  # told to the others before it goes on
            error = raised
    failed, value = from_first_rank((error is not None, value))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)
    return value
