"""Imports the data that ProteinChat and ProteinGPT have published: texts, questions, the split, structure embeddings.

The files are strict JSON (`abstract.json`, `qa.json`, `qa_all.json`, `GPT_merged_summary.json`, `dataset.json`) and a
folder of `.pt` files, each one tensor. Every entry is checked: by default the first bad one is an error that names
file, entry and fault; with `report` it is set aside, named there, and reading goes on. A `.pt` file is a pickle: only
tensors are rebuilt from it, and nothing in it is run. Entry ids come out in lower case.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from proteingpt.data.plain_text import plain_text
from proteingpt.protein import ENCODER_EXTRA_ROWS, UNKNOWN_RESIDUE, Protein, Sample, Turn, short_id

# Width of ESM-IF1's encoder output, whose rows the `.pt` files hold.
EMBEDDING_WIDTH = 512
# The published embeddings are of this author chain, as the paper says.
PUBLISHED_CHAIN = "A"
SPLITS = ("train", "test")
ENTRY_ID = re.compile(r"[0-9A-Za-z_-]+")
# How many ids an error lists before it counts the rest.
MAX_NAMED = 5

Report = Callable[[str], None]


class PublishedDataError(ValueError):
    """A published file that is not there, damaged, or not in the published form. Names file, entry and fault."""


@dataclass(frozen=True)
class PublishedText:
    """What the published files say of an entry. description: its abstract, None where none is given."""

    description: str | None
    turns: tuple[Turn, ...]


# --- texts and the split --------------------------------------------------------------------------------------------


def read_texts(
    qa: str | Path | Sequence[str | Path] = (),
    abstracts: str | Path | None = None,
    *,
    report: Report | None = None,
) -> dict[str, PublishedText]:
    """{entry id: its abstract and its questions}, in the order in which the files name the entries.

    qa: one or several files {pdb_id: [{"Q": question, "A": answer}, ...]}, as qa.json, qa_all.json and
    GPT_merged_summary.json; the turns of a later file follow those of an earlier one. Answers may be numbers, which
    become text as JSON writes them (4, 0.971). abstracts: a file [{"pdb_id", "caption"}, ...], as abstract.json.
    report: called with one line for each entry or turn set aside (malformed, or given twice; the first is kept).
    Without it the first of these raises PublishedDataError. A file that cannot be read at all raises always.
    """
    qa_paths = [qa] if isinstance(qa, str | Path) else list(qa)
    descriptions: dict[str, str] = {}
    turns: dict[str, dict[str, Turn]] = {}
    for path in map(Path, qa_paths):
        _read_qa(path, turns, report)
    if abstracts is not None:
        _read_abstracts(Path(abstracts), descriptions, report)
    return {
        entry: PublishedText(descriptions.get(entry), tuple(turns.get(entry, {}).values()))
        for entry in {**turns, **descriptions}
    }


def read_split(path: str | Path, *, report: Report | None = None) -> dict[str, str]:
    """{entry id: "train" or "test"} of a file {"train": [ids], "test": [ids]}, as dataset.json.

    An id that occurs twice, or in both splits, raises PublishedDataError that names it. With `report` it is named there
    instead; one that is in both then counts as "train", so that nothing trained on is tested on.
    """
    path = Path(path)
    content = _read_json(path)
    if not isinstance(content, _Object) or sorted(name for name, _ in content) != sorted(SPLITS):
        raise PublishedDataError(f'{path}: wanted an object {{"train": [ids], "test": [ids]}}')
    sides = {name: _split_ids(path, name, ids, report) for name, ids in content}
    both = [entry for entry in sides["test"] if entry in sides["train"]]
    if both:
        _tell(report, f"{path}: {_enumerate(both)} in both train and test: an entry belongs on one side")
    return {entry: "test" for entry in sides["test"]} | {entry: "train" for entry in sides["train"]}


def _read_qa(path: Path, turns: dict[str, dict[str, Turn]], report: Report | None) -> None:
    """Adds the file's turns to {entry: {question: turn}}."""
    content = _read_json(path)
    if not isinstance(content, _Object):
        raise PublishedDataError(f'{path}: wanted an object {{pdb_id: [{{"Q": ..., "A": ...}}, ...]}}')
    seen: set[str] = set()
    for name, listed in content:
        where = f"{path}, entry {name!r}"
        with _setting_aside(report):
            entry = _entry_id(name, path)
            if entry in seen:
                raise PublishedDataError(f"{where}: occurs twice; the first is the one to keep")
            if not isinstance(listed, list) or isinstance(listed, _Object):
                raise PublishedDataError(f'{where}: {_kind(listed)}, wanted a list of {{"Q": ..., "A": ...}}')
            seen.add(entry)
            asked = turns.setdefault(entry, {})
            for number, pair in enumerate(listed):
                with _setting_aside(report):
                    turn = _turn(pair, f"{where}, turn {number}")
                    if turn.question in asked:
                        raise PublishedDataError(f"{where}, turn {number}: asks {turn.question!r} a second time")
                    asked[turn.question] = turn


