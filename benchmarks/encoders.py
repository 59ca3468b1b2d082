"""Both encoders against fair-esm's own forward: residues a second and peak memory, same weights, same proteins.

    python -m benchmarks.encoders [--true-size] [--device cuda --dtype bfloat16]

Weights are random, in the published formats; speed does not depend on their values. Proteins have the lengths of PDB
chains. fair-esm gets ESM-2 in random batches of 8, padded, and ESM-IF1 one protein at a time, as its own utilities
do, so nothing is padded there. The two run in turns, batch by batch, several times, and the shortest time of each batch
counts, since other processes can only lengthen it; `cpu_ratio` is that of processor time, which they touch less. On a
CPU one thread, because of several the last one sets the pace, and that is whichever another process keeps waiting.
The last line is JSON. ESM-IF1 is of true size always, ESM-2 of the 35M model's unless asked otherwise.
"""

import argparse
import ctypes
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from proteingpt.cluster.work import pdb_lengths
from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.encoders import fair_esm, load_esm2, load_esm_if1
from proteingpt.encoders.esm2 import tokens_of
from proteingpt.encoders.esm_if1 import inputs_of
from proteingpt.protein import Protein

BATCH = 8

# Layers, width, heads of the published ESM-2 models.
ESM2_SIZES = {
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
    "3B": (36, 2560, 40),
    "15B": (48, 5120, 40),
}
ESM_IF1_SIZE = dict(
    num_layers=8, width=512, num_heads=8, num_gvp_layers=4, node_dims=(1024, 256), edge_dims=(32, 1), num_neighbors=30
)
# Dense bf16 FLOP/s by part of the device's name (NVIDIA data sheets, SXM).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def random_protein(length: int, seed: int) -> Protein:
    """A random walk of 3.8 angstrom steps, folded back into a ball, with N and C beside each CA."""
    rng = np.random.default_rng((seed, length))
    step = rng.normal(size=(length, 3))
    alpha = np.cumsum(3.8 * step / np.linalg.norm(step, axis=1, keepdims=True), axis=0)
    radius = 2.2 * length**0.38 * 1.3
    alpha = np.abs((alpha + radius) % (4 * radius) - 2 * radius) - radius
    offsets = rng.normal(size=(length, 3, 3))
    offsets *= 1.5 / np.linalg.norm(offsets, axis=2, keepdims=True)
    offsets[:, 1] = 0
    sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
    return Protein(f"p{seed}", "A", sequence, (alpha[:, None] + offsets).astype(np.float32))


# ------------------------------------------------------------------------------------------------------ measuring


