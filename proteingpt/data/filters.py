"""What an entry and a chain must be to become a sample: named steps, in the paper's order, and their funnel.

The paper keeps entries with an abstract, with a chain A, and without non-coding letters (204,826 -> 132,092). Every
other step says why something could not be a sample, or is a limit that the user asked for. What falls is a Skip with a
reason; a reason belongs to one step, so the funnel is counted from the skips alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from proteingpt.data.shards import ShardError, check_key
from proteingpt.protein import Facts, Protein

STANDARD_LETTERS = frozenset("ACDEFGHIKLMNPQRSTVWY")

# (name of the step, the reasons for which something falls there), in the order in which they are tried.
STEPS = (
    ("has an abstract", ("no abstract",)),
    ("stands in the given split", ("not in the split",)),
    ("could be fetched", ("not fetched",)),
    ("is readable", ("unreadable", "reader failed", "read error", "too slow")),
    ("has the wanted chain", ("no protein chain", "no such protein chain")),
    ("has a backbone", ("chain unusable", "no standard residue", "no backbone")),
    ("no non-coding letters", ("non-coding letters",)),
    ("wanted method", ("other method",)),
    ("wanted resolution", ("no resolution", "poor resolution")),
    ("wanted length", ("too short", "too long")),
    ("has a date", ("no date",)),
    ("has a usable key", ("bad key",)),
)
STEP_OF = {reason: number for number, (_, reasons) in enumerate(STEPS) for reason in reasons}
# No fault of the file, and perhaps gone by the next start of a build, which therefore reads it again.
PASSING = frozenset(["read error", "too slow"])

# Left out because the user asked for it; every other skip counts towards max_failed_share.
ASKED_FOR = frozenset(
    ["no abstract", "not in the split", "non-coding letters", "other method", "no resolution", "poor resolution"]
    + ["too short", "too long", "no date"]
)

# Words of a deposited method by which --methods may ask for it, beside any part of the method's own name.
METHOD_WORDS = {"em": "electron microscopy", "cryo-em": "electron microscopy", "xray": "x-ray"}
PREDICTED = "predicted"


@dataclass(frozen=True)
class Skip:
    """Something set aside. file: relative to the structures; chain: as asked for, "" where it did not come to that."""

    file: str
    entry: str
    chain: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Filters:
    """What is taken of an entry, the same in every process.

    chain: an author chain id, "label:X" for a label id, "first", or "all". methods: parts of deposited method names
    (`x-ray`, `nmr`, `em`, `neutron`), or `predicted`; none: any. max_resolution: angstrom; entries that state no
    resolution, as those by NMR, fall with it.
    """

    chain: str = "A"
    require_abstract: bool = False
    standard_letters_only: bool = False
    min_residues: int = 1
    max_residues: int | None = None
    max_resolution: float | None = None
    methods: tuple[str, ...] = ()


def wanted_chains(chain: str, chains: Iterable[str]) -> list[str]:
    """The chains to read of an entry that has `chains`: all of them, the first, or the one that is named."""
    chains = list(chains)
    return {"all": chains, "first": chains[:1]}.get(chain, [chain])


def refuse_chain(protein: Protein, facts: Facts, filters: Filters) -> tuple[str, str] | None:
    """(reason, detail) of the first step at which a chain falls, else None."""
    return (
        _refuse_residues(protein)
        or (filters.standard_letters_only and _refuse_letters(protein.sequence))
        or (filters.methods and _refuse_method(protein, facts, filters.methods))
        or (filters.max_resolution is not None and _refuse_resolution(facts.resolution, filters.max_resolution))
        or _refuse_length(len(protein), filters.min_residues, filters.max_residues)
        or _refuse_key(protein.key)
        or None
    )


def _refuse_residues(protein: Protein) -> tuple[str, str] | None:
    if not STANDARD_LETTERS & set(protein.sequence):
        return "no standard residue", f"none of the {len(protein)} residues is one of the twenty"
    if not protein.resolved.any():
        return "no backbone", f"none of the {len(protein)} residues has N, CA and C"
    return None


def _refuse_letters(sequence: str) -> tuple[str, str] | None:
    other = sorted(set(sequence) - STANDARD_LETTERS)
    if not other:
        return None
    num_other = sum(sequence.count(letter) for letter in other)
    return "non-coding letters", f"{num_other} of {len(sequence)} letters are {', '.join(other)}"


def _refuse_method(protein: Protein, facts: Facts, wanted: tuple[str, ...]) -> tuple[str, str] | None:
    found = [method.casefold() for method in facts.methods or ()]
    predicted = protein.confidence is not None or facts.methodology == "computational"
    for word in (word.casefold() for word in wanted):
        if predicted and word == PREDICTED or any(METHOD_WORDS.get(word, word) in method for method in found):
            return None
    stated = ", ".join(facts.methods or ()) or (PREDICTED if predicted else "none stated")
    return "other method", f"{stated}, wanted {' or '.join(wanted)}"


def _refuse_resolution(resolution: float | None, limit: float) -> tuple[str, str] | None:
    if resolution is None:
        return "no resolution", f"none is stated, wanted at most {limit} angstrom"
    return ("poor resolution", f"{resolution} angstrom, wanted at most {limit}") if resolution > limit else None


def _refuse_length(length: int, min_residues: int, max_residues: int | None) -> tuple[str, str] | None:
    if length < min_residues:
        return "too short", f"{length} residues, wanted at least {min_residues}"
    if max_residues is not None and length > max_residues:
        return "too long", f"{length} residues, wanted at most {max_residues}"
    return None


def _refuse_key(key: str) -> tuple[str, str] | None:
    try:
        check_key(key)
    except ShardError as error:
        return "bad key", str(error)
    return None


def asked_steps(filters: Filters) -> list[str]:
    """The steps that the funnel shows even where nothing falls."""
    asked = {
        "has an abstract": filters.require_abstract,
        "no non-coding letters": filters.standard_letters_only,
        "wanted method": filters.methods,
        "wanted resolution": filters.max_resolution is not None,
        "wanted length": filters.min_residues > 1 or filters.max_residues is not None,
    }
    always = ("is readable", "has the wanted chain", "has a backbone")
    return [name for name, _ in STEPS if name in always or asked.get(name)]


def count_funnel(num_entries: int, dropped: Iterable[Iterable[str]], asked: Iterable[str]) -> list[tuple[str, int]]:
    """[(step, entries left after it)], first ("entries", num_entries).

    dropped: for each entry that gave no sample the reasons of its skips; it falls at the last of their steps, since
    some chain of it came so far. A step is listed if it was asked for or something fell there.
    """
    fallen = [0] * len(STEPS)
    for reasons in dropped:
        fallen[max(STEP_OF[reason] for reason in reasons)] += 1
    funnel, left = [("entries", num_entries)], num_entries
    for number, (name, _) in enumerate(STEPS):
        left -= fallen[number]
        if fallen[number] or name in asked:
            funnel.append((name, left))
    return funnel
