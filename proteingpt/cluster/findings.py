"""What is wrong with a cluster, by what its ranks found: pure, readings in and words out."""

import statistics
from dataclasses import dataclass

from proteingpt.devices import peak_flops

CLOCK_SECONDS = 2.0  # clocks further apart than this make logs and time limits hard to read
DISK_GIB = 20.0  # a run directory with checkpoints, TensorBoard and an exported projector stays well below
FREE_SHARE = 0.9  # of a device's memory: below, somebody else is on it
# of the data sheet's bf16 rate that a large matrix product reaches on a healthy GPU, with room to spare
PEAK_SHARE = 0.4
SIBLING_SHARE = 0.8  # of the median of its own kind
LINK_GBPS = 1.0  # bus bandwidth between GPUs below which the ranks talk over an ordinary network
READ_MBPS = 50.0  # ten times what the fastest consumer of shards takes


@dataclass(frozen=True)
class Reading:
    """What one rank found. Rates: teraflop/s, gigabytes/s of the bus as NCCL's tests count it, microseconds,
    megabytes/s; clock: seconds since the epoch, read by all ranks at one moment. data: the manifest's hash, or why there
    is none. fault: what kept the rank from measuring the rest."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    clock: float
    memory_gib: float | None = None
    free_gib: float | None = None
    disk_gib: float | None = None
    matmul_tflops: float | None = None
    all_reduce_gbps: float | None = None
    latency_us: float | None = None
    data: str | None = None
    data_error: str | None = None
    read_mbps: float | None = None
    fault: str | None = None


def judge(readings: list[Reading]) -> list[str]:
    """What is wrong, a sentence each with what to do; empty where nothing is. Pure."""
    whole = [r for r in readings if not r.fault]
    return [
        *(f"rank {r.rank} ({r.host}) could not be measured, nor the links: {r.fault}" for r in readings if r.fault),
        *(finding for check in MEASURED for finding in check(whole)),
        *(finding for check in ALWAYS_KNOWN for finding in check(readings)),
    ]


def busy_devices(readings):
    for r in readings:
        if r.device != "CPU" and r.free_gib < FREE_SHARE * r.memory_gib:
            yield (
                f"rank {r.rank} ({r.host}): only {r.free_gib:.0f} of {r.memory_gib:.0f} GiB of its {r.device} are "
                "free: another process is on it (nvidia-smi shows which)"
            )


def full_disks(readings):
    for host, r in first_of_each_host(readings).items():
        if r.disk_gib < DISK_GIB:
            yield (
                f"{host}: {r.disk_gib:.0f} GiB free where the run would write, {DISK_GIB:.0f} wanted: make room, or "
                "choose another --output"
            )


def unreadable_data(readings):
    for r in readings:
        if r.data_error:
            yield (
                f"rank {r.rank} ({r.host}) cannot read the shards: {r.data_error}. The same path must hold them on "
                "every node"
            )


def slow_reading(readings):
    for host, r in first_of_each_host(readings).items():
        if r.read_mbps is not None and r.read_mbps < READ_MBPS:
            yield (
                f"{host} reads shards at {r.read_mbps:.0f} MB/s, {READ_MBPS:.0f} wanted: copy them to a local disk, "
                "or set data.cache_dir"
            )


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
            "(NCCL_DEBUG=INFO says what it chose, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose). Training the projector "
            "alone bears it, full training does not"
        )


MEASURED = (
    busy_devices,
    full_disks,
    unreadable_data,
    slow_reading,
    slow_devices,
    unlike_siblings,
    unlike_data,
    slow_links,
)
ALWAYS_KNOWN = (unlike_versions, unlike_clocks)


def first_of_each_host(readings: list[Reading]) -> dict[str, Reading]:
    return {r.host: r for r in reversed(readings)}


def table(readings: list[Reading]) -> str:
    columns = ("rank", "host", "device", "free/GiB", "disk/GiB", "TFLOP/s", "link GB/s", "latency/us", "read MB/s")
    rows = [columns] + [
        (
            str(r.rank), r.host, r.device, f"{number(r.free_gib)}/{number(r.memory_gib)}", number(r.disk_gib),
            number(r.matmul_tflops), number(r.all_reduce_gbps), number(r.latency_us), number(r.read_mbps),
        )
        for r in readings
    ]  # fmt: skip
    widths = [max(len(row[c]) for row in rows) for c in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
