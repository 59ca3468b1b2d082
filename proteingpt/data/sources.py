"""Where entries come from, and what is known of each beside its file.

Structures: folders on disk, RCSB and AlphaFold DB through their client's cache, or published embeddings. Texts: RCSB's
annotations, abstracts, questions made by others. Everything here runs in one process, before anything is parsed.
Chosen: where RCSB answers, its facts are taken rather than the file's, since the published answers are RCSB's and PDB
format states some counts otherwise; the file fills in what RCSB does not say.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from proteingpt.data.annotations import Annotation, entry_id, read_annotations
from proteingpt.data.filters import Skip
from proteingpt.data.open_questions import read_generated
from proteingpt.data.published import embedding_files, read_split, read_texts
from proteingpt.data.rcsb import Addresses, Client, FetchError, NotFound
from proteingpt.data.structure import find_structures
from proteingpt.protein import Facts, Turn

# Of several files of one entry the first kind is taken: BinaryCIF reads fastest, and entity counts are to be had from
# mmCIF rather than from the PDB format.
FORMAT_RANKS = {".bcif": 0, ".cif": 1, ".mmcif": 1, ".pdbx": 1, ".pdb": 2, ".ent": 2}

Say = Callable[[str], None]


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
    """One file to parse. file: its name in reports, relative to its folder; name: the entry, by the file's name."""

    path: Path
    file: str
    name: str
    text: Text = Text()


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
    """jobs: sorted by entry. skips: entries that fell before anything was read. sides: {entry: split} if published."""

    jobs: list[Job]
    duplicates: list[Skip]
    skips: list[Skip]
    num_files: int
    sides: dict[str, str] | None
    client: Client | None


def gather(sources: Sources, require_abstract: bool, say: Say) -> Gathered:
    """Finds or fetches every file and text. Raises SourceError, FetchError or PublishedDataError."""
    files = [(path, _relative(path, root)) for root in _folders(sources) for path in find_structures(root)]
    ids = _wanted_ids(sources, client := _client(sources))
    texts = _texts(sources, client, ids, say)
    skips: list[Skip] = []
    if ids:
        here = {entry_name(path)[0] for path, _ in files}
        wanted = [name for name in ids if name not in here]
        if require_abstract:
            # Before the download: most of what the archive has no abstract for need not be fetched.
            skips += [_no_abstract("", name) for name in wanted if not texts.get(name, Text()).description]
            wanted = [name for name in wanted if texts.get(name, Text()).description]
        files += _fetch(client, wanted, skips, say)
    files += _fetch_models(client, sources.alphafold, skips, say)
    num_files = len(files)
    chosen, duplicates = choose_files(files)
    jobs = [Job(path, file, name, texts.get(name, Text())) for name, (path, file) in chosen.items()]
    if sources.embeddings is not None:
        found = embedding_files(sources.embeddings)
        num_files += len(found)
        jobs += [Job(p, p.name, name, texts.get(name, Text())) for name, p in found.items() if name not in chosen]
    sides = None if sources.dataset is None else read_split(sources.dataset)
    kept = []
    for job in sorted(jobs, key=lambda job: job.name):
        if require_abstract and not job.text.description:
            skips.append(_no_abstract(job.file, job.name))
        elif sides is not None and job.name not in sides:
            skips.append(Skip(job.file, job.name, "", "not in the split", f"{sources.dataset.name} does not list it"))
        else:
            kept.append(job)
    return Gathered(kept, duplicates, skips, num_files, sides, client)


def _no_abstract(file: str, name: str) -> Skip:
    return Skip(file, name, "", "no abstract", "no abstract of its primary citation was given")


# --- structures -----------------------------------------------------------------------------------------------------


def _folders(sources: Sources) -> list[Path]:
    folders = [] if sources.structures is None else [sources.structures]
    if sources.alphafold is not None and Path(sources.alphafold).is_dir():
        folders.append(Path(sources.alphafold))
    for folder in folders:
        if not folder.is_dir():
            raise SourceError(f"no directory {folder}: --structures wants a directory of structure files")
    return folders


def entry_name(path: Path) -> tuple[str, int]:
    """Entry a file is of, by its name in lower case, and the rank of its format: `pdb1CBS.ent.gz` -> ("1cbs", 2)."""
    name = path.name.lower().removesuffix(".gz")
    stem, dot, extension = name.rpartition(".")
    if not dot:
        return name, max(FORMAT_RANKS.values())
    if extension == "ent":
        stem = stem.removeprefix("pdb")
    return stem, FORMAT_RANKS.get(f".{extension}", max(FORMAT_RANKS.values()))


