"""The real command, in a process of its own, on hand-made structure files, some of them broken."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

from proteingpt.data.assemble import BuildOptions
from proteingpt.data.filters import Filters
from proteingpt.data.rcsb import Addresses
from proteingpt.data.shards import ShardSet
from proteingpt.data.sources import Sources

REPOSITORY = Path(__file__).parents[2]
THREE_LETTERS = dict(A="ALA", C="CYS", D="ASP", G="GLY", K="LYS")


def pdb_text(entry: str, chain: str, letters: str) -> str:
    sequence = "".join(f" {THREE_LETTERS[letter]}" for letter in letters)
    lines = [
        f"HEADER    TRANSPORT PROTEIN                       02-JAN-94   {entry.upper()}",
        f"TITLE     STRUCTURE OF {entry.upper()}",
        f"SEQRES   1 {chain} {len(letters):4d} {sequence}",
    ]
    for number, letter in enumerate(letters, 1):
        for offset, name in enumerate(("N", "CA", "C")):
            lines.append(
                f"ATOM  {3 * number + offset:5d}  {name:<3s} {THREE_LETTERS[letter]} {chain}{number:4d}    "
                f"{3.8 * number + offset:8.3f}{1.0:8.3f}{2.0:8.3f}{1.0:6.2f}{10.0:6.2f}           {name[0]}"
            )
    return "\n".join(lines + ["TER", "END", ""])


def cif_text(entry: str, letters: str) -> str:
    rows = "\n".join(
        f"ATOM {name[0]} {name} {THREE_LETTERS[letter]} A {number} {number} {3.8 * number + offset:.3f} 1.0 2.0"
        for number, letter in enumerate(letters, 1)
        for offset, name in enumerate(("N", "CA", "C"))
    )
    columns = "group_PDB type_symbol label_atom_id label_comp_id label_asym_id label_seq_id auth_seq_id".split()
    header = "\n".join(f"_atom_site.{column}" for column in columns + ["Cartn_x", "Cartn_y", "Cartn_z"])
    return f"data_{entry.upper()}\n_entry.id {entry.upper()}\n#\nloop_\n{header}\n{rows}\n#\n"


@pytest.fixture
def structures(tmp_path):
    directory = tmp_path / "structures"
    directory.mkdir()
    for n in range(1, 5):
        (directory / f"{n}abc.pdb").write_text(pdb_text(f"{n}abc", "A", "ACDG" + "K" * n))
    (directory / "5abc.cif").write_text(cif_text("5abc", "ACDGG"))
    (directory / "6cut.cif").write_text(cif_text("6cut", "ACDGG")[:-30])
    (directory / "7txt.pdb").write_text("This is no structure.\n")
    (directory / "8chb.pdb").write_text(pdb_text("8chb", "B", "ACDG"))
    return directory


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/build_shards.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_command_builds_shards_and_says_what_it_left_out(structures, tmp_path):
    out = tmp_path / "out"
    done = run("--structures", structures, "--out", out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "8 structure files, 8 entries, 5 samples, 3 skipped" in done.stdout
    assert "skipped, unreadable: 2" in done.stdout and "skipped, no such protein chain: 1" in done.stdout
    assert "train: 4 samples" in done.stdout and "test: 1 samples" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "deepspeed launch/train.py --ds_config ds_configs/zero2.json --recipe" in last
    assert last.endswith(f"--data {out}")
    assert "8/8 entries" in done.stderr and "3 skipped" in done.stderr
    keys = sum((list(ShardSet(out, split).keys) for split in ("train", "test")), [])
    assert sorted(keys) == ["1abc_A", "2abc_A", "3abc_A", "4abc_A", "5abc_A"]
    rows = [line.split("\t") for line in (out / "skipped.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["6cut.cif", "7txt.pdb", "8chb.pdb"] and all(row[3] and row[4] for row in rows)
    assert json.loads((out / "report.json").read_text())["num_skipped"] == 3


def test_the_command_ends_with_a_message_and_a_code_when_it_refuses(structures, tmp_path):
    out = tmp_path / "out"
    refused = run("--structures", structures, "--out", out, "--chain", "Z")
    assert refused.returncode == 1 and refused.stdout == ""
    assert "build_shards: none of 8 entries gave a sample" in refused.stderr and "Traceback" not in refused.stderr
    assert run("--structures", structures, "--out", out).returncode == 0
    again = run("--structures", structures, "--out", out)
    assert again.returncode == 1 and "already holds shards" in again.stderr and "--overwrite" in again.stderr
    assert run("--structures", structures, "--out", out, "--overwrite").returncode == 0


def shards(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/shards.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_verify_and_info_of_what_was_built(structures, tmp_path):
    out = tmp_path / "out"
    assert run("--structures", structures, "--out", out, "--min_residues", 6).returncode == 0
    whole = shards("verify", out)
    assert whole.returncode == 0 and whole.stdout.strip() == f"{out}: whole"
    shown = shards("info", out)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"wanted length +3\n", shown.stdout) and re.search(r"1-50 +3 +#", shown.stdout)
    assert re.search(r"3  How many residues does this protein chain have\?", shown.stdout)
    root = ElementTree.parse(out / "info.svg").getroot()
    assert any(element.text == "wanted length" for element in root.iter())
    # The picture is no fault of the shards; a flipped byte is.
    tar = out / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    broken = shards("verify", out)
    assert broken.returncode == 1 and "train-00000.tar: wrong sha256" in broken.stdout
    nowhere = shards("info", out, "--picture", tmp_path / "none" / "x.svg")
    assert nowhere.returncode == 1 and "No such file" in nowhere.stderr and "Traceback" not in nowhere.stderr
    (out / "report.json").write_text('{"funnel": 3')
    torn = shards("info", out)
    assert torn.returncode == 1 and "report.json: not the report of a build" in torn.stderr
    nothing = shards("verify", tmp_path)
    assert nothing.returncode == 1 and "no shards in" in nothing.stderr and "Traceback" not in nothing.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(tmp_path, workers):
    """SIGINT to the whole process group, as a terminal sends it."""
    directory, out = tmp_path / "structures", tmp_path / "out"
    directory.mkdir()
    for n in range(900):
        (directory / f"{n:03d}a.pdb").write_text(pdb_text(f"{n:03d}a", "A", "ACDGK" * 2))
    command = [sys.executable, "launch/build_shards.py", "--structures", directory, "--out", out, "--workers", workers]
    process = subprocess.Popen(
        [*map(str, command)], cwd=REPOSITORY, start_new_session=True, text=True, stderr=subprocess.PIPE
    )
    try:
        while process.poll() is None and not list((out / ".build").glob("*[0-9a-f].json")):
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    last = said.splitlines()[-1]
    assert last == "build_shards: interrupted; what was read is kept, the same command goes on"
    # A worker that was still being started may say more.
    assert workers == 2 or "Traceback" not in said
    again = run("--structures", directory, "--out", out)
    assert again.returncode == 0 and "were read by an earlier start" in again.stdout, again.stderr
    # It was no file's fault.
    assert "ended while" not in again.stderr


def test_help_explains_every_option():
    shown = run("--help").stdout
    for field in [*fields(Filters), *fields(Sources), *fields(BuildOptions)]:
        if field.name not in ("filters", "addresses"):
            assert f"--{field.name} " in shown or f"--{field.name}]" in shown, field.name
    for option in ("out", "max_failed_share", "overwrite", "workers", *(f"{f.name}_url" for f in fields(Addresses))):
        assert f"--{option}" in shown
