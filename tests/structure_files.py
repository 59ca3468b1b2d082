"""Structure files of a few residues whose every coordinate is known by construction, in all three formats.

In them residue k (its place in the deposited sequence, from 1) has N at (k, 0, 0), CA at (k, 1, 0), C at (k, 2, 0), so
that an atom's position says where it belongs; neighbours are bonded (C-N 2.2 angstrom), not so across a gap (2.8).
"""

import io
import textwrap

import numpy as np
from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFColumn, BinaryCIFFile, CIFFile

NAMES = ("N", "CA", "C")


class Atom:
    """One atom as a file states it; `place` is the label_seq_id (0: a ligand), `number` the author's."""

    def __init__(self, name, component, place, number, code="", altloc="", occupancy=1.0, shift=0.0, b=20.0,
                 chain="A", label="A", entity="1", model=1, hetero=False):  # fmt: skip
        self.__dict__.update(locals())
        y = NAMES.index(name) if name in NAMES else 5
        self.position = (place + shift, float(y), 0.0)


def residue(component, place, number=None, names=NAMES, **more):
    return [Atom(name, component, place, place if number is None else number, **more) for name in names]


def mmcif(atoms, sequences, head="", types=None):
    """sequences: {entity: [(number, component), ...]}, microheterogeneity as a number given twice."""
    lines = ["data_9XYZ", "_entry.id 9XYZ", head.strip(), "loop_", "_entity_poly.entity_id", "_entity_poly.type"]
    lines += [f"{entity} '{(types or {}).get(entity, 'polypeptide(L)')}'" for entity in sequences]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    lines += [f"{entity} {number} {name}" for entity, residues in sequences.items() for number, name in residues]
    columns = "group_PDB id label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id "
    columns += "pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id "
    columns += "pdbx_PDB_model_num"
    lines += ["loop_", *(f"_atom_site.{name}" for name in columns.split())]
    for serial, a in enumerate(atoms, start=1):
        x, y, z = a.position
        lines.append(
            f"{'HETATM' if a.hetero else 'ATOM'} {serial} {a.name} {a.altloc or '.'} {a.component} {a.label} "
            f"{a.entity} {a.place or '.'} {a.code or '?'} {x:.3f} {y:.3f} {z:.3f} {a.occupancy:.2f} {a.b:.2f} "
            f"{a.number} {a.chain} {a.model}"
        )
    return "\n".join(line for line in lines if line) + "\n"


def pdb_atom(serial, a):
    x, y, z = a.position
    record = "HETATM" if a.hetero else "ATOM"
    return (
        f"{record:<6}{serial:>5}  {a.name:<3}{a.altloc or ' '}{a.component:>3} {a.chain}{a.number:>4}{a.code or ' '}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{a.occupancy:6.2f}{a.b:6.2f}          {a.name[0]:>2}"
    )


def pdb(atoms, seqres=None, head=""):
    lines = textwrap.dedent(head).strip("\n").splitlines()
    for chain, names in (seqres or {}).items():
        lines.append(f"SEQRES   1 {chain} {len(names):>4}  {' '.join(names)}")
    lines += [pdb_atom(serial, atom) for serial, atom in enumerate(atoms, start=1)]
    return "\n".join([*lines, "END", ""])


def as_bcif(text):
    """The same categories as BinaryCIF, numbers as numbers and masks as masks, through biotite."""
    categories = {}
    for name, category in next(iter(CIFFile.read(io.StringIO(text)).values())).items():
        columns = {}
        for key, column in category.items():
            mask = None if column.mask is None else column.mask.array
            is_float = key.startswith("Cartn") or key == "occupancy"
            dtype = np.float32 if is_float else np.int32 if key in ("label_seq_id", "num", "id") else str
            try:
                columns[key] = BinaryCIFColumn(column.as_array(dtype), mask)
            except ValueError:
                columns[key] = BinaryCIFColumn(column.as_array(str), mask)
        categories[name] = BinaryCIFCategory(columns)
    file = BinaryCIFFile({"9XYZ": BinaryCIFBlock(categories)})
    buffer = io.BytesIO()
    file.write(buffer)
    return buffer.getvalue()


def rows(*places):
    """Backbone with those places (from 1) resolved at their own positions, 0 standing for an unresolved residue."""
    expected = np.full((len(places), 3, 3), np.nan, dtype=np.float32)
    for row, place in enumerate(places):
        if place:
            expected[row] = [[place, 0, 0], [place, 1, 0], [place, 2, 0]]
    return expected


def numbered(*names):
    return list(enumerate(names, start=1))


def everything():
    """Gap, altlocs, insertion code, MSE, two chains: every feature that all formats can express."""
    atoms = residue("MSE", 1, 59, hetero=True) + residue("TYR", 2, 60) + residue("PRO", 3, 60, code="A")
    atoms += residue("ALA", 5, 62, altloc="1", occupancy=0.4, shift=0.25)
    atoms += residue("ALA", 5, 62, altloc="2", occupancy=0.6)
    second = dict(chain="B", label="B", entity="2")
    atoms += residue("GLY", 1, 1, **second) + residue("ALA", 2, 2, **second)
    sequences = {"1": ("MSE", "TYR", "PRO", "GLY", "ALA"), "2": ("GLY", "ALA")}
    text = mmcif(atoms, {entity: numbered(*names) for entity, names in sequences.items()})
    return text, pdb(atoms, {"A": sequences["1"], "B": sequences["2"]})
