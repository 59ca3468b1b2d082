"""Open questions: what a language model is asked of an abstract and the facts of an entry, which answers are taken as
question/answer pairs, and the file that keeps them.

The file is one JSONL, which is also the cache: a finished protein is one appended, fsynced line that bears the hash of
all its answer depends on, so a killed run goes on where it was and a second one asks nothing.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from proteingpt.data.published import read_texts
from proteingpt.data.shards import ShardSet, read_manifest
from proteingpt.endpoint import Form, InvalidAnswer, Tokens
from proteingpt.protein import Turn, short_id

DEFAULT_PROMPT = Path(__file__).with_name("open_questions_prompt.txt")
PLACEHOLDERS = ("abstract", "facts", "num_questions")
OUTPUT_NAME = "open_questions.jsonl"

# Part of every cache key: raise it when what is asked for, or what is accepted, changes.
CACHE_VERSION = 1
SYSTEM_MESSAGE = (
    'Answer with one JSON object and nothing else: {"pairs": [{"question": "...", "answer": "..."}, ...]}. '
    "Both are plain text."
)
# Only the keywords that every server with structured output knows; the rest is checked by parse_answer.
SCHEMA = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}

MAX_QUESTION_CHARACTERS = 400
MAX_ANSWER_CHARACTERS = 1500
# What our own prompts put around a turn: inside one it would end an answer early.
RESERVED_MARKS = ("###", "<protein", "</protein")
REFUSAL = re.compile(
    r"sorry\b|i(['’]m| am) (sorry|unable|not able)|i (cannot|can['’]t|can not|do not|don['’]t)\b|as an ai\b"
    r"|(n/?a|none|unknown|not (specified|stated|mentioned|provided|available|given|known))\W*$"
    r"|(this|that|it) is not (specified|stated|mentioned|provided|given)\b"
    r"|(the )?(provided |given )?(abstract|text|facts|information)( \w+){0,3} (does|do) not\b",
    re.IGNORECASE,
)
PDB_ID = re.compile(r"[0-9][0-9a-z]{3}|pdb_[0-9a-z]{8}", re.IGNORECASE)

DONE, INVALID, FAILED, LEFT = "done", "invalid", "failed", "left"


class OpenQuestionsError(ValueError):
    """A setting, prompt or file that cannot be used as it is. The message says what to change."""


@dataclass(frozen=True)
class Subject:
    """What questions are made from. id: entry id in lower case; facts: lines of text, as `format_facts` makes them."""

    id: str
    abstract: str
    facts: str = ""


@dataclass(frozen=True)
class Options:
    """What is asked for: all that an answer depends on, beside the subject. prompt: the template's text."""

    model: str
    prompt: str
    num_questions: int = 5
    max_output_tokens: int = 1100

    def __post_init__(self):
        check_prompt(self.prompt)
        if not self.model:
            raise OpenQuestionsError("the model's name is empty: give --model")
        if self.num_questions < 1:
            raise OpenQuestionsError(f"--questions-per-protein is {self.num_questions}, wanted at least 1")
        if self.max_output_tokens < 1:
            raise OpenQuestionsError(f"--max-output-tokens is {self.max_output_tokens}, wanted at least 1")

    @property
    def form(self) -> Form:
        return Form(self.model, SYSTEM_MESSAGE, "pairs", SCHEMA, self.max_output_tokens)


# --- what is asked --------------------------------------------------------------------------------------------------


def check_prompt(template: str) -> None:
    """Raises OpenQuestionsError that names a placeholder which is missing or unknown. Other braces are plain text."""
    found = set(re.findall(r"\{(\w+)\}", template))
    wanted = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    for problem, names in (("lacks", set(PLACEHOLDERS) - found), ("has the unknown", found - set(PLACEHOLDERS))):
        if names:
            listed = ", ".join(f"{{{name}}}" for name in sorted(names))
            raise OpenQuestionsError(f"the prompt {problem} placeholder {listed}: wanted {wanted}, each at least once")