def _read_abstracts(path: Path, descriptions: dict[str, str], report: Report | None) -> None:
    content = _read_json(path)
    if not isinstance(content, list) or isinstance(content, _Object):
        raise PublishedDataError(f'{path}: wanted a list [{{"pdb_id": ..., "caption": ...}}, ...]')
    for number, item in enumerate(content):
        with _setting_aside(report):
            fields = _fields(item, ("pdb_id", "caption"), f"{path}, item {number}")
            entry = _entry_id(fields["pdb_id"], f"{path}, item {number}")
            if entry in descriptions:
                raise PublishedDataError(f"{path}, entry {entry!r}: has a second caption, in item {number}")
            where = f"{path}, entry {entry!r}, caption"
            descriptions[entry] = _text(plain_text(_text(fields["caption"], where)), where)


def _split_ids(path: Path, name: str, ids, report: Report | None) -> dict[str, None]:
    """The ids of a side in order, as the keys of a dict."""
    if not isinstance(ids, list) or isinstance(ids, _Object):
        raise PublishedDataError(f"{path}: {name} is {_kind(ids)}, wanted a list of ids")
    found: dict[str, None] = {}
    twice = []
    for number, value in enumerate(ids):
        with _setting_aside(report):
            entry = _entry_id(value, f"{path}, {name}, item {number}")
            if entry in found:
                twice.append(entry)
            found[entry] = None
    if twice:
        _tell(report, f"{path}: {_enumerate(twice)} twice in {name}")
    return found


class _Object(list):
    """The (name, value) pairs of a JSON object in order, so that a repeated name is seen, not overwritten."""


def _read_json(path: Path):
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PublishedDataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PublishedDataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        return json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PublishedDataError(f"{path}: not JSON ({error}): is the file whole?") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _fields(value, names: tuple[str, ...], where: str) -> dict:
    """The named fields of an object, each of which must be there once. Others are passed over."""
    if not isinstance(value, _Object):
        raise PublishedDataError(f"{where}: {_kind(value)}, wanted an object with {' and '.join(names)}")
    counts = {name: sum(found == name for found, _ in value) for name in names}
    wrong = [f"{name} {'missing' if count == 0 else 'given twice'}" for name, count in counts.items() if count != 1]
    if wrong:
        raise PublishedDataError(f"{where}: {', '.join(wrong)}")
    return {name: found for name, found in value if name in names}


