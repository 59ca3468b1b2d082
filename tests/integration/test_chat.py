"""launch/chat.py as it is typed: in a terminal of its own, in scripts, and on its page in a real browser."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from browser import ABSENT, browser
from commands import REPOSITORY, environment
from exported import export_model

import proteingpt
from proteingpt.data.shards import ShardSet
from proteingpt.inference.chat import main
from proteingpt.inference.conversation import NOTE, printable

QUESTION = "What is the first residue of this protein?"
TOKENS = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory, demo_assets):
    return export_model(tmp_path_factory.mktemp("chat") / "model", demo_assets, seed=1)


@pytest.fixture(scope="module")
def expected(model, demo_assets):
    """The answer, by the three lines of Python that the model is loaded with."""
    assistant = proteingpt.load(model, device="cpu", max_new_tokens=12)
    protein = proteingpt.read_protein(demo_assets / "example.pdb")
    return assistant.ask(protein, [QUESTION])[0]


# ------------------------------------------------------------------------------------------------------------- scripts


def test_one_json_object_a_line(model, demo_assets, expected, capsys):
    arguments = ["--model", str(model), "--structure", str(demo_assets / "example.pdb"), *TOKENS, "--json"]
    assert main([*arguments, "--question", QUESTION, "--question", "What\nelse?"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"protein": "example_A", "question": QUESTION, "answer": expected, "missing": []}
    assert second["question"] == "What\nelse?" and second.keys() == first.keys()


def test_a_sequence_alone_is_answered_and_says_what_is_missing(model, demo_assets, capsys):
    sequence = ShardSet(demo_assets, "test").read(0).protein.sequence
    assert main(["--model", str(model), "--sequence", sequence, *TOKENS, "--question", QUESTION]) == 0
    written = capsys.readouterr()
    assert len(written.out) > 1 and written.err.startswith(
        "note: sequence: No structure: the model gets the sequence alone"
    )


def test_one_bad_file_of_two_is_named_and_the_other_answered(model, demo_assets, expected, tmp_path, capsys):
    (tmp_path / "bad.cif").write_text("data_x\n")
    files = [str(tmp_path / "bad.cif"), str(demo_assets / "example.pdb")]
    assert main(["--model", str(model), "--structure", *files, *TOKENS, "--question", QUESTION]) == 1
    written = capsys.readouterr()
    assert written.out == expected + "\n" and written.err.startswith(f"error: {files[0]}: ")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--json",), "--json is for questions asked once"),
        (("--question", "x"), "give --structure FILE or --sequence LETTERS"),
        (("--structure", "a", "b", "--sequence", "MK"), "--sequence belongs to one protein, and --structure names 2"),
        (("--web", "--question", "x"), "--web takes proteins and questions on its page"),
        (("--sequence", "M1"), "'1' at position 2 of the sequence"),
        (("--sequence", "nowhere.fasta"), "neither letters nor a FASTA file that can be read"),
        (("--sequence", "MK", "--temperature", "-1"), "temperature -1.0"),
        (("--sequence", "MK"), "nowhere holds no model.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, says, capsys):
    assert main(["--model", "nowhere", *arguments]) == 1
    written = capsys.readouterr().err
    assert written.startswith("error: ") and says in written and written.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ terminal


class Terminal:
    """A process that believes to talk to a person, by a pseudo-terminal. Keeps what was written, and when."""

    def __init__(self, *arguments):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(REPOSITORY)
            os.execvpe(
                sys.executable, [sys.executable, "launch/chat.py", *arguments], {**environment(), "TERM": "dumb"}
            )
        self.pieces: list[str] = []

    def until(self, wanted: str, seconds: float = 60) -> str:
        """What is written until it ends with `wanted`."""
        text, end = "", time.monotonic() + seconds
        while not text.endswith(wanted):
            assert time.monotonic() < end, f"no {wanted!r} in {text!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.pieces.append(os.read(self.terminal, 4096).decode(errors="replace").replace("\r\n", "\n"))
                text += self.pieces[-1]
        return text

    def say(self, line: str, prompt: str = "example_A> ") -> str:
        """What is answered: the echo of the line and the next prompt left out."""
        os.write(self.terminal, line.encode() + b"\n")
        return self.until("\n" + prompt).partition("\n")[2].removesuffix(prompt).removesuffix("\n")

    def end(self) -> int:
        os.write(self.terminal, b"\x04")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.terminal)


@contextmanager
def typed(*arguments):
    terminal = Terminal(*map(str, arguments))
    try:
        yield terminal
    finally:
        terminal.close()


def test_a_conversation_in_a_terminal(model, demo_assets, expected, tmp_path):
    """All of it in one process: streaming, several proteins, bad files without a traceback, history, saving, Ctrl-C,
    Ctrl-D."""
    with typed("--model", model, "--structure", demo_assets / "example.pdb", *TOKENS) as chat:
        begin = chat.until("example_A> ")
        assert "example_A: 57 residues" in begin and NOTE in begin and "/help" in begin
        num_pieces = len(chat.pieces)
        shown = printable(expected)  # without what a terminal would obey
        assert chat.say(QUESTION) == shown
        assert len(chat.pieces) - num_pieces > 3  # token by token
        (tmp_path / "cut.cif").write_text("data_x\nloop_\n_atom_site.id\n1")
        for line, says in (
            ("/load /nowhere.pdb", "error: /nowhere.pdb: cannot be opened"),
            (f"/load {tmp_path}/cut.cif", f"error: {tmp_path}/cut.cif: "),
            (f"/load {demo_assets}/example.pdb Q", "the polypeptide chains are: A"),
            ('/load "', "not understood"),
            ("/load", "not understood"),
            ("/sequence M1", "'1' at position 2"),
            ("/with MK", "has 2 residues, and chain A of example has 57"),
            ("/use nobody", "nobody is not loaded: example_A"),
            ("/nonsense", "/nonsense is no command"),
            ("/help", "/load FILE [CHAIN]"),
        ):
            said = chat.say(line)
            assert says in said and "Traceback" not in said, line
        assert "No structure" in chat.say("/sequence MKTAYIAKQR mine", "mine> ")
        other = chat.say(QUESTION, "mine> ")
        assert other != shown
        assert "called example_A-2" in chat.say(f"/load {demo_assets}/example.pdb", "example_A-2> ")
        (tmp_path / "own.fasta").write_text(">own\n" + "W" * 57 + "\n")
        assert "residues given differ from the file's" in chat.say(
            f"/with {tmp_path}/own.fasta", "example_A+sequence> "
        )
        chat.say("/use example_A")
        names = [line.split()[0] for line in chat.say("/list").replace("*", " ").splitlines()]
        assert names == ["example_A", "mine", "example_A-2", "example_A+sequence"]
        assert chat.say("/history") == f"example_A> {QUESTION}\n{shown}\nmine> {QUESTION}\n{other}"
        chat.say(f"/save {tmp_path}/talk.json")
        assert "is there already" in chat.say(f"/save {tmp_path}/talk.json")
        saved = json.loads((tmp_path / "talk.json").read_text())
        kept = [(one["protein"], printable(one["answer"])) for one in saved["exchanges"]]
        assert kept == [("example_A", shown), ("mine", other)]
        assert chat.say("\x03") in ("", "^C")  # an interrupt at the prompt ends nothing
        assert chat.end() == 0


# ---------------------------------------------------------------------------------------------------------------- page


@contextmanager
def page(model):
    command = [sys.executable, "launch/chat.py", "--model", str(model), "--web", *TOKENS]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        yield re.fullmatch(r"page: (http://127\.0\.0\.1:\d+/)\n", process.stdout.readline())[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            rest, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        assert process.returncode == 0 and rest == "\n"


DRAWN = """
const canvas = document.querySelector('#viewer canvas');
if (!canvas) return 0;
const copy = document.createElement('canvas');
[copy.width, copy.height] = [canvas.width, canvas.height];
const context = copy.getContext('2d');
context.drawImage(canvas, 0, 0);
const data = context.getImageData(0, 0, copy.width, copy.height).data;
let coloured = 0;
for (let i = 0; i < data.length; i += 4)
  coloured += Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 60;
