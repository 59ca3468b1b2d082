"""The build on hand-made PDB and mmCIF files: whole, in several processes, going on, and refused."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from hashlib import blake2b

import numpy as np
import pytest
from entry_files import BAD, GOOD, pdb_text, skipped_rows, write_files

from proteingpt.data.build import BuildError, _mpi_world, _name_dead, build, parse_batch, world_size
from proteingpt.data.crew import Crew
from proteingpt.data.filters import Filters
from proteingpt.data.pieces import holding, job_key, take_notes
from proteingpt.data.shards import ShardSet, find_faults
from proteingpt.data.sources import Job
from proteingpt.protein import Turn


def test_a_sample_holds_what_stands_in_its_file(structures, tmp_path):
    report = build(structures, tmp_path / "out", test_fraction=0)
    shard_set = ShardSet(tmp_path / "out", "train")
    assert shard_set.keys == ["1abc_A", "2abc_A", "3abc_A", "4abc_A", "5abc_A"] and report.samples["test"] == 0
    sample = shard_set.read(0)
    assert sample.protein.sequence == "ACDEFGK"
    assert sample.protein.resolved.tolist() == [False] + [True] * 6
    np.testing.assert_allclose(sample.protein.backbone[1, :, 0], [7.6, 8.6, 9.6], rtol=1e-6)
    assert Turn("How many residues does this protein chain have?", "7") in sample.turns
    assert Turn("How many residues of this protein chain are unresolved?", "1") in sample.turns
    assert Turn("What is the resolution in angstroms for this protein?", "1.8") in sample.turns
    assert "STRUCTURE OF 1ABC" in sample.description
    assert sample.metadata["source"]["file"] == "1abc.pdb" and len(sample.metadata["source"]["sha256"]) == 64
    assert sample.metadata["facts"]["methods"] == ["X-RAY DIFFRACTION"]


def test_every_entry_is_a_sample_or_a_skip_with_file_and_reason(structures, tmp_path):
    out = tmp_path / "out"
    report = build(structures, out)
    assert report.num_entries == 11 and report.num_samples == 5 and len(report.skips) == 6
    assert {(skip.file, skip.reason) for skip in report.skips} == {
        ("6bad.cif", "unreadable"),
        ("6emp.cif", "unreadable"),
        ("6noa.pdb", "no such protein chain"),
        ("6cao.pdb", "chain unusable"),
        ("6unk.pdb", "no standard residue"),
        ("6dot.v2.cif", "bad key"),
    }
    assert all(skip.detail for skip in report.skips)
    rows = skipped_rows(out)
    assert rows[0] == ["file", "entry", "chain", "reason", "detail"]
    assert sorted(row[0] for row in rows[1:]) == sorted(BAD)
    written = json.loads((out / "report.json").read_text())
    assert (written["num_entries"], written["num_samples"], written["num_skipped"]) == (11, 5, 6)
    assert written["skipped"]["unreadable"] == 2 and written["samples"] == report.samples


def test_the_bytes_do_not_depend_on_the_number_of_workers(structures, tmp_path):
    for workers in (1, 2):
        build(structures, tmp_path / f"out{workers}", workers=workers, samples_per_shard=2)
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert "train-00001.tar" in names and names == sorted(path.name for path in (tmp_path / "out2").iterdir())
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


def test_a_mended_file_is_read_when_the_build_goes_on(tmp_path):
    """What a build keeps of an entry is known by all of its files."""
    files = {"1abc.cif": "", "1abc.pdb": pdb_text("1abc", {"A": "GGG"}), "2abc.pdb": pdb_text("2abc", {"A": "GGG"})}
    structures = write_files(tmp_path / "structures", files)
    jobs = [Job(structures / "1abc.cif", "1abc.cif", "1abc", others=((structures / "1abc.pdb", "1abc.pdb"),))]
    before = job_key(jobs[0], Filters())
    assert job_key(jobs[0], Filters()) == before
    write_files(structures, {"1abc.pdb": pdb_text("1abc", {"A": "GGGG"})})
    assert job_key(jobs[0], Filters()) != before


def test_a_parsing_process_that_dies_is_named_with_the_file_it_had(tmp_path):
    """A worker is killed while it waits for a file that does not come (a pipe nobody writes to)."""
    os.mkfifo(tmp_path / "1abc.cif")
    work = tmp_path / "work"
    work.mkdir()
    stranger = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    stranger.start()

    def kill_reader() -> None:
        while not (notes := [note for note in work.glob("reading-*") if note.read_text()]):
            time.sleep(0.01)
        os.kill(int(notes[0].name.rpartition("-")[2]), signal.SIGKILL)

    threading.Thread(target=kill_reader, daemon=True).start()
    jobs = [("key", Job(tmp_path / "1abc.cif", "1abc.cif", "1abc"))]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        crew = Crew(executor, 1, here=False)
        with pytest.raises(BrokenProcessPool):
            list(crew.run(partial(parse_batch, filters=Filters(), work=work), [jobs]))
    message = _name_dead(work, crew)
    # Waiting for children that are none of the crew's would take as long as they live.
    assert stranger.is_alive() and stranger not in crew.processes
    stranger.kill()
    stranger.join()
    assert "died while reading 1abc.cif (process" in message and "ended with -9" in message


def test_another_start_takes_up_what_was_parsed_unless_the_file_has_changed(structures, tmp_path):
    with pytest.raises(BuildError, match="more than max_failed_share"):
        build(structures, tmp_path / "out", max_failed_share=0)
    (structures / "5abc.pdb").write_text(pdb_text("5abc", {"A": "GGGG"}))
    report = build(structures, tmp_path / "out", test_fraction=0)
    assert report.num_continued == 10
    assert ShardSet(tmp_path / "out", "train").read(4).protein.sequence == "GGGG"
    assert not (tmp_path / "out" / ".build").exists()


def test_a_damaged_piece_is_parsed_again(structures, tmp_path):
    with pytest.raises(BuildError, match="more than max_failed_share"):
        build(structures, tmp_path / "out", max_failed_share=0)
    (piece,) = (tmp_path / "out" / ".build").glob("*.data")
    piece.write_bytes(piece.read_bytes()[:-1])
    assert build(structures, tmp_path / "out").num_continued == 0
    assert find_faults(tmp_path / "out") == []


def test_shards_are_overwritten_only_when_asked(structures, tmp_path):
    out = tmp_path / "out"
    build(structures, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(BuildError, match="already holds shards .*--overwrite"):
        build(structures, out, seed=1)
    assert (out / "manifest.json").read_bytes() == before
    build(structures, out, seed=1, overwrite=True)
    assert json.loads((out / "manifest.json").read_text())["options"]["seed"] == 1
    ShardSet(out, "train").verify()


def test_a_second_build_into_the_same_directory_is_refused_while_the_first_runs(structures, tmp_path):
    with holding(tmp_path / "out"), pytest.raises(BuildError, match="another build writes to .*wait for it"):
        build(structures, tmp_path / "out")
    build(structures, tmp_path / "out")
    assert not (tmp_path / "out" / ".building").exists()


def test_a_full_disk_is_not_laid_to_the_file_that_was_read(structures, tmp_path):
    """/dev/full gives the system's own error, here in the place of the piece of this job."""
    work = tmp_path / "out" / ".build"
    work.mkdir(parents=True)
    path = structures / "1abc.pdb"
    job = Job(path, path.name, "1abc")
    name = blake2b(job_key(job, Filters()).encode(), digest_size=16).hexdigest()
    (work / f"{name}.data.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        parse_batch([(job_key(job, Filters()), job)], Filters(), work)
    assert take_notes(work) == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chain": ""}, "chain is ''"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"min_residues": 0}, "min_residues is 0"),
        ({"max_residues": 3, "min_residues": 4}, "max_residues 3 is less than min_residues 4"),
        ({"max_failed_share": 2}, "max_failed_share is 2"),
        ({"max_resolution": 0}, "max_resolution is 0"),
        ({"shard_mb": 0}, "shard_mb is 0"),
        ({"seconds_per_file": 0}, "seconds_per_file is 0"),
        ({"seconds_per_file": math.inf}, "seconds_per_file is inf"),
        ({"split": "random"}, "split is 'random', wanted one of paper, date, cluster, published"),
        ({"test_from": "2020-01-01"}, "test_from goes with split date"),
        ({"test_from": "2020-1-1", "split": "date"}, "test_from is '2020-1-1', wanted a day"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(structures, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        build(structures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_directories_are_named(tmp_path):
    with pytest.raises(BuildError, match="no directory .*none"):
        build(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="no structure file in .*empty"):
        build(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(BuildError, match="no source: give --structures"):
        build(None, tmp_path / "out")
    write_files(tmp_path / "one", {"1abc.pdb": GOOD["1abc.pdb"]})
    # One entry is trained on, whatever the share; by a date all may be new.
    assert build(tmp_path / "one", tmp_path / "out", test_fraction=0.9).samples == {"train": 1, "test": 0}
    with pytest.raises(BuildError, match="date split of 1 entries leaves none to train on"):
        build(tmp_path / "one", tmp_path / "out2", split="date", test_from="1990-01-01")


@pytest.mark.parametrize(
    "environ, size",
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),
        ({"PMI_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 3),
        # In the batch shell of an sbatch job: tasks are allotted, but srun has started none.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
    ],
)
def test_launchers_are_known_by_their_environment(environ, size):
    assert world_size(environ) == size


def test_ranks_without_mpi_are_refused_rather_than_each_building_everything():
    """srun without PMI: here MPI either is not installed or sees one process; both must be told."""
    with pytest.raises(BuildError, match="3 processes"):
        _mpi_world({"SLURM_STEP_NUM_TASKS": "3"})
    assert _mpi_world(dict(os.environ) | {"SLURM_STEP_NUM_TASKS": "1"}) is None
