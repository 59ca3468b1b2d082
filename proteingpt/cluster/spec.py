"""A cluster in a line, `2xH100-80,2xA100-40`, or in a YAML file: kinds of devices, how many, and how fast they are held
to be."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from proteingpt.devices import peak_flops

# Published model-FLOP utilisation of 7B training (LLM-Foundry's table), by the device's name and memory. Elsewhere
# ASSUMED_MFU.
PUBLISHED_MFU = {("H100", 80): 0.46, ("A100", 80): 0.64, ("A100", 40): 0.51}
ASSUMED_MFU = 0.40
LINK_GBPS = 20.0  # what PCIe 4.0 x16 carries of its 32 GB/s, for gradients, gathered weights and offload
FIELDS = {"count", "name", "gib", "tflops", "mfu"}


class ClusterError(ValueError):
    """A cluster that cannot be read, or a device of unknown speed."""


@dataclass(frozen=True)
class Kind:
    """Devices that are alike. gib: of memory; flops: a second that training reaches; source: where that is from. name:
    as NVIDIA's drivers hold it, without the memory."""

    count: int
    name: str
    gib: float
    flops: float | None
    source: str

    @property
    def label(self) -> str:
        return f"{self.name}-{self.gib:g}"


@dataclass(frozen=True)
class Cluster:
    kinds: tuple[Kind, ...]
    link_gbps: float = LINK_GBPS

    @property
    def ranks(self) -> list[Kind]:
        """The kind of each rank."""
        return [kind for kind in self.kinds for _ in range(kind.count)]


def make_kind(count: int, name: str, gib: float, tflops: float | None = None, mfu: float | None = None) -> Kind:
    """tflops: the data sheet's dense 16-bit rate, mfu: the share of it that is reached; None for what is published."""
    if count < 1 or gib <= 0:
        raise ClusterError(f"cluster: {count} x {name} with {gib} GiB, expected at least 1, with more than 0")
    sheet = tflops * 1e12 if tflops else peak_flops(name)
    if sheet is None:
        return Kind(count, name, gib, None, "unknown")
    published = next(
        (share for (key, size), share in PUBLISHED_MFU.items() if key in name and abs(size - gib) < 8), None
    )
    share, whence = (
        (mfu, "given") if mfu else (published, "LLM-Foundry, 7B") if published else (ASSUMED_MFU, "no published figure")
    )
    rate = "given" if tflops else "data sheet"
    return Kind(
        count, name, gib, sheet * share, f"assumed: {share:.0%} ({whence}) of {sheet / 1e12:.0f} TFLOP/s ({rate})"
    )


def parse_cluster(text: str) -> Cluster:
    """`COUNTxNAME-GIB,...`, or the path of a YAML file: {devices: [{count, name, gib, tflops, mfu}, ...],
    link_gbps}."""
    if text.endswith((".yaml", ".yml")):
        return read_cluster(Path(text))
    kinds = []
    for part in text.split(","):
        found = re.fullmatch(r"(?:(\d+)x)?(.+)-(\d+(?:\.\d+)?)", part.strip())
        if not found:
            raise ClusterError(f"--cluster {text}: {part.strip()!r} is not COUNTxNAME-GIB, as in 2xH100-80")
        count, name, gib = found.groups()
        kinds.append(make_kind(int(count or 1), name.replace("-", " "), float(gib)))
    return Cluster(tuple(kinds))


def read_cluster(path: Path) -> Cluster:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        devices, link = values["devices"], float(values.get("link_gbps", LINK_GBPS))
        for device in devices:
            if unknown := sorted(set(device) - FIELDS):
                raise ClusterError(f"{path}: {unknown[0]} is no field of a device; known: {', '.join(sorted(FIELDS))}")
        kinds = [
            make_kind(**{"count": 1, **device, "name": str(device["name"]).replace("-", " ")}) for device in devices
        ]
    except ClusterError:
        raise
    except OSError as error:
        raise ClusterError(f"--cluster {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        wanted = "{devices: [{count: 2, name: H100, gib: 80}, ...], link_gbps: 20}"
        raise ClusterError(f"--cluster {path} is not as {wanted}: {type(error).__name__} {error}") from None
    if not kinds or link <= 0:
        raise ClusterError(f"--cluster {path}: no device in it, or link_gbps not above 0")
    return Cluster(tuple(kinds), link)
