"""How fast shards are built from BinaryCIF, where the time goes, and what two workers gain over one.

    python -m benchmarks.build [--structures DIR] [--copies 100] [--repeats 3]

The floor is the parser alone on the same files: read_entry and the sequence and coordinates of chain A. The build is
the whole of it, from the list of files to bytes on disk. Floor and build run in turns in this process, best of three,
and are timed in seconds of CPU, which is what "per core" means and which a busy machine changes least; waiting for the
disk does not count. Two workers are timed by the clock on the wall, on so many copies of the files that their start
(imports, two seconds or so) matters little; one and two take turns, and the ratio is the median over the turns. They
are MPI ranks where mpirun is there, else local processes. On a machine with other work to do that ratio says nothing:
the cores that each command got stand beside it. Without --structures: ../shared/data/pdb if it is there, else files of
demo proteins, which are
far smaller than real ones.
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from proteingpt.data.build import build
from proteingpt.data.entries import encode_outcome, make_sample, read_outcome
from proteingpt.data.filters import Filters
from proteingpt.data.pieces import open_work, write_piece
from proteingpt.data.questions import closed_questions, describe
from proteingpt.data.shards import encode_sample, file_sha256, write_shards
from proteingpt.data.sources import Job
from proteingpt.data.structure import StructureError, read_entry
from proteingpt.demo.proteins import demo_samples

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "data" / "pdb"
REPEATS = 3
THREE_LETTERS = dict(
    A="ALA", R="ARG", N="ASN", D="ASP", C="CYS", Q="GLN", E="GLU", G="GLY", H="HIS", I="ILE", L="LEU", K="LYS",
    M="MET", F="PHE", P="PRO", S="SER", T="THR", W="TRP", Y="TYR", V="VAL",
)  # fmt: skip


def seconds_of(function: Callable, *arguments, clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    function(*arguments)
    return clock() - start


def best(function: Callable, *arguments) -> float:
    return min(seconds_of(function, *arguments) for _ in range(REPEATS))


def parse_alone(paths: list[Path]) -> None:
    for path in paths:
        try:
            read_entry(path).protein("A")
        except StructureError:
            pass  # no chain A; the build parses such a file too


def build_all(structures: Path, out: Path) -> None:
    build(structures, out, overwrite=True)


def measure_floor(structures: Path, paths: list[Path], scratch: Path) -> tuple[float, float]:
    """(seconds of the parser alone, seconds of the build), each the best of REPEATS, in turns."""
    # Once before the clock counts: imports, the component dictionary, the page cache.
    parse_alone(paths)
    build_all(structures, scratch / "out")
    floors, builds = [], []
    for _ in range(REPEATS):
        floors.append(seconds_of(parse_alone, paths))
        builds.append(seconds_of(build_all, structures, scratch / "out"))
    return min(floors), min(builds)


def measure_parts(paths: list[Path], scratch: Path) -> dict[str, float]:
    """Seconds of each part of the build on these files, each part on its own."""
    entries = [entry for path in paths if "A" in (entry := read_entry(path)).chains]
    proteins = [(entry.protein("A"), entry.facts) for entry in entries]
    samples = [make_sample(protein, facts, {"file": "x", "sha256": "0" * 64}) for protein, facts in proteins]
    outcomes = [read_outcome(Job(path, path.name, path.name), Filters()) for path in paths]
    work = open_work(scratch / "parts", {})
    encoded = sorted(map(encode_sample, samples), key=lambda sample: sample.key)

    def read() -> None:
        for path in paths:
            gzip.decompress(path.read_bytes())

    def write() -> None:
        write_piece(work, [encode_outcome(path.name, o, {}) for path, o in zip(paths, outcomes)])
        write_shards(scratch / "parts", {"train": encoded}, samples_per_shard=1000, options={})

    reading = best(read)
    encoding = best(lambda: [encode_sample(sample) for sample in samples])
    return {
        "read and decompress": reading,
        "parse": best(parse_alone, paths) - reading,
        "checksum of the source": best(lambda: [file_sha256(path) for path in paths]),
        "questions and description": best(lambda: [(closed_questions(*p), describe(*p)) for p in proteins]),
        "encode": encoding,
        "write": best(write) - encoding,
    }


def measure_median(paths: list[Path], share: float = 0.3) -> tuple[int, float]:
    """(bytes of the median file, entries per second of the files around it) for reading, questions and encoding."""
    by_size = sorted(paths, key=lambda path: path.stat().st_size)
    margin = max(1, round(share * len(by_size) / 2))
    middle = by_size[max(0, len(by_size) // 2 - margin) : len(by_size) // 2 + margin]

    def work() -> None:
        for path in middle:
            encode_outcome("key", read_outcome(Job(path, path.name, path.name), Filters()), {})

    return by_size[len(by_size) // 2].stat().st_size, len(middle) / best(work)


def run_command(structures: Path, out: Path, launcher: list[str], workers: int) -> None:
    command = [*launcher, sys.executable, "launch/build_shards.py", "--structures", str(structures), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--workers", str(workers), "--overwrite"], cwd=REPOSITORY, env=environment, check=True,
        capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def measure_workers(paths: list[Path], copies: int, repeats: int, scratch: Path) -> dict:
    """One command against two workers on so many copies of the files, in turns; ratios of neighbours, their median."""
    many = scratch / "many"
    many.mkdir()
    write_copies(paths, copies, many)
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    launcher, workers = ([mpirun, "-n", "2"], 1) if mpirun else ([], 2)
    seconds, cpu = {"one": [], "two": []}, {"one": [], "two": []}
    for _ in range(repeats):
        for name, given in (("one", ([], 1)), ("two", (launcher, workers))):
            before = cpu_of_children()
            seconds[name].append(seconds_of(run_command, many, scratch / name, *given, clock=time.perf_counter))
            cpu[name].append(cpu_of_children() - before)
    ratios = [one / two for one, two in zip(seconds["one"], seconds["two"])]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    cores = {name: statistics.median(c / s for c, s in zip(cpu[name], seconds[name])) for name in seconds}
    return {
        "workers": "mpirun -n 2" if mpirun else "--workers 2",
        "worker_entries": copies * len(paths),
        "one_seconds": middle["one"],
        "two_seconds": middle["two"],
        "two_over_one": statistics.median(ratios),
        "two_over_one_of_each": ratios,
        "cpu_of_two_over_one": statistics.median(cpu["two"]) / statistics.median(cpu["one"]),
        # How much of a core the commands got: below 1 for one, or 2 for two, the machine was busy otherwise.
        "cores_used_by_one": cores["one"],
        "cores_used_by_two": cores["two"],
    }


def write_copies(paths: list[Path], copies: int, directory: Path) -> None:
    """Each file so many times over, as entries of their own: another id of four letters in the place of theirs."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    names = ("".join(letters) for letters in itertools.product("9", digits, digits, digits))
    for path in paths:
        content, own = gzip.decompress(path.read_bytes()), path.name.split(".")[0].encode()
        for name in itertools.islice(names, copies):
            renamed = content.replace(own.upper(), name.upper().encode())
            (directory / f"{name}.bcif.gz").write_bytes(gzip.compress(renamed, 1))


