"""mmCIF and BinaryCIF: chains by `label_seq_id`, which is the index into the deposited sequence.

So gaps, insertion codes and negative numbers need no alignment. Only where a program wrote no label ids are the
observed residues taken for the sequence.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proteingpt.data.structure.atoms import (
    Atoms,
    Polymer,
    StructureError,
    check_positions,
    group_residues,
    runs,
    take,
    unique,
)
from proteingpt.data.structure.cif_facts import cif_facts, release_day
from proteingpt.data.structure.entry import Entry
from proteingpt.data.structure.files import decode, entry_of
from proteingpt.data.structure.residues import LETTER_COMPONENTS, is_amino_acid, is_nucleotide, is_peptide
from proteingpt.data.structure.tables import Tables, bcif_tables, mmcif_tables
from proteingpt.protein import short_id


def read_bcif(data: bytes, path: Path, is_model: bool = False) -> Entry:
    return _entry(bcif_tables(data), path, is_model)


def read_mmcif(data: bytes, path: Path, is_model: bool = False) -> Entry:
    return _entry(mmcif_tables(decode(data)), path, is_model)


def _entry(tables: Tables, path: Path, is_model: bool) -> Entry:
    plddt_scale = _plddt_scale(tables, is_model)
    polymers = _polymers(tables, with_b_factors=plddt_scale is not None)
    ids = tables.values("entry", "id") or ((tables.name,) if tables.name else ())
    return Entry(
        id=short_id(ids[0]) if ids else entry_of(path),
        facts=cif_facts(tables, unique(p.chain for p in polymers), is_predicted=plddt_scale is not None),
        chains=unique(p.chain for p in polymers if p.is_peptide),
        path=path,
        polymers=polymers,
        parents=_parents(tables),
        plddt_scale=plddt_scale,
        released=release_day(tables),
    )


@dataclass(frozen=True)
class _Site:
    """atom_site of the first model, column by column; texts as in the file, empty where it has none."""

    rows: np.ndarray | slice  # of the whole category
    atoms: Atoms  # residue: label_seq_id, 0 where it has none
    label: np.ndarray
    chain: np.ndarray


def _site(tables: Tables, with_b_factors: bool) -> _Site:
    model = tables.models()
    num_rows = tables.num_rows("atom_site")
    rows = slice(None) if model is None or (model == model[0]).all() else model == model[0]

    def texts(*names: str, wanted: bool = False) -> np.ndarray:
        found = tables.texts("atom_site", *names)
        if found is None and wanted:
            raise StructureError(f"atom_site has no column {' or '.join(names)}")
        return (np.full(num_rows, "") if found is None else found)[rows]

    def numbers(name: str, missing: float, dtype: type = np.float64) -> np.ndarray:
        found = tables.numbers("atom_site", name, dtype, missing)
        return (np.full(num_rows, missing, dtype) if found is None else found)[rows]

    for axis in "xyz":
        if tables.column("atom_site", f"Cartn_{axis}") is None:
            raise StructureError(f"atom_site has no column Cartn_{axis}")
    position = np.stack([numbers(f"Cartn_{axis}", np.nan) for axis in "xyz"], axis=1)
    check_positions(position)
    altloc = texts("label_alt_id")
    atoms = Atoms(
        residue=numbers("label_seq_id", 0, np.int64),
        name=texts("label_atom_id", "auth_atom_id", wanted=True),
        component=texts("label_comp_id", "auth_comp_id", wanted=True),
        altloc=altloc,
        # Two columns are decoded only where they decide something.
        occupancy=numbers("occupancy", 1.0) if (altloc != "").any() else np.ones(len(position)),
        position=position.astype(np.float32),
        b_factor=numbers("B_iso_or_equiv", 0.0) if with_b_factors else np.zeros(len(position)),
    )
    label, chain = texts("label_asym_id", "auth_asym_id", wanted=True), texts("auth_asym_id", "label_asym_id")
    return _Site(rows, atoms, label, np.where(chain == "", label, chain))


def _polymers(tables: Tables, with_b_factors: bool) -> tuple[Polymer, ...]:
    site = _site(tables, with_b_factors)
    if not (site.atoms.residue > 0).any():
        return _observed_polymers(tables, site)
    polymer_rows = np.flatnonzero(site.atoms.residue > 0)
    rows_by_label: dict[str, list[np.ndarray]] = {}
    for start, stop in runs(site.label[polymer_rows]):
        rows_by_label.setdefault(str(site.label[polymer_rows[start]]), []).append(polymer_rows[start:stop])

    entity_of = dict(tables.rows("struct_asym", "id", "entity_id"))
    types = dict(tables.rows("entity_poly", "entity_id", "type"))
    sequences = _deposited_sequences(tables)
    polymers = []
    for label, parts in rows_by_label.items():
        rows = np.concatenate(parts)
        entity = entity_of.get(label) or _entity_of_atom(tables, site, rows[0])
        if types and entity not in types:
            continue  # branched sugars may carry a label_seq_id in old files
        atoms = take(site.atoms, rows)
        components, residue = _index_residues(label, sequences.get(entity), atoms)
        kind = types.get(entity, "").lower()
        peptide = kind.startswith(("polypeptide", "cyclic-pseudo-peptide"))
        if kind in ("", "other"):
            peptide = is_peptide(components)
        atoms = Atoms(**{**atoms.__dict__, "residue": residue})
        polymers.append(Polymer(str(site.chain[rows[0]]), label, peptide, components, atoms))
    return tuple(polymers)


def _entity_of_atom(tables: Tables, site: _Site, row: int) -> str:
    entity = tables.texts("atom_site", "label_entity_id")
    return "" if entity is None else str(entity[site.rows][row])


def _index_residues(
    label: str, deposited: dict[int, str] | None, atoms: Atoms
) -> tuple[tuple[str, ...], np.ndarray]:
    """Deposited components, and for each atom its row among them. Without a deposited sequence: what was observed."""
    if deposited is None:
        numbers, first = np.unique(atoms.residue, return_index=True)
        return tuple(atoms.component[first].tolist()), np.searchsorted(numbers, atoms.residue)
    numbers = np.array(sorted(deposited))
    residue = np.searchsorted(numbers, atoms.residue).clip(max=len(numbers) - 1)
    strangers = np.unique(atoms.residue[numbers[residue] != atoms.residue])
    if len(strangers):
        raise StructureError(
            f"atom_site places residue {strangers[0]} in chain {label!r} (label_asym_id), whose deposited sequence of "
            f"{len(numbers)} residues has no such number"
        )
    return tuple(deposited[number] for number in numbers.tolist()), residue


def _deposited_sequences(tables: Tables) -> dict[str, dict[int, str]]:
    """{entity: {number: component}}; of several components at one number (microheterogeneity) the first."""
    sequences: dict[str, dict[int, str]] = {}
    for entity, number, component in tables.rows("entity_poly_seq", "entity_id", "num", "mon_id"):
        if not number.isdecimal():
            raise StructureError(f"entity_poly_seq.num holds {number!r}; wanted a positive number")
        sequences.setdefault(entity, {}).setdefault(int(number), component)
    if sequences:
        return sequences
    for entity, text in tables.rows("entity_poly", "entity_id", "pdbx_seq_one_letter_code"):
        # Not the canonical code: here a modified residue is one name in brackets, so that places can be counted.
        found = re.findall(r"\(([^)]*)\)|(\S)", text)
        if found:
            names = (name or LETTER_COMPONENTS.get(letter, "UNK") for name, letter in found)
            sequences[entity] = dict(enumerate(names, start=1))
    return sequences


def _observed_polymers(tables: Tables, site: _Site) -> tuple[Polymer, ...]:
    """Files of refinement programs without label_seq_id: the residues of each author chain, as observed."""
    number, code = tables.texts("atom_site", "auth_seq_id"), tables.texts("atom_site", "pdbx_PDB_ins_code")
    if number is None:
        raise StructureError("atom_site has neither label_seq_id nor auth_seq_id; wanted residue numbers")
    key = (number if code is None else np.strings.add(np.strings.add(number, "|"), code))[site.rows]
    polymers = []
    for chain in unique(site.chain.tolist()):
        rows = np.flatnonzero(site.chain == chain)
        known = {c for c in set(site.atoms.component[rows].tolist()) if is_amino_acid(c) or is_nucleotide(c)}
        rows = rows[np.isin(site.atoms.component[rows], sorted(known))]
        if len(rows):
            atoms = take(site.atoms, rows)
            residue, first = group_residues(key[rows], atoms.name, atoms.altloc)
            components = tuple(atoms.component[first].tolist())
            atoms = Atoms(**{**atoms.__dict__, "residue": residue})
            polymers.append(Polymer(chain, str(site.label[rows[0]]), is_peptide(components), components, atoms))
    return tuple(polymers)


def _parents(tables: Tables) -> dict[str, frozenset[str]]:
    parents: dict[str, set[str]] = {}
    rows = tables.rows("pdbx_struct_mod_residue", "label_comp_id", "parent_comp_id")
    for component, parent in rows + tables.rows("chem_comp", "id", "mon_nstd_parent_comp_id"):
        parents.setdefault(component, set()).update(re.findall(r"\w+", parent))
    return {component: frozenset(names) for component, names in parents.items()}


def _plddt_scale(tables: Tables, is_model: bool) -> float | None:
    """What the B factors are to be divided by, if they are pLDDT: 100, or 1 for a metric declared as such.

    By the ModelCIF category `ma_qa_metric`; where a program that rewrote the file dropped it, by the id AlphaFold DB
    gave it or by AlphaFold as software. An experimental entry may name AlphaFold too (phasing): it is not a model.
    """
    if any("THEORETICAL" not in method.upper() for method in tables.values("exptl", "method")):
        return None
    metrics = [" ".join(row).lower() for row in tables.rows("ma_qa_metric", "name", "type")]
    plddt = [metric for metric in metrics if "plddt" in metric]
    if plddt:
        return 1.0 if all("[0,1]" in metric for metric in plddt) else 100.0
    is_alphafold = is_model or any("alphafold" in name.lower() for name in tables.values("software", "name"))
    is_alphafold |= any(re.fullmatch(r"AF-[\w-]+-F\d+", name) for name in tables.values("entry", "id"))
    return 100.0 if is_alphafold and not metrics else None
