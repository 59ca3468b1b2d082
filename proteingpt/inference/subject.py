"""What is asked about: a chain of a structure file, a pasted sequence, or both; and what of it is missing.

Chosen: what is not there at all is left out of the prompt, as the figures `sequence-only` and `structure-only` of an
evaluation do it, so that these say what such answers are worth. Given up: pasted sequences are not aligned to a chain.
"""

import base64
import binascii
import dataclasses
import re
from pathlib import Path

import numpy as np

from proteingpt.data.structure import Entry, StructureError, read_entry
from proteingpt.protein import UNKNOWN_RESIDUE, Protein

USUAL_CHAIN = "A"  # the paper's
LETTERS = "ACDEFGHIKLMNPQRSTVWYBJOUXZ"
MAX_COORDINATE = 1e6  # angstrom
NUM_NAMED = 5
WITH_SEQUENCE = "+sequence"  # behind the name of a structure that was given a sequence by hand


class SubjectError(ValueError):
    """A sequence, or a protein, that cannot be asked about: says what was found and what was wanted."""


def read_structure(path: str | Path, chain: str | None = None, data: bytes | None = None) -> tuple[Entry, Protein]:
    """A file's entry and its chain: the one asked for; else A, or the first where there is no A. data: the file's
    bytes, unpacked, where the caller has them. Raises StructureError."""
    entry = read_entry(path, data)
    if chain is None:
        chain = USUAL_CHAIN if USUAL_CHAIN in entry.chains or not entry.chains else entry.chains[0]
    return entry, entry.protein(chain)


def parse_sequence(text: str) -> tuple[str, str]:
    """(name, letters) of one-letter codes or a single FASTA record; the name is empty where there is none.

    Blanks, line ends and a closing `*` are dropped, letters made upper case. Raises SubjectError.
    """
    name, lines = "", text.strip().splitlines()
    if lines and lines[0].startswith(">"):
        name = (lines.pop(0)[1:].split() or [""])[0]
    if any(line.startswith(">") for line in lines):
        raise SubjectError("the text holds several FASTA records: give one sequence at a time")
    letters = re.sub(r"\s", "", "".join(lines)).upper().removesuffix("*")
    if not letters:
        where = " below the FASTA header" if text.strip().startswith(">") else ""
        raise SubjectError(f"no sequence{where}: wanted one letter for each residue, such as MKTAYIAKQR")
    strange = re.search(f"[^{LETTERS}]", letters)
    if strange:
        raise SubjectError(
            f"{strange[0]!r} at position {strange.start() + 1} of the sequence is no amino acid: wanted the letters "
            f"{LETTERS}"
        )
    return name, letters


def protein_of_sequence(text: str) -> Protein:
    """A protein without coordinates. Raises SubjectError."""
    name, letters = parse_sequence(text)
    return Protein(name or "sequence", "", letters, np.full((len(letters), 3, 3), np.nan, np.float32))


def with_sequence(protein: Protein, text: str) -> Protein:
    """The chain with a sequence given by hand in place of the file's, residue by residue. Raises SubjectError."""
    _, letters = parse_sequence(text)
    if not has_structure(protein):
        why = "has no structure that a sequence could go with: open a structure file first"
        raise SubjectError(f"{name_of(protein)} {why}")
    if len(letters) != len(protein):
        raise SubjectError(
            f"the sequence given has {len(letters)} residues, and chain {protein.chain} of {protein.id} has "
            f"{len(protein)}: {how_they_lie(protein, letters)}"
        )
    return dataclasses.replace(protein, sequence=letters)


def how_they_lie(protein: Protein, letters: str) -> str:
    """What to do about a sequence of another length than the chain, where one is found in the other."""
    inside = re.search(protein.sequence.replace(UNKNOWN_RESIDUE, "."), letters)
    if inside:
        return f"the chain's are its residues {inside.start() + 1} to {inside.end()}: give those alone"
    resolved = "".join(letter for letter, there in zip(protein.sequence, protein.resolved) if there)
    if letters == resolved:
        lacking = len(protein) - len(letters)
        return f"it lacks those {lacking} that have no coordinates: give them too, as they were deposited"
    first = protein.sequence.find(letters) + 1
    if first:
        return f"it is residues {first} to {first + len(letters) - 1} of the chain: give the whole of it"
    return "give the sequence of that chain as it was deposited, or one of the two alone"


