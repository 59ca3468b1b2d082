"""How many tokens a rank's forward can hold: given, or found out by a short dry run before a stage.

The dry run computes a forward and its gradients twice, on the stage's own first packs, the second time on twice as many
tokens, and looks at the peak of memory; memory grows as a line in tokens. It learns nothing: gradients are handed over
rather than accumulated, so that DeepSpeed's hooks see none, no optimizer step is taken, the random state is put back.
Chosen: a whole number of packs, so that noise in the measure rarely changes who computes what.
"""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from proteingpt.data.collate import Pack
from proteingpt.distributed import gather_objects

log = logging.getLogger("proteingpt")

MARGIN = 0.9  # share of the memory that is planned for: allocators lose some of it between blocks, and packs differ


class CapacityError(ValueError):
    """Not even one pack fits the device."""


def line(sizes: list[int], peaks: list[float]) -> tuple[float, float]:
    """(bytes at no token, bytes per token) of the line through the peaks at two sizes."""
    (small, large), (low, high) = sizes, peaks
    per_token = (high - low) / (large - small)
    return low - per_token * small, per_token


def fit(sizes: list[int], peaks: list[float], budget: float) -> int:
    """Tokens whose peak is `budget`, on the line through the peaks at `sizes` (tokens, two unlike ones); peaks and
    budget in bytes. Where the peak did not grow, the larger size: more is not known. 0 where not even one token
    fits."""
    base, per_token = line(sizes, peaks)
    return max(0, int((budget - base) / per_token)) if per_token > 0 else max(sizes)


def whole_packs(tokens: int, pack_tokens: int) -> int:
    """`tokens` as a number of packs of at most pack_tokens. CapacityError where it is none."""
    if tokens < pack_tokens:
        raise CapacityError(
            f"a forward of {pack_tokens} tokens does not fit this device, about {tokens} would: lower tokens_per_pack, "
            "set model.activation_checkpointing, or leave the device out"
        )
    return tokens // pack_tokens * pack_tokens


def agreed(given: int | str | None, engine, encoders, plan, device: torch.device) -> list[int | None]:
    """Every rank's capacity, from devices.tokens_per_forward: as given, or measured. A collective; CapacityError on all
    ranks where any of them has none."""
    hosts = gather_objects(socket.gethostname())
    mine, error = given, None
    if given == "auto":
        try:
            mine = measured_capacity(engine, encoders, plan, device, hosts.count(socket.gethostname()))
        except CapacityError as found:
            error = str(found)
    seen = gather_objects((mine, error))
    errors = [f"rank {rank} on {hosts[rank]}: {error}" for rank, (_, error) in enumerate(seen) if error]
    if errors:
        raise CapacityError("; ".join(errors))
    return [capacity for capacity, _ in seen]


def measured_capacity(engine, encoders, plan, device: torch.device, ranks_on_host: int) -> int:
    """Tokens. plan: the stage's TrainingPlan. Under ZeRO 3 a collective: every rank runs two forwards, of equal packs.

    CapacityError where not even one pack fits.
    """
    packs, tokens = plan.packs(0)
    largest = sorted(range(len(packs)), key=lambda p: -tokens[p])[:2]
    once, twice = packs[largest[0]], packs[largest[0]] + packs[largest[-1]]
    sizes, peaks = [], []
    for groups in (once, twice):
        # None where no sample of it can be read: these are set aside, and a dry run needs no more than some pack.
        pack = plan.data.collate(groups) or plan.data.stand_in(packs, tokens)
        try:
            peaks.append(peak_of(lambda: forward_and_gradients(engine, encoders, pack, device), device))
        except torch.OutOfMemoryError:
            if engine.is_sharded:  # the other ranks are waiting in this forward's collectives
                raise
            break
        sizes.append(pack.num_tokens)
    budget = memory_budget(device, ranks_on_host)
    # One pack that ran fits, whatever the margin says; where two did not, or not even one, nothing is left to reckon.
    # Two alike, as samples that cannot be read may leave them, make no line.
    found = max(fit(sizes, peaks, budget), sizes[0]) if len(set(sizes)) == 2 else max(sizes, default=0)
    pack_tokens = plan.stage.tokens_per_pack
    if sizes:
        found = max(found, pack_tokens)
    log.info(
        "dry run: forwards of %s tokens took up to %s GB, of %.1f there are: room for %d tokens",
        sizes, [round(peak / 2**30, 2) for peak in peaks], budget / 2**30, found,
    )  # fmt: skip
    return whole_packs(found, pack_tokens)


def forward_and_gradients(engine, encoders, pack: Pack, device: torch.device):
    """As in a step, and thrown away. By the module rather than the engine, and by autograd.grad rather than backward:
    both of DeepSpeed's would note that a step has begun."""
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        rows = encoders.encode(pack.proteins)
        loss = engine.module(pack.to(device), *rows)
        torch.autograd.grad(loss, trained, allow_unused=True)


# ----------------------------------------------------------------------------------------------------------- memory


def peak_of(work: Callable[[], None], device: torch.device) -> float:
    """Bytes of memory that this process held at most while `work` ran."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    reset_peak_of_process()
    work()
    return of_process("VmHWM")


def memory_budget(device: torch.device, ranks_on_host: int) -> float:
    """Bytes that this process may hold: what it has, and its share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MARGIN * (free + torch.cuda.memory_reserved(device))
    return of_process("VmRSS") + MARGIN * free_on_host() / ranks_on_host


def of_process(field: str) -> int:
    """Bytes, from Linux's /proc/self/status: VmRSS is now, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def reset_peak_of_process():
    """VmHWM to VmRSS: Linux's documented effect of writing 5."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def free_on_host() -> int:
    """Bytes that processes here can still take: what the kernel calls available, or what the container may yet use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return min([available, *free_in_container(Path("/sys/fs/cgroup"))])


def free_in_container(directory: Path) -> list[int]:
    """Bytes between a control group's limit and its use, version 2 or 1; none without a limit."""
    version_1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"
    for limit, use in (("memory.max", "memory.current"), version_1):
        if (directory / limit).is_file() and (directory / use).is_file():
            allowed = (directory / limit).read_text().strip()
            return [] if allowed == "max" else [max(0, int(allowed) - int((directory / use).read_text()))]
    return []
