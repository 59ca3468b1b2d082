"""PDB and mmCIF files of a few residues, good and bad ones, and annotations, for builds.

GOOD: 1abc to 5abc, ACDEFG and then as many K, the first residue unresolved.
"""

import json
from pathlib import Path


NAMES = dict(A="ALA", C="CYS", D="ASP", E="GLU", F="PHE", G="GLY", K="LYS", M="MET", W="TRP", X="UNK")


HEADER = "HEADER    TRANSPORT PROTEIN                       02-JAN-94   {}"


def pdb_text(entry: str, chains: dict[str, str], atoms: str = "N CA C", missing: int = 0) -> str:
    """A PDB file: the chains as letters, each residue with `atoms`, the first `missing` of each chain unresolved."""
    lines = [HEADER.format(entry.upper()), f"TITLE     STRUCTURE OF {entry.upper()}"]
    lines += ["EXPDTA    X-RAY DIFFRACTION", "REMARK   2 RESOLUTION.    1.80 ANGSTROMS."]
    for chain, letters in chains.items():
        residues = "".join(f" {NAMES[letter]}" for letter in letters)
        lines.append(f"SEQRES   1 {chain} {len(letters):4d} {residues}")
    serial = 0
    for chain, letters in chains.items():
        for number, letter in list(enumerate(letters, 1))[missing:]:
            for offset, name in enumerate(atoms.split()):
                serial += 1
                x = 3.8 * number + offset
                lines.append(
                    f"ATOM  {serial:5d}  {name:<3s} {NAMES[letter]} {chain}{number:4d}    "
                    f"{x:8.3f}{1.0:8.3f}{2.0:8.3f}{1.0:6.2f}{10.0:6.2f}           {name[0]}"
                )
        lines.append("TER")
    return "\n".join(lines + ["END", ""])


def cif_text(entry: str, letters: str) -> str:
    """An mmCIF file of one chain, whose label id is X and whose author id is A."""
    sequence = "\n".join(f"1 {number} {NAMES[letter]}" for number, letter in enumerate(letters, 1))
    atoms = "\n".join(
        f"ATOM {3 * number + offset} {name[0]} {name} . {NAMES[letter]} X 1 {number} {number} A "
        f"{3.8 * number + offset:.3f} 1.000 2.000 1.00 10.00 1"
        for number, letter in enumerate(letters, 1)
        for offset, name in enumerate(("N", "CA", "C"))
    )
    return f"""data_{entry.upper()}
_entry.id {entry.upper()}
#
_struct.title 'Structure of {entry}'
#
loop_
_entity_poly.entity_id
_entity_poly.type
1 polypeptide(L)
#
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
{sequence}
#
loop_
_struct_asym.id
_struct_asym.entity_id
X 1
#
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.pdbx_PDB_model_num
{atoms}
#
"""


def write_files(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


GOOD = {f"{n}abc.pdb": pdb_text(f"{n}abc", {"A": "ACDEFG" + "K" * n}, missing=1) for n in range(1, 6)}


BAD = {
    "6bad.cif": cif_text("6bad", "ACDEFG")[:-200],
    "6emp.cif": "",
    "6noa.pdb": pdb_text("6noa", {"B": "ACD"}),
    "6cao.pdb": pdb_text("6cao", {"A": "ACD"}, atoms="CA"),
    "6unk.pdb": pdb_text("6unk", {"A": "XXX"}),
    "6dot.v2.cif": cif_text("6dot.v2", "ACD"),
}


def annotation(entry: str, date: str, entities: dict[str, str]) -> str:
    """A file of RCSB's Data API, as far as it is read."""
    answer = {
        "rcsb_id": entry.upper(),
        "struct": {"title": f"{entry} at RCSB"},
        "rcsb_accession_info": {"initial_release_date": f"{date}T00:00:00Z"},
        "polymer_entities": [
            {"rcsb_polymer_entity_container_identifiers": {"entity_id": number, "auth_asym_ids": [chain]}}
            for chain, number in entities.items()
        ],
    }
    return json.dumps(answer)


def skipped_rows(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in (out / "skipped.tsv").read_text().splitlines()]