def _turn(pair, where: str) -> Turn:
    fields = _fields(pair, ("Q", "A"), where)
    answer = fields["A"]
    # A bool is an int in Python, but no answer here: the published ones are YES and NO.
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if not math.isfinite(answer):
            raise PublishedDataError(f"{where}, A: a number beyond what a float holds")
        answer = str(answer)
    return Turn(_text(fields["Q"], f"{where}, Q"), _text(answer, f"{where}, A"))


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise PublishedDataError(f"{where}: {_kind(value)}, wanted text")
    text = value.strip()
    if not text:
        raise PublishedDataError(f"{where}: empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PublishedDataError(f"{where}: half of a surrogate pair at character {error.start}") from error
    return text


def _entry_id(value, where) -> str:
    if not isinstance(value, str) or not ENTRY_ID.fullmatch(value.removesuffix(".pt")):
        raise PublishedDataError(f"{where}: {value!r} is no entry id, wanted one as in 1cbs")
    return short_id(value.removesuffix(".pt"))


def _kind(value) -> str:
    if isinstance(value, _Object):
        return "an object"
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _enumerate(entries: list[str]) -> str:
    more = f" and {len(entries) - MAX_NAMED} more" if len(entries) > MAX_NAMED else ""
    return f"{', '.join(entries[:MAX_NAMED])}{more} {'is' if len(entries) == 1 else 'are'}"


@contextlib.contextmanager
def _setting_aside(report: Report | None) -> Iterator[None]:
    """With a report, a PublishedDataError in the block becomes one line of it; without one it is raised."""
    try:
        yield
    except PublishedDataError as error:
        if report is None:
            raise
        report(str(error))


def _tell(report: Report | None, message: str) -> None:
    if report is None:
        raise PublishedDataError(message)
    report(message)


# --- embeddings -----------------------------------------------------------------------------------------------------


def read_embedding(path: str | Path) -> np.ndarray:
    """The rows of one `.pt` file: float32 (L + 2, 512), the output of ESM-IF1's encoder, with its BOS and EOS rows.

    L counts the *observed* residues of chain A: the published code drops the unresolved ones. The file holds one
    tensor, float32 (L + 2, 1, 512); some were pickled on a GPU, some with requires_grad, and both are read. Raises
    PublishedDataError that names the file for anything else, a number that is not finite included.
    """
    # Late, so that texts are read without it.
    import torch

    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise PublishedDataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        with file:
            tensor = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no error of its own for a file that is damaged or holds something else
        reason = str(error).strip().split("\n")[0][:200]
        raise PublishedDataError(f"{path}: no tensor file that can be read safely: {reason}: copy it again") from error
    wanted = f"wanted one float32 tensor (L + {ENCODER_EXTRA_ROWS}, 1, {EMBEDDING_WIDTH})"
    if not isinstance(tensor, torch.Tensor):
        raise PublishedDataError(f"{path}: holds a {type(tensor).__name__}, {wanted}")
    shape = tuple(tensor.shape)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        raise PublishedDataError(f"{path}: {tensor.dtype} {shape}, {tensor.layout} on {tensor.device}, {wanted}")
    if len(shape) != 3 or shape[1:] != (1, EMBEDDING_WIDTH) or shape[0] <= ENCODER_EXTRA_ROWS:
        raise PublishedDataError(f"{path}: shape {shape}, {wanted}")
    # A stride of 0 declares any number of rows in a few bytes.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise PublishedDataError(f"{path}: declares {shape[0]} rows but does not hold them, {wanted}")
    rows = np.ascontiguousarray(tensor.detach().numpy()[:, 0])
    if not np.isfinite(rows).all():
        raise PublishedDataError(f"{path}: {int((~np.isfinite(rows)).sum())} numbers are not finite")
    return rows


def embedding_files(folder: str | Path) -> dict[str, Path]:
    """{entry id: its file} of a folder of `ID.pt` files, sorted by id. PublishedDataError where there is none, or where
    a name is no entry id in lower case."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishedDataError(f"no directory {folder}: wanted the folder of .pt files")
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise PublishedDataError(f"{folder}: no .pt file in it")
    for path in paths:
        if not ENTRY_ID.fullmatch(path.stem) or path.stem != path.stem.lower():
            raise PublishedDataError(f"{path}: the name is no entry id in lower case, wanted one as in 1cbs.pt")
    return {short_id(path.stem): path for path in paths}


def read_embeddings(folder: str | Path, *, report: Report | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(entry id, float32 (L + 2, 512)) of each `.pt` file in the folder, sorted by id, one in memory at a time.

    Raises as `embedding_files` does; a bad file raises as in `read_embedding`, or with `report` is named there and left
    out.
    """
    for entry, path in embedding_files(folder).items():
        with _setting_aside(report):
            yield entry, read_embedding(path)


def published_samples(
    texts: Mapping[str, PublishedText], embeddings: Iterable[tuple[str, np.ndarray]]
) -> Iterator[Sample]:
    """Samples for proteins of which there is an embedding and a text but no structure file.

    Such a protein has no sequence and no coordinates here: its embedding tells only how many residues were observed. So
    the sequence is X * L and the backbone NaN throughout, which keeps what the rest relies on: the prefix takes
    2 (L + 2) positions, and every per-residue array has L rows. What an encoder would make of that is worthless; the
    real rows of ESM-IF1 come from embedding shards, which are made from the same `.pt` file, named in the metadata as
    {"embedding": "ID.pt", "source": "published"}. Entries without any text are passed over: they ask nothing.
    """
    for entry, rows in embeddings:
        text = texts.get(entry)
        if text is None or not (text.description or text.turns):
            continue
        length = len(rows) - ENCODER_EXTRA_ROWS
        backbone = np.full((length, 3, 3), np.nan, np.float32)
        protein = Protein(entry, PUBLISHED_CHAIN, UNKNOWN_RESIDUE * length, backbone)
        metadata = {"embedding": f"{entry}.pt", "source": "published"}
        yield Sample(protein, text.description or "", text.turns, metadata)
