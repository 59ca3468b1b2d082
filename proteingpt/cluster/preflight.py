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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from proteingpt.devices import peak_flops
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, start, stop

PACKAGES = ("torch", "deepspeed", "transformers", "fair-esm", "webdataset", "numpy", "safetensors")
CLOCK_SECONDS = 2.0  # clocks further apart than this make logs and time limits hard to read
DISK_GIB = 20.0  # a run directory with checkpoints, TensorBoard and an exported projector stays well below
FREE_SHARE = 0.9  # of a device's memory: below, somebody else is on it
PEAK_SHARE = 0.4  # of the data sheet's bf16 rate that a large matrix product reaches on a healthy GPU, with room to spare
SIBLING_SHARE = 0.8  # of the median of its own kind
LINK_GBPS = 1.0  # bus bandwidth between GPUs below which the ranks talk over an ordinary network
READ_MBPS = 50.0  # ten times what the fastest consumer of shards takes
GIB = 2**30


@dataclass(frozen=True)
class Reading:
    """What one rank found. Rates: teraflop/s, gigabytes/s of the bus as NCCL's tests count it, microseconds, megabytes/s;
    clock: seconds since the epoch, read by all ranks at one moment. data: the manifest's hash, or why there is none."""

    rank: int
    host: str
    device: str
    device_id: str
    memory_gib: float
    free_gib: float
    disk_gib: float
    versions: dict[str, str]
    clock: float
    matmul_tflops: float
    all_reduce_gbps: float | None
    latency_us: float | None
    data: str | None
    data_error: str | None
    read_mbps: float | None


# ------------------------------------------------------------------------------------------------------------ judging


def judge(readings: list[Reading]) -> list[str]:
    """What is wrong, a sentence each with what to do; empty where nothing is. Pure."""
    return [finding for check in (*ALONE, *TOGETHER) for finding in check(readings)]


def busy_devices(readings):
    for r in readings:
        if r.device != "CPU" and r.free_gib < FREE_SHARE * r.memory_gib:
            yield (
                f"rank {r.rank} ({r.host}): only {r.free_gib:.0f} of {r.memory_gib:.0f} GiB of its {r.device} are free: "
                "another process is on it (nvidia-smi shows which)"
            )


def full_disks(readings):
    for host, r in first_of_each_host(readings).items():
        if r.disk_gib < DISK_GIB:
            yield f"{host}: {r.disk_gib:.0f} GiB free where the run would write, {DISK_GIB:.0f} wanted: make room, or choose another --output"


def unreadable_data(readings):
    for r in readings:
        if r.data_error:
            yield f"rank {r.rank} ({r.host}) cannot read the shards: {r.data_error}. The same path must hold them on every node"


def slow_reading(readings):
    for host, r in first_of_each_host(readings).items():
        if r.read_mbps is not None and r.read_mbps < READ_MBPS:
            yield f"{host} reads shards at {r.read_mbps:.0f} MB/s, {READ_MBPS:.0f} wanted: copy them to a local disk, or set data.cache_dir"


def slow_devices(readings):
    for r in readings:
        peak = peak_flops(r.device)
        if peak and r.matmul_tflops * 1e12 < PEAK_SHARE * peak:
            yield (
                f"rank {r.rank} ({r.host}): its {r.device} multiplies at {r.matmul_tflops:.0f} TFLOP/s, "
                f"{r.matmul_tflops * 1e12 / peak:.0%} of its data sheet: too hot, limited in power, or shared"
            )


def unlike_siblings(readings):
    for kind in {r.device for r in readings}:
        same = [r for r in readings if r.device == kind]
        usual = statistics.median(r.matmul_tflops for r in same)
        for r in same:
            if r.matmul_tflops < SIBLING_SHARE * usual:
                yield (
                    f"rank {r.rank} ({r.host}) multiplies at {r.matmul_tflops:.2g} TFLOP/s, other {kind}s here at "
                    f"{usual:.2g}: the run will give it less to do, but look what ails it"
                )


def unlike_versions(readings):
    for name in sorted({name for r in readings for name in r.versions}):
        ranks_of: dict[str, list[int]] = {}
        for r in readings:
            ranks_of.setdefault(r.versions.get(name, "absent"), []).append(r.rank)
        if len(ranks_of) > 1:
            found = "; ".join(f"{version} on ranks {', '.join(map(str, ranks))}" for version, ranks in ranks_of.items())
            yield f"{name} differs: {found}. Install the same environment on every node"


def unlike_clocks(readings):
    fastest, slowest = max(readings, key=lambda r: r.clock), min(readings, key=lambda r: r.clock)
    if fastest.clock - slowest.clock > CLOCK_SECONDS:
        yield (
            f"the clocks of {fastest.host} and {slowest.host} are {fastest.clock - slowest.clock:.0f} s apart: "
            "training does not mind, logs and time limits do; start chrony or ntpd"
        )


def shared_devices(readings):
    holders: dict[tuple, list[int]] = {}
    for r in readings:
        if r.device != "CPU":
            holders.setdefault((r.host, r.device_id), []).append(r.rank)
    for (host, _), ranks in holders.items():
        if len(ranks) > 1:
            yield f"ranks {', '.join(map(str, ranks))} sit on one GPU of {host}: start one task per GPU"


def unlike_data(readings):
    seen = {r.data: r for r in readings if r.data}
    if len(seen) > 1:
        hosts = " and ".join(r.host for r in seen.values())
        yield f"the shards differ between {hosts}: copy them anew, or share one directory"


def slow_links(readings):
    rates = [r.all_reduce_gbps for r in readings if r.all_reduce_gbps is not None and r.device != "CPU"]
    if rates and min(rates) < LINK_GBPS:
        yield (
            f"ranks exchange {min(rates):.2f} GB/s, {LINK_GBPS:.0f} wanted: NCCL has not found the fast network "
            "(NCCL_DEBUG=INFO says what it chose, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose). Training the projector alone "
            "bears it, full training does not"
        )


ALONE = (busy_devices, full_disks, unreadable_data, slow_reading, slow_devices)
TOGETHER = (unlike_siblings, unlike_versions, unlike_clocks, shared_devices, unlike_data, slow_links)


def first_of_each_host(readings: list[Reading]) -> dict[str, Reading]:
    return {r.host: r for r in reversed(readings)}


def table(readings: list[Reading]) -> str:
    columns = ("rank", "host", "device", "free/GiB", "disk/GiB", "TFLOP/s", "link GB/s", "latency/us", "read MB/s")
    rows = [columns] + [
        (
            str(r.rank), r.host, r.device, f"{r.free_gib:.1f}/{r.memory_gib:.1f}", f"{r.disk_gib:.0f}", f"{r.matmul_tflops:.3g}",
            number(r.all_reduce_gbps), number(r.latency_us), number(r.read_mbps),
        )
        for r in readings
    ]  # fmt: skip
    widths = [max(len(row[c]) for row in rows) for c in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(rank: Rank, device, data: str | None, output: Path) -> Reading:
    """A collective: every rank measures the links together, and its own parts beside the others."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    clock = time.time()
    on_gpu = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if on_gpu else host_memory()
    digest, data_error = data_hash(data)
    return Reading(
        rank=rank.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        device_id=str(torch.cuda.get_device_properties(device).uuid) if on_gpu else "",
        memory_gib=total / GIB,
        free_gib=free / GIB,
        disk_gib=shutil.disk_usage(nearest_folder(output)).free / GIB,
        versions=versions(),
        clock=clock,
        matmul_tflops=matmul_rate(device),
        all_reduce_gbps=all_reduce_rate(device, rank.world_size),
        latency_us=all_reduce_latency(device, rank.world_size),
        data=digest,
        data_error=data_error,
        read_mbps=read_rate(Path(data)) if digest else None,
    )


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
        return hashlib.sha256((Path(data) / "manifest.json").read_bytes()).hexdigest(), None
    except OSError as error:
        return None, f"{error.strerror}: {error.filename}"


def read_rate(data: Path, most: int = 256 * 2**20) -> float | None:
    """Megabytes/s of a sequential read of the largest shard, asked of the disk where the system lets go of its cache."""
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
    except RuntimeError as error:  # torch's own words for a time-out or a refused connection
        where = f"{rank.master_addr}:{rank.master_port}"
        print(
            f"error: rank {rank.rank} on {socket.gethostname()} did not meet the other {rank.world_size - 1} rank(s) at "
            f"{where} in {args.seconds} s: do all nodes resolve {rank.master_addr}, and is the port open between them? "
            f"({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    readings = gather_objects(measure(rank, device, args.data, Path(args.output)))
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
    parser.add_argument("--seconds", type=int, default=60, help="how long ranks wait for each other [60]")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def show(readings: list[Reading], findings: list[str], as_json: bool):
    if as_json:
        print(json.dumps({"readings": [dataclasses.asdict(r) for r in readings], "findings": findings}), flush=True)
        return
    print(table(readings))
    software = ", ".join(f"{name} {version}" for name, version in readings[0].versions.items())
    print(f"\nrank 0 runs {software}")
    print("\n".join(["", *(f"wrong: {finding}" for finding in findings)]) if findings else "\nnothing is wrong", flush=True)