def choose_files(files: Iterable[tuple[Path, str]]) -> tuple[dict[str, tuple[Path, str]], list[Skip]]:
    """{entry: (path, name in reports)}: BinaryCIF before mmCIF before PDB, then by name. The rest as skips."""
    candidates: dict[str, list[tuple[int, str, Path]]] = {}
    for path, file in files:
        name, rank = entry_name(path)
        candidates.setdefault(name, []).append((rank, file, path))
    chosen, duplicates = {}, []
    for name in sorted(candidates):
        (_, taken, path), *others = sorted(candidates[name])
        chosen[name] = (path, taken)
        duplicates += [Skip(file, name, "", "duplicate", f"the entry is read from {taken}") for _, file, _ in others]
    return chosen, duplicates


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


# --- RCSB and AlphaFold DB ------------------------------------------------------------------------------------------


def _client(sources: Sources) -> Client | None:
    models = sources.alphafold is not None and not Path(sources.alphafold).is_dir()
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
    listed = Path(sources.rcsb)
    try:
        text = listed.read_text() if listed.is_file() else sources.rcsb
        ids = [entry_id(word) for word in re.split(r"[\s,]+", text) if word]
    except (OSError, ValueError) as error:
        wanted = "wanted all, ids such as 1cbs,2hhb, or a file of ids"
        raise SourceError(f"--rcsb {sources.rcsb}: {error}; {wanted}") from None
    if not ids:
        raise SourceError(f"--rcsb {sources.rcsb}: no id in it")
    return sorted(set(ids))


def _fetch(client: Client, ids: list[str], skips: list[Skip], say: Say) -> list[tuple[Path, str]]:
    counted = _counted(say, "structures fetched", len(ids))
    reasons = client.prefetch(ids, progress=counted)
    skips += [Skip("", name, "", "not fetched", reason) for name, reason in sorted(reasons.items())]
    paths = (client.fetch_structure(name) for name in ids if name not in reasons)
    return [(path, path.name) for path in paths]


def _fetch_models(client: Client | None, wanted: str | None, skips: list[Skip], say: Say) -> list[tuple[Path, str]]:
    """AlphaFold DB models by accession: listed, or in a file."""
    if wanted is None or Path(wanted).is_dir():
        return []
    text = Path(wanted).read_text() if Path(wanted).is_file() else wanted
    files = []
    for accession in sorted({word.upper() for word in re.split(r"[\s,]+", text) if word}):
        try:
            path = client.fetch_alphafold(accession)
            files.append((path, path.name))
        except NotFound as error:
            skips.append(Skip("", accession.lower(), "", "not fetched", error.reason))
        except FetchError:
            raise
        except ValueError as error:
            raise SourceError(f"--alphafold: {error}, or a directory of models") from None
    say(f"{len(files)} AlphaFold DB models")
    return files


def _counted(say: Say, what: str, total: int) -> Callable[[str], None]:
    """Says every thousandth that it was done."""
    done = 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        if done % 1000 == 0 or done == total:
            say(f"{done}/{total} {what}")

    return count


# --- texts ----------------------------------------------------------------------------------------------------------


def _texts(sources: Sources, client: Client | None, ids: list[str], say: Say) -> dict[str, Text]:
    """{entry: what is known of it}; an abstract or question that was given by file comes before RCSB's."""
    annotations: dict[str, Annotation] = {}
    if sources.facts is not None:
        broken: dict[str, str] = {}
        annotations |= read_annotations(sources.facts, broken)
        for path, reason in list(broken.items())[:5]:
            say(f"annotation left out: {path}: {reason}")
    if ids:
        unknown = [name for name in ids if name not in annotations]
        annotations |= client.fetch_annotations(unknown, progress=_counted(say, "annotations fetched", len(unknown)))
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


def _read_abstracts(source: Path | None) -> dict[str, str]:
    """{entry: abstract} of a published abstract.json, or of a folder of them and of texts ID.txt."""
    if source is None:
        return {}
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    abstracts = {}
    for path in paths:
        if path.suffix == ".txt":
            abstracts[path.stem.lower()] = " ".join(path.read_text(encoding="utf-8").split())
        elif path.suffix == ".json" or not source.is_dir():
            abstracts |= {name: text.description for name, text in read_texts(abstracts=path).items()}
    found = {name: text for name, text in abstracts.items() if text}
    if not found:
        raise SourceError(f"{source}: no abstract in it; wanted an abstract.json, or a folder of ID.txt")
    return found


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