return coloured;
"""


@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_the_page_in_a_browser(model, demo_assets, expected, tmp_path):
    """Upload, see, ask, watch, save, as a reader does it; one start of the browser for all of it."""
    (tmp_path / "bad.pdb").write_text("<img src=x onerror=alert(1)>")
    hostile = tmp_path / "x<img src=x onerror=document.title='owned'>.pdb"
    hostile.write_bytes((demo_assets / "example.pdb").read_bytes())
    with page(model) as url, browser(tmp_path) as web:
        web.size(1280, 860)
        web.open(url)
        web.wait("return document.body.dataset.ready === 'yes'")
        assert web.text("#model") == str(model) and NOTE in web.text("#note")

        web.type("#file", str(tmp_path / "bad.pdb"))
        assert "bad.pdb: neither mmCIF" in web.wait(
            "return document.querySelector('#trouble:not([hidden])')?.textContent"
        )

        web.type("#file", str(demo_assets / "example.pdb"))
        web.wait("return document.querySelector('#summary').textContent.startsWith('example_A: 57 residues')")
        assert web.run("return document.querySelector('#trouble').hidden")
        assert web.wait(DRAWN) > 500  # pixels of a colour, on a grey background

        web.run(
            "window.seen = []; new MutationObserver(() => seen.push([...document.querySelectorAll('.answer')].at(-1)"
            ".textContent)).observe(document.querySelector('#log'), "
            "{childList: true, subtree: true, characterData: true})"
        )
        web.type("#question", QUESTION + "\n")
        web.wait("return exchanges.length === 1")
        assert web.text(".answer") == expected and web.text(".question") == QUESTION
        assert len({text for text in web.run("return seen") if text}) > 3  # it grew under the reader's eyes

        web.type("#sequence", "MKTAYIAKQR")
        web.click("#with")
        said = web.wait("return document.querySelector('#trouble:not([hidden])')?.textContent")
        assert "has 10 residues, and chain A of example has 57" in said
        web.click("#read")
        web.wait("return document.querySelector('#summary').textContent.startsWith('sequence: 10 residues')")
        assert "No structure" in web.text("#missing") and "nothing to draw" in web.text("#legend")
        web.type("#question", "<b>Which</b> one?")
        web.click("#send")
        web.wait("return exchanges.length === 2")
        assert web.run("return document.querySelectorAll('#log b').length") == 0

        web.type("#file", str(hostile))
        web.wait("return proteins.length === 3")
        assert (
            web.run("return document.title") == "ProteinGPT"
            and web.run("return document.querySelectorAll('img').length") == 0
        )
        assert web.wait(DRAWN) > 500  # drawn again after there was nothing to draw

        web.type("#sequence", "W" * 57)
        web.click("#with")
        web.wait("return proteins.length === 4")
        assert "residues given differ from the file's" in web.text("#missing") and web.run(
            "return current.name"
        ).endswith("+sequence")
        assert not web.run("return document.querySelector('#sequence').value")

        for button, name in (("#save-json", "conversation.json"), ("#save-markdown", "conversation.md")):
            web.click(button)
            end = time.monotonic() + 20
            while not (tmp_path / name).exists():
                assert time.monotonic() < end, name
                time.sleep(0.05)
        saved = json.loads((tmp_path / "conversation.json").read_text())
        assert [(one["protein"], one["question"]) for one in saved["exchanges"]] == [
            ("example_A", QUESTION), ("sequence", "<b>Which</b> one?")
        ]  # fmt: skip
        assert saved["exchanges"][0]["answer"] == expected and "No structure" in saved["exchanges"][1]["missing"][0]
        assert QUESTION in (tmp_path / "conversation.md").read_text()

        web.size(390, 844)
        assert web.run("return document.documentElement.scrollWidth") <= 390  # a phone: nothing sticks out
        colour = "return getComputedStyle(document.body).backgroundColor"
        light = web.run(colour)
        web.dark(True)
        assert web.run(colour) != light
        # the content policy refused nothing
        assert [text for text in web.complaints() if "status of 422" not in text] == []
