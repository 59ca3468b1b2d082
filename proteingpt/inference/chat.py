"""launch/chat.py: ask a trained model about proteins, once, in a conversation in the terminal, or on a page.

Answers stream token by token. The conversation is kept for its reader, and is not fed to the model (see
conversation.py). """

import argparse
import contextlib
import inspect
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import transformers

from proteingpt.inference import subject
from proteingpt.inference.assistant import USER_ERRORS, Assistant
from proteingpt.inference.conversation import NOTE, Exchange, SaveError, printable, save
from proteingpt.inference.generate import Decoding
from proteingpt.inference.page import serve
from proteingpt.protein import Protein

HELP = """\
  /load FILE [CHAIN]        another protein, from a structure file; chain A, or the first, where none is named
  /sequence LETTERS [NAME]  another protein, from its sequence alone: letters, or a FASTA file
  /with LETTERS             the current structure, with this sequence in place of its file's
  /use NAME                 ask about that one
  /list                     the proteins that are loaded
  /history                  what was asked and answered
  /save FILE                write the conversation, as FILE.json or FILE.md
  /help                     this
Anything else is a question. Ctrl-C stops an answer, Ctrl-D ends. """


class OptionError(ValueError):
    """Options that do not go together."""


class Opened(NamedTuple):
    """notes: what a reader should know of it beside what is missing, in sentences."""

    protein: Protein
    notes: list[str]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python launch/chat.py", description="Ask a trained model about proteins.")
    parser.add_argument("--model", required=True, help="directory exported by training: RUN/model")
    parser.add_argument("--structure", nargs="+", default=[], help="PDB, mmCIF or BinaryCIF files, plain or gzipped")
    parser.add_argument("--chain", help="author chain id, or label:ID for mmCIF's own [A, or the first]")
    parser.add_argument(
        "--sequence", help="one-letter sequence or a FASTA file: alone, or in place of that of the one structure"
    )
    parser.add_argument("--question", action="append", help="may be repeated; without it a conversation begins")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: protein, question, answer, missing"
    )
    parser.add_argument("--max-new-tokens", type=int, default=300, help="longest answer, in tokens [300]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share [1]")
    parser.add_argument("--seed", type=int, default=42, help="of the draws [42]")
    parser.add_argument("--web", action="store_true", help="serve a page: upload, see, ask")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page [127.0.0.1: this machine alone]")
    parser.add_argument("--port", type=int, default=0, help="of the page [0: any free one]")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    transformers.logging.disable_progress_bar()
    try:
        proteins, refused = open_proteins(args)
        decoding = decoding_of(args)
        for message in refused:
            print(f"error: {message}", file=sys.stderr)
        if refused and not proteins:
            return 1
        assistant = Assistant.load(args.model, max_new_tokens=args.max_new_tokens, decoding=decoding)
        if args.web:
            return serve(assistant, args.model, args.host, args.port)
        if args.question is None:
            Terminal(assistant, args.model, proteins).run()
            return 0
        return max(bool(refused), answer_once(assistant, proteins, args.question, args.json))
    except (*USER_ERRORS, OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def decoding_of(args) -> Decoding:
    try:
        return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    except ValueError as error:
        raise OptionError(str(error)) from None


def open_proteins(args) -> tuple[list[Opened], list[str]]:
    """(proteins, what is wrong with those that cannot be read). Raises OptionError."""
    if args.web and (args.question or args.structure or args.sequence):
        raise OptionError(
            "--web takes proteins and questions on its page: leave --structure, --sequence, --question out"
        )
    if args.json and not args.question:
        raise OptionError("--json is for questions asked once: give --question too")
    if args.question and not (args.structure or args.sequence):
        raise OptionError("--question asks about a protein: give --structure FILE or --sequence LETTERS")
    if args.sequence and len(args.structure) > 1:
        raise OptionError(f"--sequence belongs to one protein, and --structure names {len(args.structure)}")
    letters = sequence_text(args.sequence) if args.sequence else ""
    if letters and not args.structure:
        return [Opened(subject.protein_of_sequence(letters), [])], []
    proteins, refused = [], []
    for path in args.structure:
        try:
            protein = subject.read_structure(path, args.chain)[1]
            proteins.append(combined(protein, letters) if letters else Opened(protein, []))
        except subject.USER_ERRORS as error:
            refused.append(str(error))
    return proteins, refused


def sequence_text(given: str) -> str:
    """Letters as they are; of the name of a FASTA file, what stands in it. Raises SubjectError."""
    if "." not in given or given.lstrip().startswith(">"):  # which no letter of a sequence is
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise subject.SubjectError(f"{given}: neither letters nor a FASTA file that can be read: {error}") from None


def combined(protein: Protein, letters: str) -> Opened:
    """A structure with a sequence given by hand. Raises SubjectError."""
    given = subject.with_sequence(protein, letters)
    return Opened(given, subject.differences(protein, given))


def answer_once(assistant: Assistant, proteins: list[Opened], questions: list[str], as_json: bool) -> int:
    """Answers on stdout, what was missing (with --json in its line) and what could not be asked on stderr."""
    failed = 0
    for protein, notes in proteins:
        name = subject.name_of(protein)
        try:
            notes, answers = [*notes, *assistant.missing(protein)], assistant.ask(protein, questions)
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        for note in () if as_json else notes:
            print(f"note: {name}: {note}", file=sys.stderr)
        for question, answer in zip(questions, answers, strict=True):
            exchange = Exchange(name, question, answer, tuple(notes))
            print(json.dumps(exchange.to_json(), ensure_ascii=False) if as_json else answer, flush=True)
    return failed


class Terminal:
    """A conversation. proteins: by their names, in the order they came; current: the one that is asked about."""

    def __init__(self, assistant: Assistant, model: str, proteins: list[Opened]):
        self.assistant, self.model = assistant, model
        self.proteins: dict[str, Opened] = {}
        self.current: str | None = None
        self.exchanges: list[Exchange] = []
        for opened in proteins:
            self.add(opened)

    def run(self):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  late: it changes what input() does, by line editing and recall
        print(f"{self.model}. {NOTE} /help lists the commands, Ctrl-D ends.")
        if self.current is None:
            print("Load a protein first: /load FILE [CHAIN], or /sequence LETTERS.")
        while True:
            try:
                line = input(f"{self.current or ''}> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            try:
                self.obey(line)
            except (*USER_ERRORS, SaveError) as error:
                print(f"error: {printable(str(error))}")

    def obey(self, line: str):
        if not line.startswith("/"):
            return self.ask(line) if line else None
        word, _, rest = line.partition(" ")
        commands = {
            "/load": self.load, "/sequence": self.paste, "/with": self.combine, "/use": self.use, "/list": self.list,
            "/history": self.history, "/save": self.save, "/help": lambda: print(HELP),
        }  # fmt: skip
        if word not in commands:
            print(f"{word} is no command: {', '.join(commands)}")
            return
        try:
            words = inspect.signature(commands[word]).bind(*shlex.split(rest)).args
        except (TypeError, ValueError):  # too many, too few, or a quote that is not closed
            print(f"{word} {rest}: not understood; /help shows how it is used")
            return
        commands[word](*words)

    def add(self, opened: Opened, name: str | None = None):
        """Under a name of its own; it becomes the current one. Says what of it is missing."""
        protein = opened.protein
        notes = [*opened.notes, *self.assistant.missing(protein)]
        name = wanted = printable(name or subject.name_of(protein))
        number = 1
        while name in self.proteins:
            number += 1
            name = f"{wanted}-{number}"
        self.proteins[name], self.current = Opened(protein, notes), name
        print(printable(f"{subject.summary(protein)}{'' if name == subject.name_of(protein) else f', called {name}'}."))
        for note in notes:
            print(f"  note: {note}")

    def load(self, file, chain=None):
        self.add(Opened(subject.read_structure(Path(file).expanduser(), chain)[1], []))

    def paste(self, letters, name=None):
        self.add(Opened(subject.protein_of_sequence(sequence_text(letters)), []), name)

    def combine(self, letters):
        if self.current is None:
            print("no structure is loaded that it could go with: /load FILE [CHAIN]")
            return
        given = combined(self.proteins[self.current].protein, sequence_text(letters))
        self.add(given, subject.name_of(given.protein) + subject.WITH_SEQUENCE)

    def use(self, name):
        if name not in self.proteins:
            print(f"{name} is not loaded: {', '.join(self.proteins) or 'nothing is'}")
            return
        self.current = name

    def list(self):
        for name, (protein, _) in self.proteins.items():
            print(f"{'*' if name == self.current else ' '} {name}  ({printable(subject.summary(protein))})")
        if not self.proteins:
            print("nothing is loaded: /load FILE [CHAIN]")

    def history(self):
        for one in self.exchanges:
            print(printable(f"{one.protein}> {one.question}\n{one.answer}"))
        if not self.exchanges:
            print("nothing was asked yet")

    def save(self, file):
        save(file, self.model, self.exchanges)
        print(f"saved to {file}, questions and answers: {len(self.exchanges)}")

    def ask(self, question: str):
        if self.current is None:
            print("no protein is loaded: /load FILE [CHAIN], or /sequence LETTERS")
            return
        (protein, notes), pieces = self.proteins[self.current], []
        try:
            with contextlib.closing(self.stream(protein, question)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            pieces.append(" [stopped]")
            print(pieces[-1], end="")
        print()
        self.exchanges.append(Exchange(self.current, question, "".join(pieces).strip(), tuple(notes)))

    def stream(self, protein: Protein, question: str) -> Iterator[str]:
        with self.assistant.lock:
            yield from self.assistant.stream(protein, question)