def fill_prompt(template: str, subject: Subject, num_questions: int) -> str:
    """The prompt for a subject. In one pass, so that braces within an abstract stay what they are."""
    values = {"abstract": subject.abstract, "facts": subject.facts or "none known", "num_questions": str(num_questions)}
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def read_prompt(path: str | Path) -> str:
    """The text of a prompt file. Raises OpenQuestionsError where it cannot be read or fails check_prompt."""
    try:
        template = Path(path).read_text(encoding="utf-8")
        check_prompt(template)
    except OSError as error:
        raise OpenQuestionsError(f"{path}: the prompt cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OpenQuestionsError(f"{path}: the prompt is not UTF-8 text: {error.reason}") from error
    except OpenQuestionsError as error:
        raise OpenQuestionsError(f"{path}: {error}") from error
    return template


def format_facts(facts: Mapping) -> str:
    """One line for each fact that is known, `num models: 1`; a list that is known to be empty reads `none`."""
    units = {"resolution": " angstrom", "wavelength": " angstrom", "molecular_weight": " kDa"}
    lines = []
    for name, value in facts.items():
        if value is not None:
            text = (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)
            lines.append(f"{name.replace('_', ' ')}: {text}{units.get(name, '')}")
    return "\n".join(lines)


def read_subjects(*, data: str | Path | None = None, abstracts: str | Path | None = None) -> list[Subject]:
    """The subjects of a shard directory, every split (an entry once, whatever its chains), or of an abstract.json.

    Shards give the description as the abstract, and the facts of the metadata. Entries without a text are left out.
    Raises OpenQuestionsError where nothing is left, ShardError or PublishedDataError where the source cannot be read.
    """
    if (data is None) == (abstracts is None):
        raise OpenQuestionsError("give either --data SHARDS or --abstracts FILE")
    if abstracts is not None:
        found = [Subject(entry, text.description) for entry, text in read_texts(abstracts=abstracts).items()]
    else:
        first: dict[str, Subject] = {}
        for subject in _shard_subjects(Path(data)):
            first.setdefault(subject.id, subject)
        found = list(first.values())
    if not found:
        raise OpenQuestionsError(f"{data or abstracts}: no entry with a text to make questions from")
    return found


def _shard_subjects(directory: Path) -> Iterator[Subject]:
    for split in read_manifest(directory)["splits"]:
        shards = ShardSet(directory, split)
        with contextlib.closing(shards):
            for i in range(len(shards)):
                sample = shards.read(i)
                if sample.description.strip():
                    facts = format_facts(sample.metadata.get("facts") or {})
                    yield Subject(short_id(sample.protein.id), sample.description.strip(), facts)


def cache_key(subject: Subject, options: Options) -> str:
    """sha256 of all that the answer depends on: model, prompt, abstract, facts, options. Not of the id: entries of one
    paper with the same facts are asked about once."""
    content = [
        CACHE_VERSION,
        SYSTEM_MESSAGE,
        options.model,
        options.prompt,
        subject.abstract,
        subject.facts,
        {"num_questions": options.num_questions, "max_output_tokens": options.max_output_tokens},
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- what comes back ------------------------------------------------------------------------------------------------


def parse_answer(content: str, num_questions: int, ids: Iterable[str] = ()) -> tuple[Turn, ...]:
    """The turns in a model's answer, whitespace tidied.

    Accepted: {"pairs": [...]} or the bare list, also in a code fence, of 1 to num_questions objects with exactly
    `question` and `answer`. Raises InvalidAnswer for anything else; for an empty, over-long or repeated text; for a
    refusal; for a mark that our own prompts use; and for a question that names one of the PDB ids in `ids`.
    """
    pairs = _load_pairs(content)
    if not 1 <= len(pairs) <= num_questions:
        raise InvalidAnswer(f"{len(pairs)} pairs, wanted 1 to {num_questions}")
    turns = tuple(_parse_pair(pair, f"pair {number}") for number, pair in enumerate(pairs, 1))
    leak = leaked_id(turns, ids)
    if leak:
        raise InvalidAnswer(f"a question names the PDB id {leak}")
    seen: set[str] = set()
    for turn in turns:
        asked = re.sub(r"\W+", " ", turn.question).strip().casefold()
        if asked in seen:
            raise InvalidAnswer(f"the question {turn.question!r} is asked twice")
        seen.add(asked)
    return turns


def leaked_id(turns: Iterable[Turn], ids: Iterable[str]) -> str | None:
    """The first of `ids` that is a PDB id and stands in a question, in any case, as `1ABC`, `PDB1abc` or `1abc_A`."""
    questions = "\n".join(turn.question for turn in turns)
    for entry in ids:
        # An id that is no PDB id is a file's name, and may be a word of any question.
        if PDB_ID.fullmatch(entry):
            short = entry.lower().removeprefix("pdb_").lstrip("0") if len(entry) > 4 else entry
            if re.search(rf"(?<![a-z0-9])(pdb_?)?0*{short}(?![a-z0-9])", questions, re.IGNORECASE):
                return entry
    return None


def _load_pairs(content: str) -> list:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", content, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else content)
    except (ValueError, RecursionError) as error:
        raise InvalidAnswer(f"not JSON: {error}") from error
    pairs = value.get("pairs") if isinstance(value, dict) else value
    if not isinstance(pairs, list):
        raise InvalidAnswer('no {"pairs": [...]} in it')
    return pairs


def _parse_pair(pair, where: str) -> Turn:
    if not isinstance(pair, dict) or sorted(pair) != ["answer", "question"]:
        raise InvalidAnswer(f"{where} is not an object with question and answer alone")
    limits = {"question": MAX_QUESTION_CHARACTERS, "answer": MAX_ANSWER_CHARACTERS}
    texts = {name: _tidy(pair[name], limit, f"the {name} of {where}") for name, limit in limits.items()}
    if REFUSAL.match(texts["answer"]):
        raise InvalidAnswer(f"the answer of {where} is no answer: {texts['answer'][:60]!r}")
    return Turn(**texts)


def _tidy(value, max_characters: int, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidAnswer(f"{where} is no text")
    text = " ".join(value.split())
    if not text:
        raise InvalidAnswer(f"{where} is empty")
    if len(text) > max_characters:
        raise InvalidAnswer(f"{where} has {len(text)} characters, at most {max_characters} are wanted")
    marks = [mark for mark in RESERVED_MARKS if mark in text]
    # Control characters and halves of surrogate pairs, which no UTF-8 file holds.
    if marks or any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise InvalidAnswer(f"{where} holds {marks[0] if marks else 'a control character'}")
    return text


# --- the output file ------------------------------------------------------------------------------------------------


def output_file(out: str | Path) -> Path:
    """The file itself where `out` ends in .jsonl, else open_questions.jsonl in that directory."""
    out = Path(out)
    return out if out.suffix == ".jsonl" else out / OUTPUT_NAME


def read_generated(path: str | Path) -> dict[str, tuple[Turn, ...]]:
    """{entry id in lower case: its generated turns}, of an output file or the directory that holds it.

    The last line of an entry counts; entries that were set aside are absent. A torn last line is passed over.
    Raises OpenQuestionsError naming the line that is not ours, or where there is no such file.
    """
    file = output_file(path)
    if not file.is_file():
        raise OpenQuestionsError(f"no generated questions in {path}: make them with python launch/open_questions.py")
    records, _ = read_records(file)
    last = {short_id(record["id"]): record for record in records if record["status"] in (DONE, INVALID)}
    return {entry: turns_of(record) for entry, record in last.items() if record["status"] == DONE}


def turns_of(record: dict) -> tuple[Turn, ...]:
    return tuple(Turn(pair["Q"], pair["A"]) for pair in record["turns"])


def read_records(path: Path) -> tuple[list[dict], int]:
    """(records, number of bytes that they take). Less than the file's size where the last line is torn."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            _check_record(record)
        except (ValueError, ArithmeticError, RecursionError, LookupError, TypeError) as error:
            raise OpenQuestionsError(
                f"{path}, line {number}: not a line of generated questions ({error}): mend or remove the line"
            ) from error
        records.append(record)
    return records, whole


def _check_record(record) -> None:
    """Raises an error of Python's own where a line of the output does not have its form."""
    for name in ("id", "key", "status"):
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is no text")
    if record["usd"] is not None and not Decimal(record["usd"]).is_finite():
        raise ValueError("usd is no number")
    Tokens(record["input_tokens"], record["output_tokens"]) + Tokens(0, 0)
    for turn in turns_of(record):
        if not isinstance(turn.question, str) or not isinstance(turn.answer, str):
            raise TypeError("a turn is no text")


@contextlib.contextmanager
def open_output(path: Path) -> Iterator[tuple[io.FileIO, list[dict]]]:
    """The file, locked and ready to be appended to, and its records. A line that a kill has torn is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OpenQuestionsError(f"{path}: another run writes to it: wait for it, or give another --out") from error
        records, size = read_records(path)
        file.truncate(size)
        yield file, records


def append(file: io.FileIO, records: Iterable[dict]) -> None:
    """Whole lines or, on a full disk, none: a piece of one would spoil the next."""
    data = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    size = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise
