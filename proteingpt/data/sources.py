"""Where entries come from, and what is known of each beside its file.

Structures: folders on disk, RCSB and AlphaFold DB through their client's cache, or published embeddings. Texts: RCSB's
annotations, abstracts, questions made by others. Everything here runs in one process, before anything is parsed.
Chosen: where RCSB answers, its facts are taken rather than the file's, since the published answers are RCSB's and PDB
format states some counts otherwise; the file fills in what RCSB does not say.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from proteingpt.data.annotations import Annotation, entry_id, read_annotations
from proteingpt.data.fetching import FetchError, NotFound
from proteingpt.data.filters import Skip
from proteingpt.data.open_questions import read_generated
from proteingpt.data.plain_text import plain_text
from proteingpt.data.published import embedding_files, read_split, read_texts
from proteingpt.data.rcsb import Addresses, Client
from proteingpt.data.report import Progress
from proteingpt.data.structure import entry_of, find_structures
from proteingpt.data.structure.fact_texts import is_day
from proteingpt.protein import Facts, Turn, short_id

# Of several files of one entry the first kind is taken: BinaryCIF reads fastest, and entity counts are to be had from
# mmCIF rather than from the PDB format.
FORMAT_RANKS = {".bcif": 0, ".cif": 1, ".mmcif": 1, ".pdbx": 1, ".pdb": 2, ".ent": 2}


class SourceError(ValueError):
    """A source that is not there, or cannot be used."""


@dataclass(frozen=True)
class Text:
    """What is known of an entry beside its file. description: an abstract; date: ISO day of its release.

    entities: {author chain id: entity id}.
    """

    description: str | None = None
    turns: tuple[Turn, ...] = ()
    facts: Facts | None = None
    date: str | None = None
    entities: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One file to parse. file: its name in reports, relative to its folder; name: the entry, by the file's name.

    others: further files of the entry, (path, name in reports), for lack of this one. is_model: it was given as one of
    AlphaFold's, so that its B factors are pLDDT even where the file (the program's raw output) does not say so.
    """

    path: Path
    file: str
    name: str
    text: Text = Text()
    others: tuple[tuple[Path, str], ...] = ()
    is_model: bool = False


@dataclass(frozen=True)
class Sources:
    """Where to look; see the help of launch/build_shards.py for each. addresses: fields of rcsb.Addresses."""

    structures: Path | None = None
    facts: Path | None = None
    abstracts: Path | None = None
    qa: tuple[Path, ...] = ()
    dataset: Path | None = None
    clusters: Path | None = None
    embeddings: Path | None = None
    rcsb: str | None = None
    alphafold: str | None = None
    cache: Path | None = None
    addresses: Mapping[str, str] = field(default_factory=dict)
    requests_per_second: float = 10.0
    released_until: str | None = None


@dataclass
class Gathered:
    """jobs: sorted by entry. skips: entries that fell before anything was read, duplicates: further files of them.

    sides: {entry: split} if published.
    """

    jobs: list[Job]
    duplicates: list[Skip]
    skips: list[Skip]
    num_files: int
    sides: dict[str, str] | None
    client: Client | None


def gather(sources: Sources, require_abstract: bool, stream: TextIO | None = None) -> Gathered:
    """Finds or fetches every file and text; progress goes to `stream`.

    Raises SourceError, FetchError or PublishedDataError.
    """
    _check_day(sources)
    sides = None if sources.dataset is None else read_split(sources.dataset)
    files = [(path, _relative(path, root)) for root in _folders(sources) for path in find_structures(root)]
    ids = _wanted_ids(sources, client := _client(sources))
    texts = _texts(sources, client, ids, stream)
    skips: list[Skip] = []
    if ids:
        here = {entry_of(path) for path, _ in files}
        wanted = [name for name in ids if name not in here]
        if require_abstract:
            # Before the download: most of what the archive has no abstract for need not be fetched.
            unknown = client.missing("annotations")
            without = [name for name in wanted if not texts.get(name, Text()).description]
            skips += [_no_abstract("", name, unknown.get(name)) for name in without]
            wanted = [name for name in wanted if texts.get(name, Text()).description]
        files += _fetch(client, wanted, skips, stream)
    files += _fetch_models(client, sources.alphafold, skips, stream)
    num_files = len(files)
    ranked = rank_files(files)
    jobs = [
        Job(*found[0], name, texts.get(name, Text()), tuple(found[1:]), _is_model(found[0][0], sources.alphafold))
        for name, found in ranked.items()
    ]
    if sources.embeddings is not None:
        found = embedding_files(sources.embeddings)
        num_files += len(found)
        jobs += [Job(p, p.name, name, texts.get(name, Text())) for name, p in found.items() if name not in ranked]
    kept, duplicates = [], []
    for job in sorted(jobs, key=lambda job: job.name):
        if require_abstract and not job.text.description:
            skips.append(_no_abstract(job.file, job.name))
        elif sides is not None and job.name not in sides:
            skips.append(Skip(job.file, job.name, "", "not in the split", f"{sources.dataset.name} does not list it"))
        else:
            kept.append(job)
            continue
        detail = f"as {job.file}, which was not read"
        duplicates += [Skip(file, job.name, "", "duplicate", detail) for _, file in job.others]
    return Gathered(kept, duplicates, skips, num_files, sides, client)


