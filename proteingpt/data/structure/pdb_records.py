"""The records of a PDB-format file before its coordinates, and the deposited sequence in them."""

import re

from proteingpt.data.structure.atoms import StructureError, unique
from proteingpt.data.structure.placement import Place

# The name given to the chain that PDB format leaves blank: a chain must have a name to be asked for.
BLANK_CHAIN = "_"


def records_of(lines: list[str]) -> dict[str, list[str]]:
    """{record name: its lines}, coordinates and bonds left out."""
    records: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith(("ATOM  ", "HETATM", "ANISOU", "CONECT")):
            records.setdefault(line[:6].rstrip(), []).append(line)
    return records


def remarks_of(records: dict[str, list[str]]) -> dict[str, list[str]]:
    """{number: texts}."""
    remarks: dict[str, list[str]] = {}
    for line in records.get("REMARK", []):
        remarks.setdefault(line[6:10].strip(), []).append(line[10:].rstrip())
    return remarks


def complies(remarks: dict[str, list[str]]) -> bool:
    """Whether the file says that it is one of the archive: then what it does not list is not there."""
    return any("COMPLIES WITH FORMAT" in text for text in remarks.get("4", []))


def joined(records: dict[str, list[str]], record: str) -> str:
    """A record's text over its continuation lines. A line that ends in a hyphen goes on without a blank."""
    text = ""
    for line in records.get(record, []):
        piece = " ".join(line[10:80].split())
        text += piece if not text or text.endswith("-") else " " + piece
    return text.strip()


def tagged(text: str, tag: str) -> tuple[str, ...]:
    """Values of `TAG: value;` in COMPND and SOURCE."""
    return unique(value.strip() for value in re.findall(rf"(?:^|;)\s*{tag}:\s*([^;]*)", text) if value.strip())


def seqres_of(records: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """{chain: components}, its announced length checked."""
    names: dict[str, list[str]] = {}
    announced: dict[str, str] = {}
    for line in records.get("SEQRES", []):
        chain = line[11:12].strip() or BLANK_CHAIN
        names.setdefault(chain, []).extend(line[19:70].split())
        announced[chain] = line[13:17].strip()
    for chain, found in names.items():
        if announced[chain] != str(len(found)):
            raise StructureError(
                f"SEQRES of chain {chain!r} announces {announced[chain] or 'no number of'} residues "
                f"and lists {len(found)}; fetch the file again, or correct it"
            )
    return {chain: tuple(found) for chain, found in names.items()}


def missing_residues(remarks: dict[str, list[str]]) -> dict[str, list[Place]]:
    """REMARK 465: {chain: residues that were not located}, in the order of the chain, each once."""
    missing: dict[str, dict[Place, None]] = {}
    pattern = re.compile(r"\s*(?:\d+\s+)?(\S{1,3})\s+(\S)\s+(-?\d+)([A-Za-z]?)\s*$")
    for text in remarks.get("465", []):
        match = pattern.match(text)
        if match:
            component, chain, number, code = match.groups()
            missing.setdefault(chain, {})[Place(component, int(number), code)] = None
    return {chain: list(places) for chain, places in missing.items()}