def cpu_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def write_demo_files(directory: Path, num_files: int = 60) -> None:
    """BinaryCIF of demo proteins: one chain A, backbone atoms only."""
    from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFFile

    for number, sample in enumerate(demo_samples(num_files, seed=0)):
        protein = dataclasses.replace(sample.protein, id=f"8{number:03d}")  # as long as PDB's
        rows = np.argwhere(np.isfinite(protein.backbone).all(axis=2))
        residues = [THREE_LETTERS[letter] for letter in protein.sequence]
        count = len(rows)
        site = dict(
            group_PDB=["ATOM"] * count,
            type_symbol=["NCC"[atom] for _, atom in rows],
            label_atom_id=[("N", "CA", "C")[atom] for _, atom in rows],
            label_alt_id=["."] * count,
            label_comp_id=[residues[residue] for residue, _ in rows],
            label_asym_id=["A"] * count,
            label_entity_id=["1"] * count,
            label_seq_id=rows[:, 0] + 1,
            auth_seq_id=rows[:, 0] + 1,
            auth_asym_id=["A"] * count,
            **{f"Cartn_{axis}": protein.backbone[rows[:, 0], rows[:, 1], n] for n, axis in enumerate("xyz")},
            occupancy=np.ones(count),
            B_iso_or_equiv=np.full(count, 20.0),
            pdbx_PDB_model_num=np.ones(count, int),
        )
        number = np.arange(1, len(residues) + 1)
        tables = {
            "entry": dict(id=[protein.id]),
            "exptl": dict(method=["X-RAY DIFFRACTION"]),
            "entity": dict(id=["1"], type=["polymer"]),
            "entity_poly": dict(entity_id=["1"], type=["polypeptide(L)"]),
            "entity_poly_seq": dict(entity_id=["1"] * len(residues), num=number, mon_id=residues),
            "struct_asym": dict(id=["A"], entity_id=["1"]),
            "atom_site": site,
        }
        block = BinaryCIFBlock({name: BinaryCIFCategory(columns) for name, columns in tables.items()})
        file = BinaryCIFFile({protein.id: block})
        path = directory / f"{protein.id}.bcif"
        file.write(path)
        path.with_suffix(".bcif.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def measure(source: Path | None, copies: int, repeats: int, scratch: Path) -> dict:
    structures = scratch / "structures"
    structures.mkdir()
    if source is None and REAL.is_dir():
        source = REAL
    if source is None:
        write_demo_files(structures)
    else:
        for path in sorted(source.rglob("*.bcif.gz")):
            shutil.copy(path, structures / path.name)
    paths = sorted(structures.iterdir())
    if not paths:
        sys.exit(f"benchmarks.build: no .bcif.gz file under {source}")
    floor, whole = measure_floor(structures, paths, scratch)
    parts = measure_parts(paths, scratch)
    median_bytes, median_rate = measure_median(paths)
    return {
        "benchmark": "build",
        "files": "demo proteins" if source is None else "real entries",
        "num_entries": len(paths),
        "entries_per_second_per_core": len(paths) / whole,
        "parser_entries_per_second_per_core": len(paths) / floor,
        "ratio": whole / floor,
        "median_file_bytes": median_bytes,
        "median_entries_per_second_per_core": median_rate,
        "seconds": {**parts, "the rest, and noise": whole - sum(parts.values())},
        **measure_workers(paths, copies, repeats, scratch),
    }


def lines_of(found: dict) -> list[str]:
    whole = found["num_entries"] / found["entries_per_second_per_core"]
    lines = [
        f"{found['num_entries']} BinaryCIF files ({found['files']}), one process",
        f"  the build        {found['entries_per_second_per_core']:6.1f} entries/s",
        f"  the parser alone {found['parser_entries_per_second_per_core']:6.1f} entries/s: the build takes "
        f"{found['ratio']:.2f} x as long (wanted: at most 1.5)",
        f"  around the median size, {found['median_file_bytes'] / 1000:.0f} kB: "
        f"{found['median_entries_per_second_per_core']:.1f} entries/s (wanted: at least 25)",
        f"where the {whole:.2f} s of CPU go",
    ]
    lines += [f"  {name:<26} {spent:6.3f} s  {spent / whole:6.1%}" for name, spent in found["seconds"].items()]
    return lines + [
        f"{found['worker_entries']} files: one process {found['one_seconds']:.1f} s, {found['workers']} "
        f"{found['two_seconds']:.1f} s: {found['two_over_one']:.2f} x (wanted: at least 1.8), in turns "
        + ", ".join(f"{ratio:.2f}" for ratio in found["two_over_one_of_each"]),
        f"  one process had {found['cores_used_by_one']:.2f} cores, two had {found['cores_used_by_two']:.2f}: where "
        "the machine is busy otherwise, the clock does not tell",
        f"  two took {found['cpu_of_two_over_one']:.2f} x the CPU of one, so {2 / found['cpu_of_two_over_one']:.2f} x "
        "on two free cores, dealt evenly",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=Path, help="a folder with .bcif.gz files")
    parser.add_argument("--copies", type=int, default=100, help="of each file, for the workers (default: 100)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of one worker and two (default: 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments.structures, arguments.copies, arguments.repeats, Path(scratch))
    print("\n".join(lines_of(found)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