def _check_day(sources: Sources) -> None:
    if sources.released_until is None:
        return
    if sources.rcsb != "all":
        raise SourceError("--released_until goes with --rcsb all")
    if not is_day(sources.released_until):
        raise SourceError(f"--released_until is {sources.released_until!r}, wanted a day such as 2023-05-17")


def _no_abstract(file: str, name: str, not_fetched: str | None = None) -> Skip:
    """not_fetched: why it is not known whether there is one."""
    if not_fetched is not None:
        return Skip(file, name, "", "not fetched", not_fetched)
    return Skip(file, name, "", "no abstract", "no abstract of its primary citation was given")


# --- structures -----------------------------------------------------------------------------------------------------


def _folders(sources: Sources) -> list[Path]:
    folders = [] if sources.structures is None else [sources.structures]
    if sources.alphafold is not None and os.path.isdir(sources.alphafold):
        folders.append(Path(sources.alphafold))
    for folder in folders:
        if not folder.is_dir():
            raise SourceError(f"no directory {folder}: --structures wants a directory of structure files")
    return folders


def _is_model(path: Path, alphafold: str | None) -> bool:
    return alphafold is not None and path.is_relative_to(alphafold)


def rank_files(files: Iterable[tuple[Path, str]]) -> dict[str, list[tuple[Path, str]]]:
    """{entry: its files as (path, name in reports)}: BinaryCIF before mmCIF before PDB, then by name."""
    found: dict[str, list[tuple[int, str, Path]]] = {}
    for path, file in files:
        rank = FORMAT_RANKS.get(Path(path.name.lower().removesuffix(".gz")).suffix, max(FORMAT_RANKS.values()))
        found.setdefault(entry_of(path), []).append((rank, file, path))
    return {name: [(path, file) for _, file, path in sorted(found[name])] for name in sorted(found)}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


# --- RCSB and AlphaFold DB ------------------------------------------------------------------------------------------


def _client(sources: Sources) -> Client | None:
    models = sources.alphafold is not None and not os.path.isdir(sources.alphafold)
    if sources.rcsb is None and not models:
        return None
    if sources.cache is None:
        raise SourceError("fetching wants a cache directory: give --cache DIR")
    try:
        addresses = Addresses(**sources.addresses)
        return Client(sources.cache, addresses, requests_per_second=sources.requests_per_second)
    except ValueError as error:
        raise SourceError(str(error)) from error


def _wanted_ids(sources: Sources, client: Client | None) -> list[str]:
    """The entries that --rcsb names: all, those in a file (apart by blanks, commas or lines), or those listed."""
    if sources.rcsb is None:
        return []
    if sources.rcsb == "all":
        return client.all_ids(sources.released_until)
    try:
        ids = [entry_id(word) for word in _listed(sources.rcsb)]
    except (OSError, ValueError) as error:
        wanted = "wanted all, ids such as 1cbs,2hhb, or a file of ids"
        raise SourceError(f"--rcsb {sources.rcsb:.60}: {error}; {wanted}") from None
    if not ids:
        raise SourceError(f"--rcsb {sources.rcsb}: no id in it")
    return sorted(set(ids))


def _listed(given: str) -> list[str]:
    """The words in the file of that name if there is one, else in `given` itself, apart by blanks, commas or lines."""
    # os.path takes a list that is longer than any file's name for no file; Path.is_file raises.
    text = Path(given).read_text(encoding="utf-8") if os.path.isfile(given) else given
    return [word for word in re.split(r"[\s,]+", text) if word]


def _fetch(client: Client, ids: list[str], skips: list[Skip], stream: TextIO | None) -> list[tuple[Path, str]]:
    unfetched = client.without_structure(ids)
    meter = Progress(len(ids), stream, len(ids) - len(unfetched), "structures")
    reasons = client.prefetch(unfetched, progress=lambda _, came: meter.advance(1, not came))
    meter.finish()
    skips += [Skip("", name, "", "not fetched", reason) for name, reason in sorted(reasons.items())]
    paths = (client.fetch_structure(name) for name in ids if name not in reasons)
    return [(path, path.name) for path in paths]


