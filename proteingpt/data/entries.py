"""One file to the samples of its chains, or to the reasons why there are none."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from proteingpt.data.filters import STEPS, Filters, Skip, refuse_chain, wanted_chains
from proteingpt.data.pieces import Parsed, Stored
from proteingpt.data.published import PublishedDataError, PublishedText, published_samples, read_embedding
from proteingpt.data.questions import closed_questions, describe
from proteingpt.data.shards import EncodedSample, encode_sample, file_sha256
from proteingpt.data.sources import Job, Text, merge_facts
from proteingpt.data.structure import StructureError, read_entry
from proteingpt.data.time_limit import OutOfTime, time_limit
from proteingpt.protein import UNKNOWN_RESIDUE, Facts, Protein, Sample, Turn


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one file gave: samples, skips, or with several chains both. others, date: see pieces.Parsed."""

    file: str
    entry: str
    samples: tuple[Sample, ...] = ()
    skips: tuple[Skip, ...] = ()
    date: str | None = None
    others: tuple[Skip, ...] = ()


# What makes another file of the entry worth a try: it is no fault of the entry.
FAILED_READING = dict(STEPS)["is readable"]


def read_outcome(job: Job, filters: Filters, seconds_per_file: float | None = None) -> Outcome:
    """Everything an entry gives, by the first of its files that can be read, each within so many seconds. Never raises
    for what the files hold."""
    files = ((job.path, job.file), *job.others)
    outcomes = []
    for path, file in files:
        outcomes.append(_read_file(dataclasses.replace(job, path=path, file=file), filters, seconds_per_file))
        if not any(skip.reason in FAILED_READING for skip in outcomes[-1].skips):
            break
    else:
        others = [_duplicate(o.file, o.entry, f"{_why(o)}, as {job.file} is") for o in outcomes[1:]]
        return dataclasses.replace(outcomes[0], others=tuple(others))
    *damaged, read = outcomes
    instead = f"the entry is read from {read.file}"
    others = [Skip(o.file, read.entry, "", "replaced", f"{_why(o)}; {instead}") for o in damaged]
    others += [_duplicate(file, read.entry, instead) for _, file in files[len(outcomes) :]]
    return dataclasses.replace(read, others=tuple(others))


def _why(outcome: Outcome) -> str:
    return f"{outcome.skips[0].reason}: {outcome.skips[0].detail}"


def _duplicate(file: str, entry: str, detail: str) -> Skip:
    return Skip(file, entry, "", "duplicate", detail)


def _read_file(job: Job, filters: Filters, seconds: float | None) -> Outcome:
    """What the job's own file gives; what is wrong with it becomes a skip."""
    try:
        with time_limit(seconds):
            return _read_embedding(job) if job.path.suffix == ".pt" else _read_chains(job, filters)
    except OutOfTime:
        return _nothing(job, job.name, "too slow", f"not read within {seconds:g} s: raise --seconds_per_file")
    except (StructureError, PublishedDataError, OSError) as error:
        reason = "read error" if is_of_the_system(error) else "unreadable"
        return _nothing(job, job.name, reason, _without_path(error, job.path))
    except Exception as error:
        # One file in a hundred thousand that our reader does not survive must not cost the build; it is named instead.
        return _nothing(job, job.name, "reader failed", f"{type(error).__name__}: {error}")


def is_of_the_system(error: Exception) -> bool:
    """Whether disk, permissions or memory made reading fail, rather than what the file holds. gzip's own errors are
    OSErrors too, but bear no number."""
    causes = (error, error.__cause__)
    return any(isinstance(e, MemoryError) or isinstance(e, OSError) and e.errno is not None for e in causes)


def _nothing(job: Job, entry: str, reason: str, detail: str) -> Outcome:
    return Outcome(job.file, entry, skips=(Skip(job.file, entry, "", reason, detail),))


def _without_path(error: Exception, path: Path) -> str:
    """The message without the path it begins with: the skip has it, and a moved directory gives the same report."""
    return str(error).removeprefix(f"{path}: ")


def _read_chains(job: Job, filters: Filters) -> Outcome:
    entry = read_entry(job.path, is_model=job.is_model)
    if not entry.chains:
        return _nothing(job, entry.id, "no protein chain", "no chain of the entry is a polypeptide")
    facts = merge_facts(entry.facts, job.text.facts)
    source = {"file": job.file, "sha256": file_sha256(job.path)}
    samples, skips = [], []
    for chain in wanted_chains(filters.chain, entry.chains):
        try:
            protein = entry.protein(chain)
        except StructureError as error:
            known = chain in entry.chains or chain.startswith("label:")
            reason = "chain unusable" if known else "no such protein chain"
            skips.append(Skip(job.file, entry.id, chain, reason, _without_path(error, job.path)))
            continue
        if refusal := refuse_chain(protein, facts, filters):
            skips.append(Skip(job.file, entry.id, chain, *refusal))
        else:
            samples.append(make_sample(protein, facts, source, job.text))
    date = job.text.date or entry.released or (str(facts.year) if facts.year is not None else None)
    return Outcome(job.file, entry.id, tuple(samples), tuple(skips), date)


def _read_embedding(job: Job) -> Outcome:
    """A published embedding in the place of a structure: the sample has texts, but neither sequence nor coordinates."""
    text = PublishedText(job.text.description, job.text.turns)
    samples = tuple(published_samples({job.name: text}, [(job.name, read_embedding(job.path))]))
    if not samples:
        return _nothing(job, job.name, "unreadable", "an embedding without abstract and questions asks nothing")
    return Outcome(job.file, job.name, samples, date=job.text.date)


def make_sample(protein: Protein, facts: Facts, source: Mapping[str, str], text: Text = Text()) -> Sample:
    """The sample of a chain. Its description is the abstract where there is one, else made from the facts.

    metadata: the facts of the entry, the name and sha256 of the file, and where the description is from.
    """
    described = {"description_from": "abstract" if text.description else "facts"}
    # Through JSON, so that a sample read back from a shard equals the one written: tuples become lists.
    metadata = json.loads(json.dumps({"facts": dataclasses.asdict(facts), "source": dict(source), **described}))
    turns = _join_turns(closed_questions(protein, facts), text.turns)
    return Sample(protein, text.description or describe(protein, facts), turns, metadata)


def _join_turns(computed: tuple[Turn, ...], given: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Computed questions, then given ones; where both ask the same, the given answer stands."""
    asked = {turn.question.casefold() for turn in given}
    return tuple(turn for turn in computed if turn.question.casefold() not in asked) + given


def encode_outcome(
    key: str, outcome: Outcome, entities: Mapping[str, str]
) -> tuple[Parsed, list[tuple[EncodedSample, Stored]]]:
    """The outcome as pieces.py keeps it: its samples as bytes, and what is to be known of them later."""
    samples = []
    for sample in outcome.samples:
        encoded, protein = encode_sample(sample), sample.protein
        # A sequence of which no letter is known (a published embedding) is nobody's copy, however long it is.
        known = protein.sequence if set(protein.sequence) != {UNKNOWN_RESIDUE} else sample.key
        digest = hashlib.sha256(known.encode()).hexdigest()
        numbers = (encoded.num_residues, encoded.num_turns)
        entity = entities.get(protein.chain)
        samples.append((encoded, Stored(encoded.key, protein.chain, entity, digest, *numbers, "", 0, {})))
    return Parsed(key, outcome.file, outcome.entry, outcome.date, (), outcome.skips, outcome.others), samples
