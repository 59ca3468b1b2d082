"""PDB format: chains by author id, their residues placed in SEQRES.

The format has no index into the deposited sequence, and no ids but the author's: see placement.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from biotite.structure.io.pdb.hybrid36 import decode_hybrid36

from proteingpt.data.structure.atoms import (
    Atoms,
    Polymer,
    StructureError,
    check_positions,
    group_residues,
    take,
    unique,
)
from proteingpt.data.structure.entry import Entry
from proteingpt.data.structure.files import decode, entry_of
from proteingpt.data.structure.pdb_facts import pdb_facts, release_day
from proteingpt.data.structure.pdb_records import (
    BLANK_CHAIN,
    complies,
    joined,
    missing_residues,
    records_of,
    remarks_of,
    seqres_of,
)
from proteingpt.data.structure.placement import Place, bonds_of, place_residues
from proteingpt.data.structure.residues import is_amino_acid, is_nucleotide, is_peptide


def read_pdb(data: bytes, path: Path, is_model: bool = False) -> Entry:
    lines = decode(data).split("\n")
    records = records_of(lines)
    remarks = remarks_of(records)
    if complies(remarks) and "END" not in records:
        raise StructureError(
            "truncated: REMARK 4 says it complies with the PDB format, and the END record is missing; fetch the file "
            "again"
        )
    table = _pdb_atoms(_first_model(lines))
    seqres, missing = seqres_of(records), missing_residues(remarks)
    polymers = _polymers(table, seqres, missing)
    plddt_scale = _plddt_scale(records, is_model)
    return Entry(
        id=_pdb_id(records.get("HEADER", [""])[0]) or entry_of(path),
        facts=pdb_facts(records, remarks, polymers, table.atoms.component, table.element, plddt_scale is not None),
        chains=unique(p.chain for p in polymers if p.is_peptide),
        path=path,
        polymers=polymers,
        parents=_parents(records.get("MODRES", [])),
        plddt_scale=plddt_scale,
        released=release_day(records),
    )


def _pdb_id(header: str) -> str:
    identifier = header[62:66].strip().lower()
    return identifier if re.fullmatch(r"[0-9][0-9a-z]{3}", identifier) else ""


def _first_model(lines: list[str]) -> list[str]:
    """ATOM, HETATM and TER lines up to the first ENDMDL or second MODEL."""
    kept, num_models = [], 0
    for line in lines:
        record = line[:6]
        if record in ("ATOM  ", "HETATM") or record.startswith("TER"):
            kept.append(line)
        elif record.startswith("ENDMDL") and kept:
            break
        elif record.startswith("MODEL "):
            num_models += 1
            if num_models > 1:
                break
    if not any(line.startswith(("ATOM  ", "HETATM")) for line in kept):
        raise StructureError("no ATOM or HETATM record; wanted coordinates (if the file was cut short, fetch it again)")
    return kept


@dataclass(frozen=True)
class _PdbAtoms:
    """Atoms of the first model. serial: line number among them, so that TER can be placed; key: number and code."""

    atoms: Atoms
    serial: np.ndarray
    chain: np.ndarray
    key: np.ndarray
    element: np.ndarray
    is_hetero: np.ndarray
    ends: dict[str, int]  # chain: serial of its last TER


def _pdb_atoms(lines: list[str]) -> _PdbAtoms:
    """Columns as in section 9 of the PDB format guide 3.3, counted from 0 here."""
    serial = np.array([i for i, line in enumerate(lines) if not line.startswith("TER")])
    # One byte a column: what is not ASCII has no place in a coordinate record, and becomes `?`.
    packed = np.array([lines[i][:80].encode("ascii", "replace") for i in serial], dtype="S80")
    table = packed.view("S1").reshape(len(packed), 80)

    def field_(start: int, stop: int) -> np.ndarray:
        # A short line has NULs behind its end; a blank keeps what stands after them from being lost.
        column = table[:, start:stop].copy()
        column[column == b""] = b" "
        return np.strings.strip(column.view(f"S{stop - start}")[:, 0])

    position = np.stack([_pdb_numbers(field_(a, a + 8), "xyz"[i], None) for i, a in enumerate((30, 38, 46))], axis=1)
    check_positions(position)
    chain = field_(21, 22).astype(str)
    chain[chain == ""] = BLANK_CHAIN
    ends: dict[str, int] = {}
    for i, line in enumerate(lines):
        if line.startswith("TER"):  # a bare TER ends the chain of the atom before it
            before = np.searchsorted(serial, i) - 1
            named = line[21:22].strip() or (str(chain[before]) if before >= 0 else BLANK_CHAIN)
            ends[named] = i
    atoms = Atoms(
        residue=np.zeros(len(serial), dtype=np.int64),
        name=field_(12, 16).astype(str),
        component=field_(17, 20).astype(str),
        altloc=field_(16, 17).astype(str),
        occupancy=_pdb_numbers(field_(54, 60), "occupancy", 1.0),
        position=position.astype(np.float32),
        b_factor=_pdb_numbers(field_(60, 66), "B factor", 0.0),
    )
    key = np.strings.add(np.strings.add(field_(22, 26), b"|"), field_(26, 27)).astype(str)
    return _PdbAtoms(atoms, serial, chain, key, field_(76, 78).astype(str), table[:, 0] == b"H", ends)


def _pdb_numbers(texts: np.ndarray, what: str, missing: float | None) -> np.ndarray:
    if missing is not None:
        texts = np.where(texts == b"", str(missing).encode(), texts)
    try:
        numbers = texts.astype(np.float64)
    except ValueError as error:
        raise StructureError(
            f"broken number for {what} in a coordinate record: {error}; fetch the file again, or correct it"
        ) from error
    if not np.isfinite(numbers).all():
        raise StructureError(
            f"{what} is {numbers[~np.isfinite(numbers)][0]} in a coordinate record; wanted a number: leave out the "
            "record of an atom that was not located"
        )
    return numbers


def _polymers(
    table: _PdbAtoms, seqres: dict[str, tuple[str, ...]], missing: dict[str, list[Place]]
) -> tuple[Polymer, ...]:
    polymers = []
    for chain in unique([*seqres, *table.chain.tolist()]):
        deposited = seqres.get(chain)
        rows = _polymer_rows(table, chain, deposited)
        if deposited is None and not len(rows):
            continue
        atoms = take(table.atoms, rows)
        residue, first = group_residues(table.key[rows], atoms.name, atoms.altloc)
        observed = [_place(str(atoms.component[i]), str(table.key[rows[i]])) for i in first]
        components = tuple(place.component for place in observed)
        if deposited is None and not is_peptide(components) and not any(map(is_nucleotide, components)):
            continue
        atoms = Atoms(**{**atoms.__dict__, "residue": residue})
        if deposited is not None:
            # Only a protein needs its coordinates placed: a nucleic chain is named and refused.
            row_of = np.full(len(observed), -1)
            if is_peptide(deposited):
                bonded = bonds_of(atoms, len(observed))
                row_of = place_residues(chain, observed, bonded, deposited, missing.get(chain, []))
            placed = row_of[residue]
            atoms = take(Atoms(**{**atoms.__dict__, "residue": placed}), placed >= 0)
            components = deposited
        polymers.append(Polymer(chain, None, is_peptide(components), components, atoms))
    return tuple(polymers)


def _polymer_rows(table: _PdbAtoms, chain: str, deposited: tuple[str, ...] | None) -> np.ndarray:
    """Atoms of a chain that belong to its polymer: before its TER, and of a component that can be in it."""
    rows = np.flatnonzero(table.chain == chain)
    if chain in table.ends and (table.serial[rows] < table.ends[chain]).any():
        rows = rows[table.serial[rows] < table.ends[chain]]
    component = table.atoms.component[rows]
    listed = set(deposited or ())
    known = [c for c in set(component.tolist()) if c in listed or is_amino_acid(c) or is_nucleotide(c)]
    # Modified residues are HETATM; an unknown name on an ATOM record is taken for a residue, on HETATM for a ligand.
    return rows[np.isin(component, known) | (~table.is_hetero[rows] & (deposited is None))]


def _place(component: str, key: str) -> Place:
    text, code = key.rsplit("|", 1)
    if re.fullmatch(r"[-+]?\d+", text):
        return Place(component, int(text), code)
    if not re.fullmatch(r"[A-Z][0-9A-Z]{3}|[a-z][0-9a-z]{3}", text):
        raise StructureError(f"residue number {text!r} of {component} is neither decimal nor hybrid-36")
    return Place(component, decode_hybrid36(text), code)


def _parents(lines: list[str]) -> dict[str, frozenset[str]]:
    parents: dict[str, set[str]] = {}
    for line in lines:
        if line[24:27].strip():
            parents.setdefault(line[12:15].strip(), set()).add(line[24:27].strip())
    return {component: frozenset(names) for component, names in parents.items()}


def _plddt_scale(records: dict[str, list[str]], is_model: bool) -> float | None:
    """Only a model: an experimental entry may name AlphaFold where it says how it was phased."""
    method = joined(records, "EXPDTA").upper()
    if method and "THEORETICAL" not in method:
        return None
    lines = (line for record in ("HEADER", "TITLE", "COMPND", "REMARK") for line in records.get(record, []))
    return 100.0 if is_model or any("ALPHAFOLD" in line.upper() for line in lines) else None