class Meter:
    """Shortest seconds, wall clock and processor, and the most bytes held beyond those before, over calls of a work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.cpu_seconds, self.peak_bytes = device, float("inf"), float("inf"), 0

    def __call__(self, work: Callable[[], object]) -> object:
        before = reset_peak(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        result = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = min(self.seconds, time.perf_counter() - start)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - cpu_start)
        self.peak_bytes = max(self.peak_bytes, peak(self.device) - before)
        return result


def reset_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would hide a new peak
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_bytes("VmHWM")


def process_bytes(field: str) -> int:
    """A field of /proc/self/status, given there in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def compare(
    ours: Callable, theirs: Callable, batches: Sequence[Sequence[Protein]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Both on every batch, in turns. Rates in residues a second, error relative to the rms of fair-esm's rows."""
    for forward in (ours, theirs):
        forward(batches[0][:1])
    meters = {name: [Meter(device) for _ in batches] for name in ("fast", "fair_esm")}
    error = 0.0
    for _ in range(repeats):
        for number, batch in enumerate(batches):
            wanted = meters["fair_esm"][number](lambda: theirs(batch))
            found = meters["fast"][number](lambda: ours(batch))
            error = max(error, *(relative_error(a, b) for a, b in zip(found, wanted, strict=True)))
    num_residues = sum(len(protein) for batch in batches for protein in batch)
    values = {"proteins": sum(map(len, batches)), "residues": num_residues}
    seconds = {name: sum(meter.seconds for meter in each) for name, each in meters.items()}
    cpu_seconds = {name: sum(meter.cpu_seconds for meter in each) for name, each in meters.items()}
    for name, each in meters.items():
        values[f"{name}_residues_per_second"] = round(num_residues / seconds[name], 2)
        values[f"{name}_peak_bytes"] = max(meter.peak_bytes for meter in each)
    values["ratio"] = round(seconds["fair_esm"] / seconds["fast"], 2)
    values["cpu_ratio"] = round(cpu_seconds["fair_esm"] / cpu_seconds["fast"], 2)
    return values | {"largest_error": error}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.float()
    return ((found.float() - wanted).abs().max() / wanted.square().mean().sqrt()).item()


# ------------------------------------------------------------------------------------------------------ the models


def fair_esm_model(path: Path, device: torch.device, dtype: torch.dtype):
    """(model, alphabet) by fair-esm's own loader, minus its `torch.load`, which newer torch refuses."""
    fair_esm.inverse_folding()
    data = torch.load(path, weights_only=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, alphabet = fair_esm.esm().pretrained.load_model_and_alphabet_core(path.stem, data, None)
    return model.eval().to(device, dtype), alphabet


def fair_esm2(path: Path, device: torch.device, dtype: torch.dtype) -> Callable:
    model, alphabet = fair_esm_model(path, device, dtype)
    convert, last = alphabet.get_batch_converter(), model.num_layers

    @torch.no_grad()
    def forward(proteins):
        _, _, tokens = convert([(protein.key, protein.sequence) for protein in proteins])
        rows = model(tokens.to(device), repr_layers=[last])["representations"][last]
        return [padded[: len(protein) + 2] for padded, protein in zip(rows, proteins)]

    return forward


def fair_esm_if1(path: Path, device: torch.device) -> Callable:
    """In float32: fair-esm's coordinates would be half precision too."""
    model, alphabet = fair_esm_model(path, device, torch.float32)
    convert = fair_esm.inverse_folding().util.CoordBatchConverter(alphabet)

    @torch.no_grad()
    def forward(proteins):
        rows = []
        for protein in proteins:
            coords, confidence, _, _, padding = convert([(protein.backbone, None, None)], device=device)
            rows.append(model.encoder(coords, padding, confidence)["encoder_out"][0][:, 0])
        return rows

    return forward


def bench_esm2(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    layers, width, heads = ESM2_SIZES[options.esm2_size]
    path = write_tiny_esm2(folder / "esm2_random.pt", num_layers=layers, width=width, num_heads=heads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    encoder = load_esm2(str(path), device=device, dtype=dtype)
    lengths = pdb_lengths(BATCH * options.batches, options.seed)
    proteins = [random_protein(length, number) for number, length in enumerate(lengths)]
    batches = [proteins[first : first + BATCH] for first in range(0, len(proteins), BATCH)]
    padded = sum(len(batch) * max(map(len, batch)) for batch in batches)
    values = {"size": options.esm2_size, "padded_to": round(padded / sum(lengths), 2)}
    if not options.fast_only:
        values |= compare(encoder.encode, fair_esm2(path, device, dtype), batches, device, options.repeats)
    # Without waiting for fair-esm's batches: all proteins at once, as the cache and the training step have them.
    meter = Meter(device)
    for _ in range(1 + options.repeats):
        meter(lambda: encoder.encode(proteins))
    rows = sum(lengths) + 2 * len(lengths)
    flops = sum(forward_flops(len(tokens_of(p.sequence)), layers, width) for p in proteins) / meter.seconds
    values["all_at_once_rows_per_second"] = round(rows / meter.seconds, 1)
    values["all_at_once_peak_bytes"] = meter.peak_bytes
    values["tflops"] = round(flops / 1e12, 3)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    return values | ({"mfu": round(flops / known, 3)} if known else {})


def forward_flops(num_rows: int, num_layers: int, width: int) -> float:
    """Of the linear maps (12 width^2 weights in a layer) and the two products of attention."""
    return num_layers * num_rows * (2 * 12 * width**2 + 4 * num_rows * width)


def bench_esm_if1(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    path = write_tiny_esm_if1(folder / "esm_if1_random.pt", **ESM_IF1_SIZE)
    device = torch.device(options.device)
    encoder = load_esm_if1(str(path), device=device)
    lengths = pdb_lengths(options.structures, options.seed)
    proteins = [random_protein(length, number) for number, length in enumerate(lengths)]
    values = {"size": "142M"}
    if not options.fast_only:
        alone = [[protein] for protein in proteins]
        values |= compare(encoder.encode, fair_esm_if1(path, device), alone, device, options.repeats)
    for length in options.lengths:
        protein, meter = random_protein(length, 0), Meter(device)
        assert len(inputs_of(protein)[0]) == length + 2
        meter(lambda: encoder.encode([protein]))
        values[f"fast_peak_bytes_at_{length}"] = meter.peak_bytes
        values[f"fast_residues_per_second_at_{length}"] = round(length / meter.seconds, 2)
    return values


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--true-size", action="store_true", help="ESM-2 of 3B parameters (fair-esm needs 12 GB and patience on a CPU)")
    add("--esm2-size", choices=ESM2_SIZES, default="35M", help="shapes of which published ESM-2 [35M]")
    add("--batches", type=int, default=2, help=f"random batches of {BATCH} proteins for ESM-2 [2]")
    add("--structures", type=int, default=3, help="proteins for ESM-IF1 [3]")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[500, 1000],
        help="of proteins whose ESM-IF1 peaks are taken [500 1000]",
    )
    add("--threads", type=int, default=1, help="of torch on the CPU [1]")
    add("--repeats", type=int, default=2, help="times each batch is run; the shortest counts [2]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 [cpu]")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of ESM-2's weights [float32]")
    add("--seed", type=int, default=1, help="of lengths and proteins [1]")
    add("--only", choices=("esm2", "esm_if1"), help="only one of the two")
    add("--fast-only", action="store_true", help="leave fair-esm out: rates and peaks of ours alone")
    options = parser.parse_args(argv)
    options.esm2_size = "3B" if options.true_size else options.esm2_size
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, bench in (("esm2", bench_esm2), ("esm_if1", bench_esm_if1)):
            if options.only in (None, name):
                found[name] = bench(options, Path(folder))
                print(name, *(f"  {field:<34}{value}" for field, value in found[name].items()), sep="\n", flush=True)
                gc.collect()
    settings = {"device": options.device, "threads": torch.get_num_threads(), "dtype": options.dtype}
    flat = {f"{name}.{field}": value for name, values in found.items() for field, value in values.items()}
    print(json.dumps(flat | settings))


if __name__ == "__main__":
    main()