def differences(protein: Protein, given: Protein) -> list[str]:
    """Sentences on where a sequence given by hand is another than the file's."""
    pairs = enumerate(zip(protein.sequence, given.sequence, strict=True), 1)
    other = [f"{old}{place}{new}" for place, (old, new) in pairs if new != old != UNKNOWN_RESIDUE]
    if not other:
        return []
    named = ", ".join(other[:NUM_NAMED]) + (", ..." if len(other) > NUM_NAMED else "")
    verb = "differs" if len(other) == 1 else "differ"
    count = f"{len(other)} of {len(given)} residues"
    return [f"{count} given {verb} from the file's ({named}): the model gets those given."]


def name_of(protein: Protein) -> str:
    return protein.key if protein.chain else protein.id


def has_structure(protein: Protein) -> bool:
    return bool(protein.resolved.any())


def has_sequence(protein: Protein) -> bool:
    return any(letter != UNKNOWN_RESIDUE for letter in protein.sequence)


def missing(protein: Protein, reads_structure: bool = True, reads_sequence: bool = True) -> list[str]:
    """Sentences on what the model does not get of what it reads. Raises SubjectError where it would get nothing."""
    structure, sequence = has_structure(protein), has_sequence(protein)
    if not (structure and reads_structure or sequence and reads_sequence):
        raise SubjectError(
            f"{name_of(protein)}: this model reads the {' and the '.join(parts(reads_structure, reads_sequence))}, "
            f"and there is none here: give a {'structure file' if reads_structure else 'sequence'}"
        )
    notes, total = [], len(protein)
    unresolved, unknown = total - int(protein.resolved.sum()), protein.sequence.count(UNKNOWN_RESIDUE)
    if reads_structure and not structure:
        notes.append(left_out("structure", "sequence"))
    elif reads_structure and unresolved:
        notes.append(f"{unresolved} of {total} residues have no coordinates.")
    if reads_sequence and not sequence:
        notes.append(left_out("sequence", "structure"))
    elif reads_sequence and unknown:
        notes.append(f"{unknown} of {total} residues have no known letter (X).")
    return notes


def parts(reads_structure: bool, reads_sequence: bool) -> list[str]:
    return [name for name, read in (("structure", reads_structure), ("sequence", reads_sequence)) if read]


def left_out(absent: str, present: str) -> str:
    return (
        f"No {absent}: the model gets the {present} alone, which it was not trained for. What such answers are worth "
        f"is measured by launch/evaluate.py --compare {present}-only."
    )


def summary(protein: Protein) -> str:
    """One line for a reader: `1cbs_A: 137 residues, 137 with coordinates`."""
    kind = "predicted structure" if protein.confidence is not None else f"{protein.resolved.sum()} with coordinates"
    return f"{name_of(protein)}: {len(protein)} residues, {kind}"


# ------------------------------------------------------------------------------------------------------- as JSON values


def to_json(protein: Protein) -> dict:
    """Arrays as base64 of little-endian float32."""

    def packed(array):
        return None if array is None else base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()

    return {
        "id": protein.id,
        "chain": protein.chain,
        "sequence": protein.sequence,
        "backbone": packed(protein.backbone),
        "confidence": packed(protein.confidence),
    }


def from_json(values: object, max_residues: int) -> Protein:
    """What `to_json` made, from whom nothing is believed. Raises SubjectError."""
    if not isinstance(values, dict) or not all(isinstance(values.get(k), str) for k in ("id", "chain", "sequence")):
        raise SubjectError("not a protein: wanted id, chain and sequence as text, backbone and confidence as base64")
    sequence = values["sequence"]
    check_length(len(sequence), max_residues)
    if re.search(f"[^{LETTERS}]", sequence) or not sequence or len(values["id"]) > 200 or len(values["chain"]) > 20:
        raise SubjectError("not a protein: its sequence, id or chain is empty, too long, or no text of letters")
    backbone = unpacked(values.get("backbone"), (len(sequence), 3, 3), "backbone")
    if np.isinf(backbone).any() or (np.abs(backbone) > MAX_COORDINATE).any():
        raise SubjectError("not a protein: a coordinate is beyond reason")
    confidence = None
    if values.get("confidence") is not None:
        confidence = unpacked(values["confidence"], (len(sequence),), "confidence")
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise SubjectError("not a protein: confidence is not within 0 and 1")
    return Protein(values["id"], values["chain"], sequence, backbone, confidence)


def unpacked(text: object, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != 4 * int(np.prod(shape)):
        raise SubjectError(f"not a protein: {name} is no base64 of float32 {shape}")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def check_length(num_residues: int, max_residues: int):
    if num_residues > max_residues:
        raise SubjectError(
            f"{num_residues} residues are more than the {max_residues} allowed here: take another chain, or a domain "
            "of it"
        )


USER_ERRORS = (StructureError, SubjectError)
