"""Structure files to proteins and facts: mmCIF, BinaryCIF and PDB format, plain or gzipped, told apart by content.

    entry = read_entry(path); entry.protein("A"); entry.facts

In reading order: files.py (bytes), then tables.py and cif.py, or pdb_records.py, pdb.py and placement.py, which all end
in atoms.py and residues.py; cif_facts.py, composition.py and pdb_facts.py answer for the entry.
Chosen: first model; one altloc per residue; atoms of zero occupancy keep their coordinates (as fair-esm does).
Given up: assemblies, and conformers other than the one taken. biotite is imported in this package only.
"""

from pathlib import Path

from proteingpt.data.structure.atoms import StructureError
from proteingpt.data.structure.cif import read_bcif, read_mmcif
from proteingpt.data.structure.entry import Entry
from proteingpt.data.structure.files import STRUCTURE_SUFFIXES, entry_of, find_structures, kind_of, read_bytes
from proteingpt.data.structure.pdb import read_pdb

__all__ = ["STRUCTURE_SUFFIXES", "Entry", "StructureError", "entry_of", "find_structures", "read_entry"]


def read_entry(path: str | Path, data: bytes | None = None, is_model: bool = False) -> Entry:
    """Parse a file once. Whatever is wrong with the file, or with reading it, is a StructureError that names it.

    data: the file's bytes, unpacked, where the caller has them; then the path is only a name.
    is_model: it is known to be a prediction with pLDDT for its B factors, though the file may not say so.
    """
    path = Path(path)
    try:
        data = read_bytes(path) if data is None else data
        read = {"bcif": read_bcif, "mmcif": read_mmcif, "pdb": read_pdb}[kind_of(data, path)]
        return read(data, path, is_model)
    except StructureError as error:
        raise StructureError(f"{path}: {error}") from error.__cause__
    except AssertionError:
        raise
    except Exception as error:  # the libraries beneath raise anything on damaged bytes
        raise StructureError(f"{path}: cannot be read as a structure: {type(error).__name__}: {error}") from error
