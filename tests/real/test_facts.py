"""Facts of real entries: the same from all formats, and the same as gemmi counts them.

Everything here lies in ../shared/data beside the repository; without it the tests are skipped.
"""

from collections import Counter
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import gemmi
import pytest

from proteingpt.data.structure import find_structures, read_entry
from proteingpt.protein import Facts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
if not DATA.is_dir():
    pytest.skip(f"no real data: {DATA} is absent", allow_module_level=True)

MAX_PACKED_BYTES = 250_000


@lru_cache(maxsize=None)
def facts(path: Path) -> Facts:
    return read_entry(path).facts


def entries() -> dict[str, dict[str, Path]]:
    """{id: {bcif, cif or pdb: file}}"""
    found: dict[str, dict[str, Path]] = {}
    for path in find_structures(DATA / "pdb"):
        if path.stat().st_size <= MAX_PACKED_BYTES:
            entry_id, kind, *_ = path.name.split(".")
            found.setdefault(entry_id, {})[kind] = path
    return found


# Fields that differ between mmCIF and BinaryCIF of one entry, with the reason.
REVISED = {
    "3jqh": {"keywords", "software"},  # the mmCIF file is of an older revision, which names fewer of both
}
# Between mmCIF and PDB format: what both know, and not the same way.
OTHERWISE_IN_PDB_FORMAT = {
    "1a0m": {"keywords"},  # `CRYSTAL STRUCTURE` was one before remediation
    "1j59": {"keywords"},  # `GENE REGULATION/DNA COMPLEX` for `GENE REGULATION-DNA COMPLEX`
    "1lcd": {"keywords"},  # `GENE REGULATION/DNA COMPLEX` there is the classification, and so no keyword
    "1uyd": {"resolution"},  # REMARK 2 says 2.0, against its own REMARK 3 and mmCIF
    # REMARK 2 has two decimals.
    "4gpg": {"resolution"},
    "4opj": {"resolution"},
    "4p5j": {"resolution"},
    "5ugo": {"resolution"},
}


def folded(value):
    """PDB format is in capitals."""
    if isinstance(value, tuple):
        return tuple(folded(item) for item in value)
    return value.upper() if isinstance(value, str) else value


def differing(first: Facts, second: Facts) -> set[str]:
    return {f.name for f in fields(Facts) if folded(getattr(first, f.name)) != folded(getattr(second, f.name))}


def test_mmcif_and_binarycif_of_one_entry_give_the_same_facts():
    pairs = [(entry_id, files) for entry_id, files in entries().items() if {"cif", "bcif"} <= files.keys()]
    assert len(pairs) >= 10
    for entry_id, files in pairs:
        assert differing(facts(files["cif"]), facts(files["bcif"])) == REVISED.get(entry_id, set()), entry_id


def test_pdb_format_agrees_with_mmcif_wherever_it_says_anything():
    num_compared = Counter()
    for entry_id, files in entries().items():
        if "pdb" in files and len(files) > 1:
            old, new = facts(files["pdb"]), facts(files.get("cif") or files["bcif"])
            known = {f.name for f in fields(Facts) if getattr(old, f.name) is not None}
            num_compared.update(known)
            # What mmCIF leaves empty may stand in the other: `not` and None are no disagreement.
            known -= {name for name in known if getattr(new, name) is None}
            assert differing(old, new) & known == OTHERWISE_IN_PDB_FORMAT.get(entry_id, set()), entry_id
    for name in ("num_heavy_atoms", "num_solvent_atoms", "num_polymer_monomers", "num_cis_peptides", "classification"):
        assert num_compared[name] >= 30, name


def test_counts_equal_those_of_gemmi():
    """Its own reader and its own rows: atoms of the first model, entities, monomers, bonds, mass."""
    num_compared = 0
    for entry_id, files in entries().items():
        if "cif" not in files:
            continue
        found = facts(files["cif"])
        block = gemmi.cif.read(str(files["cif"]))[0]
        structure = gemmi.make_structure_from_block(block)
        atoms = [(residue.name, atom) for chain in structure[0] for residue in chain for atom in residue]
        hydrogens = sum(atom.is_hydrogen() for _, atom in atoms)
        waters = sum(name in ("HOH", "DOD") and not atom.is_hydrogen() for name, atom in atoms)
        got = (found.num_models, found.num_heavy_atoms, found.num_hydrogen_atoms, found.num_solvent_atoms)
        assert got == (len(structure), len(atoms) - hydrogens, hydrogens, waters), entry_id

        kinds = Counter(block.find_values("_entity.type"))
        got = (found.num_polymer_entities, found.num_nonpolymer_entities, found.num_branched_entities)
        assert got == (kinds["polymer"], kinds["non-polymer"], kinds["branched"]), entry_id
        assert (found.num_solvent_entities, found.num_entities) == (kinds["water"], kinds.total()), entry_id

        scheme = [gemmi.cif.is_null(row[0]) for row in block.find(["_pdbx_poly_seq_scheme.auth_seq_num"])]
        assert (found.num_polymer_monomers, found.num_unmodeled_monomers) == (len(scheme), sum(scheme)), entry_id
        bonds = Counter(block.find_values("_struct_conn.conn_type_id"))
        assert (found.num_covalent_bonds, found.num_metal_bonds) == (bonds["covale"], bonds["metalc"]), entry_id
        num_compared += 1
    assert num_compared >= 100
