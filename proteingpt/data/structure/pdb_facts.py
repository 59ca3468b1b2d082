"""Facts from PDB format: only what its records truly say.

Counts of entities and assemblies are not among them (they differ from mmCIF's in a tenth of the entries), nor are the
molecular mass and the whole list of programs. A record that is absent means none only in a file of the archive.
"""

import re

import numpy as np

from proteingpt.data.structure.atoms import Polymer, unique
from proteingpt.data.structure.fact_texts import (
    HYDROGENS,
    WATERS,
    first_resolution,
    methodology_of,
    positive_numbers,
    split_keywords,
)
from proteingpt.data.structure.pdb_records import complies, joined, missing_residues, seqres_of, tagged
from proteingpt.data.structure.residues import is_nucleotide
from proteingpt.protein import Facts

_Records = dict[str, list[str]]
MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()


def pdb_facts(
    records: _Records,
    remarks: _Records,
    polymers: tuple[Polymer, ...],
    component: np.ndarray,
    element: np.ndarray,
    is_predicted: bool,
) -> Facts:
    """component, element: str (n,), of every atom of the first model. is_predicted: the B factors are pLDDT."""
    header = records.get("HEADER", [""])[0]
    classification = _classification(header)
    methods = unique(method.strip() for method in joined(records, "EXPDTA").split(";") if method.strip())
    resolution = (re.search(r"RESOLUTION\.\s+([\d.]+)\s+ANGSTROM", text) for text in remarks.get("2", []))
    return Facts(
        title=joined(records, "TITLE") or None,
        keywords=split_keywords(joined(records, "KEYWDS") or None, classification),
        classification=classification,
        methods=methods or None,
        methodology=methodology_of(methods, is_predicted),
        resolution=first_resolution(match.group(1) for match in resolution if match),
        wavelength=_wavelength(remarks),
        organisms=tagged(joined(records, "SOURCE"), "ORGANISM_SCIENTIFIC") or None,
        year=_year(header),
        publication_year=_publication_year(records),
        num_models=max(1, len(records.get("MODEL", []))),
        num_chains=len(polymers),
        **_atom_facts(component, element),
        **(_archive_facts(records, remarks, polymers) if complies(remarks) else {}),
    )


def _classification(header: str) -> str | None:
    """None where it fills its 40 columns, since it is cut there."""
    return None if header[49:50].strip() else header[10:50].strip() or None


def _wavelength(remarks: _Records) -> float | None:
    """The longest of those listed, by X-rays (REMARK 200) or neutrons (230); None for a range (Laue)."""
    text = "\n".join(remarks.get("200", []) + remarks.get("230", []))
    # A list that goes on in the next line ends in its comma.
    lists = re.findall(r"WAVELENGTH OR RANGE\s+\(A\)\s*:((?:.*[,;]\s*\n)*.*)", text)
    parts = [part.strip() for found in lists for part in re.split(r"[,;]", found)]
    return max(positive_numbers(parts), default=None)


def _year(header: str) -> int | None:
    day = _iso_day(header[50:59].strip().upper())
    return int(day[:4]) if day else None


def release_day(records: _Records) -> str | None:
    """ISO day of the first release: the earliest date of a REVDAT record, in columns 14-22."""
    days = (_iso_day(line[13:22].strip().upper()) for line in records.get("REVDAT", []))
    return min((day for day in days if day), default=None)


def _iso_day(date: str) -> str | None:
    """`02-JAN-94` -> `1994-01-02`; None of anything else."""
    found = re.fullmatch(r"(\d\d)-([A-Z]{3})-(\d\d)", date)
    if found is None or found[2] not in MONTHS:
        return None
    # The archive began in 1971: two digits below that are of this century.
    year = int(found[3]) + (1900 if int(found[3]) >= 71 else 2000)
    return f"{year}-{MONTHS.index(found[2]) + 1:02d}-{found[1]}"


def _publication_year(records: _Records) -> int | None:
    """Columns 63-66 of the first JRNL REF line: that of the primary citation."""
    references = [line for line in records.get("JRNL", []) if line[12:16] == "REF "]
    year = references[0][62:66] if references else ""
    return int(year) if re.fullmatch(r"\d{4}", year) else None


def _atom_facts(component: np.ndarray, element: np.ndarray) -> dict[str, int]:
    if not element.all():
        return {}
    hydrogen = np.isin(element, HYDROGENS)
    return {
        "num_heavy_atoms": int(np.count_nonzero(~hydrogen)),
        "num_hydrogen_atoms": int(np.count_nonzero(hydrogen)),
        "num_solvent_atoms": int(np.count_nonzero(np.isin(component, WATERS) & ~hydrogen)),
    }


def _archive_facts(records: _Records, remarks: _Records, polymers: tuple[Polymer, ...]) -> dict[str, int | tuple]:
    """What an archive's file says by what it lists, and by what it does not."""
    facts: dict[str, int | tuple] = {"num_cis_peptides": len(records.get("CISPEP", []))}
    seqres = seqres_of(records)
    if seqres and all(polymer.chain in seqres for polymer in polymers):
        facts["num_polymer_monomers"] = sum(map(len, seqres.values()))
        facts["num_unmodeled_monomers"] = sum(map(len, missing_residues(remarks).values()))
        # LINK does not tell covalent bonds from metal ones, nor SEQRES one entity from another: but none is none.
        if not any(is_nucleotide(name) for names in seqres.values() for name in names):
            kinds = ("dna", "rna", "hybrid", "nucleic_acid")
            facts |= {f"num_{kind}_entities": 0 for kind in kinds}
    if "LINK" not in records:
        facts |= {"num_covalent_bonds": 0, "num_metal_bonds": 0, "nonpolymer_components": ()}
    return facts
