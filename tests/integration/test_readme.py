"""The README's commands run: those for real work with small data and models in place of the user's own."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import REPOSITORY, execute, workplace

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# Indented lines, and what stands between back-ticks in a sentence; a trailing backslash joins lines.
BLOCKS = re.findall(r"^    (.+)$", TEXT.replace("\\\n", " "), flags=re.MULTILINE)
COMMANDS = [" ".join(line.split()) for line in BLOCKS if re.match(r"(python|deepspeed) launch/|make ", line)]
TRAIN = [command for command in COMMANDS if command.startswith("deepspeed")]


def test_the_two_commands_are_targets_of_the_makefile():
    assert {c.split()[1] for c in COMMANDS if c.startswith("make")} == {"train", "test"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/" in c])
def test_every_option_in_a_command_is_one_that_its_program_has(command, tmp_path):
    words = shlex.split(command.split("launch/", 1)[1])
    program = ["python", f"launch/{words[0]}", *[w for w in words[1:2] if words[0] == "shards.py"], "--help"]
    shown = execute(shlex.join(program), workplace(tmp_path))
    assert shown.returncode == 0, shown.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.stdout, f"{option} of {command!r}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_assets):
    """A folder in which the README's paths hold: shards/pdb and models/vicuna-7b are the demo's."""
    folder = workplace(tmp_path_factory.mktemp("readme"))
    (folder / "shards").mkdir()
    (folder / "shards" / "pdb").symlink_to(demo_assets)
    (folder / "models").mkdir()
    (folder / "models" / "vicuna-7b").symlink_to(demo_assets / "llm")
    return folder


def small(demo_assets: Path, stage: str) -> str:
    return (
        f" --encoders.esm2 {demo_assets}/esm2_demo.pt --encoders.esm_if1 {demo_assets}/esm_if1_demo.pt"
        f" --{stage}.max_steps 2 --evaluation.num_proteins 2 --evaluation.max_new_tokens 4"
    )


def test_align_then_instruct_then_ask(place, demo_assets):
    """The three real commands, one after the other, as they stand but for the encoders' weights and the length."""
    assert [re.search(r"--recipe (\S+)", command)[1] for command in TRAIN] == ["paper-align", "paper-instruct"]
    cache = next(command for command in COMMANDS if "launch/cache_embeddings.py" in command)
    encoders = f" --esm2 {demo_assets}/esm2_demo.pt --esm-if {demo_assets}/esm_if1_demo.pt"
    cached = execute(cache + encoders, place)
    assert cached.returncode == 0, cached.stderr[-3000:]
    for command, stage in zip(TRAIN, ("align", "instruct")):
        process = execute(command + small(demo_assets, stage), place)
        assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((place / "runs/paper-instruct/report.json").read_text())
    assert report["steps_by_stage"] == {"instruct": 2} and report["num_questions"] == 16
    evaluate = next(command for command in COMMANDS if "launch/evaluate.py" in command)
    scored = execute(f"{evaluate} --proteins 2 --max-new-tokens 4", place)
    assert scored.returncode == 0 and (place / "report/index.html").is_file(), scored.stderr[-3000:]
    ask = next(command for command in COMMANDS if "launch/chat.py" in command)
    asked = execute(ask.replace("1cbs.cif", str(demo_assets / "example.pdb")), place)
    assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr


def test_shards_are_built_verified_and_shown(tmp_path, demo_assets):
    folder = workplace(tmp_path)
    (folder / "DIR").mkdir()
    for name in ("one", "two", "six"):
        (folder / "DIR" / f"{name}.pdb").write_text((demo_assets / "example.pdb").read_text())
    for command in [c for c in COMMANDS if "--structures DIR" in c or "launch/shards.py" in c]:
        process = execute(command, folder)
        assert process.returncode == 0, f"{command}: {process.stderr}"