def _fetch_models(
    client: Client | None, wanted: str | None, skips: list[Skip], stream: TextIO | None
) -> list[tuple[Path, str]]:
    """AlphaFold DB models by accession: listed, or in a file."""
    if wanted is None or os.path.isdir(wanted):
        return []
    try:
        accessions = sorted({word.upper() for word in _listed(wanted)})
    except (OSError, ValueError) as error:
        raise SourceError(f"--alphafold {wanted:.60}: {error}; wanted a text file of accessions") from None
    meter, files = Progress(len(accessions), stream, what="AlphaFold DB models"), []
    for number, accession in enumerate(accessions, 1):
        try:
            path = client.fetch_alphafold(accession)
            files.append((path, path.name))
        except NotFound as error:
            skips.append(Skip("", accession.lower(), "", "not fetched", error.reason))
        except FetchError:
            raise
        except ValueError as error:
            raise SourceError(f"--alphafold: {error}, or a directory of models") from None
        meter.advance(1, number - len(files) - meter.num_skips)
    meter.finish()
    return files


# --- texts ----------------------------------------------------------------------------------------------------------


def _texts(sources: Sources, client: Client | None, ids: list[str], stream: TextIO | None) -> dict[str, Text]:
    """{entry: what is known of it}; an abstract or question that was given by file comes before RCSB's."""
    annotations: dict[str, Annotation] = {}
    if sources.facts is not None:
        broken: dict[str, str] = {}
        annotations |= read_annotations(sources.facts, broken)
        _say_missing(broken, stream)
    if ids:
        annotations |= _fetch_annotations(client, [name for name in ids if name not in annotations], stream)
    texts = {
        name: Text(found.abstract, (), found.facts, found.release_date, found.polymer_entities)
        for name, found in annotations.items()
    }
    for name, description in _read_abstracts(sources.abstracts).items():
        texts[name] = replace(texts.get(name, Text()), description=description)
    for path in sources.qa:
        for name, turns in _read_qa(path).items():
            text = texts.get(name, Text())
            texts[name] = replace(text, turns=text.turns + turns)
    return texts


def _fetch_annotations(client: Client, ids: list[str], stream: TextIO | None) -> dict[str, Annotation]:
    unfetched = client.without_annotation(ids)
    meter = Progress(len(ids), stream, len(ids) - len(unfetched), "annotations")
    found = client.fetch_annotations(ids, progress=lambda _, came: meter.advance(1, not came))
    meter.finish()
    reasons = client.missing("annotations")
    _say_missing({name: reasons[name] for name in ids if name in reasons}, stream)
    return found


def _say_missing(reasons: Mapping[str, str], stream: TextIO | None, max_lines: int = 5) -> None:
    """Names the first few of what had to be left out, and how many there are."""
    if stream is None or not reasons:
        return
    print(f"{len(reasons)} annotations could not be had; of these entries only their files speak:", file=stream)
    for name, reason in list(reasons.items())[:max_lines]:
        print(f"  {name}: {reason}", file=stream)
    if len(reasons) > max_lines:
        print(f"  and {len(reasons) - max_lines} more", file=stream)


def _read_abstracts(source: Path | None) -> dict[str, str]:
    """{entry: abstract} of a published abstract.json, or of a folder of them and of texts ID.txt."""
    if source is None:
        return {}
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    abstracts = {}
    for path in paths:
        if path.suffix == ".txt":
            abstracts[short_id(path.stem)] = _read_text(path)
        elif path.suffix == ".json" or not source.is_dir():
            abstracts |= {name: text.description for name, text in read_texts(abstracts=path).items()}
    found = {name: text for name, text in abstracts.items() if text}
    if not found:
        raise SourceError(f"{source}: no abstract in it; wanted an abstract.json, or a folder of ID.txt")
    return found


def _read_text(path: Path) -> str:
    try:
        return plain_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a text in UTF-8 ({error}): mend the file or take it away") from error


def _read_qa(path: Path) -> dict[str, tuple[Turn, ...]]:
    """{entry: turns} of a published qa.json, or of generated questions (.jsonl, or the directory that holds it)."""
    if path.suffix == ".jsonl" or path.is_dir():
        return read_generated(path)
    return {name: text.turns for name, text in read_texts(qa=path).items()}


def merge_facts(of_file: Facts, of_rcsb: Facts | None) -> Facts:
    """RCSB's word where it has one, else the file's."""
    if of_rcsb is None:
        return of_file
    return replace(of_file, **{name: value for name, value in vars(of_rcsb).items() if value is not None})


