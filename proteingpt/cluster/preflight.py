"""Is this cluster fit to train on? A minute under the launcher and on the nodes that the run will use.

Each rank measures itself and what lies between the ranks; rank 0 judges all readings together, by a pure function, and
prints a table, what is wrong in words, and an exit code for scripts: 0 where nothing is, 1 else.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from proteingpt import web
from proteingpt.cluster.findings import Reading, judge, table
from proteingpt.data.manifest import MAX_MANIFEST_BYTES
from proteingpt.data.shard_places import chunks, is_remote, join
from proteingpt.data.shards import MANIFEST_NAME, ShardError
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, start, stop

PACKAGES = ("torch", "deepspeed", "transformers", "fair-esm", "webdataset", "numpy", "safetensors")
GIB = 2**30


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(rank: Rank, device, data: str | None, output: Path, doing: "Deadline") -> Reading:
    """A collective: every rank measures its own parts beside the others, and the links together, unless one cannot."""
    import torch
    import torch.distributed as dist

    doing("waiting for the other ranks")
    dist.barrier()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reading = Reading(rank.rank, socket.gethostname(), name, versions(), time.time())
    try:
        reading = dataclasses.replace(reading, **measure_alone(device, data, output, doing))
    except Exception as error:  # a broken device or disk, of whatever kind: told, with its rank
        reading = dataclasses.replace(reading, fault=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    doing("waiting for the other ranks' own measurements")
    if any(gather_objects(reading.fault)):
        return reading
    doing("exchanging with the other ranks")
    rate, latency = all_reduce_rate(device, rank.world_size), all_reduce_latency(device, rank.world_size)
    return dataclasses.replace(reading, all_reduce_gbps=rate, latency_us=latency)


def measure_alone(device, data: str | None, output: Path, doing: "Deadline") -> dict:
    """Fields of a Reading."""
    import torch

    doing("multiplying matrices")
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory()
    found = {"memory_gib": total / GIB, "free_gib": free / GIB, "matmul_tflops": matmul_rate(device)}
    doing(f"asking for the room at {output}")
    found["disk_gib"] = shutil.disk_usage(nearest_folder(output)).free / GIB
    doing(f"reading {data}")
    found["data"], found["data_error"] = data_hash(data)
    measurable = found["data"] and not is_remote(data)
    return found | {"read_mbps": read_rate(Path(data)) if measurable else None}


class Deadline:
    """Ends this process, saying what it was doing, where that takes longer than `seconds`: a disk or a network that
    hangs raises nothing. Call it with what is done next."""

    def __init__(self, rank: Rank, seconds: float):
        self.rank, self.seconds, self.timer = rank, seconds, None

    def __call__(self, what: str):
        self.stop()
        self.timer = threading.Timer(self.seconds, self.end, [what])
        self.timer.daemon = True
        self.timer.start()

    def end(self, what: str):
        text = f"error: rank {self.rank.rank} on {socket.gethostname()} has been {what} for {self.seconds:g} s"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)

    def stop(self):
        if self.timer:
            self.timer.cancel()


def host_memory() -> tuple[int, int]:
    """(available, all) bytes of this host, from Linux's /proc/meminfo."""
    kilobytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(int(kilobytes[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def seconds_each(action: Callable[[], None], device, *, repeats: int) -> float:
    """Median seconds of one call, the device waited for, after two that warm up."""
    import torch

    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def matmul_rate(device) -> float:
    """Teraflop/s of a bf16 matrix product (fp32 on CPUs, which often have no bf16 unit)."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds_each(lambda: torch.mm(a, b), device, repeats=10) / 1e12


def all_reduce_rate(device, world_size: int) -> float | None:
    """Gigabytes/s of the bus: size x 2 (n - 1) / n / time, so that it does not depend on n (as in NCCL's tests)."""
    import torch
    import torch.distributed as dist

    if world_size == 1:
        return None
    values = torch.zeros((256 if device.type == "cuda" else 8) * 2**20 // 4, device=device)
    seconds = seconds_each(lambda: dist.all_reduce(values), device, repeats=5)
    return values.numel() * 4 * 2 * (world_size - 1) / world_size / seconds / 1e9


def all_reduce_latency(device, world_size: int) -> float | None:
    """Microseconds of the smallest all-reduce."""
    import torch
    import torch.distributed as dist

    if world_size == 1:
        return None
    value = torch.zeros(1, device=device)
    return seconds_each(lambda: dist.all_reduce(value), device, repeats=50) * 1e6


def data_hash(data: str | None) -> tuple[str | None, str | None]:
    """(hash of the shards' manifest, None), or (None, what is wrong); (None, None) where no data was named."""
    if data is None:
        return None, None
    try:
        if is_remote(data):
            manifest = b"".join(chunks(join(data, MANIFEST_NAME), MAX_MANIFEST_BYTES))
        else:
            manifest = (Path(data) / MANIFEST_NAME).read_bytes()
    except (OSError, ShardError, web.Failure) as error:
        return None, str(error)
    return hashlib.sha256(manifest).hexdigest(), None


def read_rate(data: Path, most: int = 256 * 2**20) -> float | None:
    """Megabytes/s of a sequential read of the largest shard, asked of the disk where the system lets go of its
    cache."""
    shards = sorted(data.glob("*.tar"), key=lambda path: path.stat().st_size)
    if not shards:
        return None
    with open(shards[-1], "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, num_bytes = time.perf_counter(), 0
        while num_bytes < most and (block := file.read(2**22)):
            num_bytes += len(block)
    return num_bytes / (time.perf_counter() - began) / 1e6


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


# ------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        rank = detect(os.environ)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        device = start(rank, timeout_seconds=args.seconds)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # torch's own words for a time-out or a refused connection
        where = f"{rank.master_addr}:{rank.master_port}"
        print(
            f"error: rank {rank.rank} on {socket.gethostname()} did not meet the other {rank.world_size - 1} rank(s) "
            f"at {where} in {args.seconds} s: do all nodes resolve {rank.master_addr}, and is the port open between "
            f"them? ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    doing = Deadline(rank, args.seconds)
    readings = gather_objects(measure(rank, device, args.data, Path(args.output), doing))
    doing.stop()
    findings = judge(readings)
    if rank.is_first:
        show(readings, findings, args.json)
    stop()
    return 1 if findings else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/preflight.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="shards to read from, as every rank would")
    parser.add_argument("--output", default="runs", help="where the run would write [runs]")
    parser.add_argument("--json", action="store_true", help="print the readings and findings as one JSON line")
    parser.add_argument(
        "--seconds", type=int, default=60, help="how long ranks wait for each other, and each part takes at most [60]"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def show(readings: list[Reading], findings: list[str], as_json: bool):
    if as_json:
        print(json.dumps({"readings": [dataclasses.asdict(r) for r in readings], "findings": findings}), flush=True)
        return
    print(table(readings))
    software = ", ".join(f"{name} {version}" for name, version in readings[0].versions.items())
    print(f"\nrank 0 runs {software}")
    print(
        "\n".join(["", *(f"wrong: {finding}" for finding in findings)]) if findings else "\nnothing is wrong",
        flush=True,
    )
