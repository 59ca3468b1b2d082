"""What kinds of polymers an entry is made of, in the words of RCSB's `rcsb_entry_info`.

Source: py-rcsb_utils_dictionary (RCSB's own loading code), `getPolymerComposition`; its irregular corners (a protein
with a polymer of no kind is `other`, any other odd pair `other type pair`) are kept, since the published answers are
its output.
"""

from collections import Counter
from collections.abc import Iterable

# entity_poly.type, in lower case, and pdbx_entity_branch.type.
_KINDS = {
    "polypeptide(d)": "protein",
    "polypeptide(l)": "protein",
    "polydeoxyribonucleotide": "DNA",
    "polyribonucleotide": "RNA",
    "polydeoxyribonucleotide/polyribonucleotide hybrid": "NA-hybrid",
    "oligosaccharide": "oligosaccharide",
}
_NUCLEIC = frozenset({"DNA", "RNA", "NA-hybrid"})


def count_kinds(types: Iterable[str]) -> Counter:
    """Entities of each kind: protein, DNA, RNA, NA-hybrid, oligosaccharide, other."""
    return Counter(_KINDS.get(name.lower(), "other") for name in types)


def composition(kinds: Counter) -> str:
    """rcsb_entry_info.polymer_composition of at least one entity."""
    present = frozenset(kinds)
    rest = present - _NUCLEIC
    if present == {"protein"}:
        return "homomeric protein" if kinds["protein"] == 1 else "heteromeric protein"
    if len(present) == 1:
        return next(iter(present))
    if rest == {"protein"}:
        return "protein/NA"
    if present == {"protein", "oligosaccharide"}:
        return "protein/oligosaccharide"
    if rest == {"protein", "oligosaccharide"}:
        return "protein/NA/oligosaccharide"
    if present >= {"DNA", "RNA"} and not rest:
        return "DNA/RNA"
    if rest == {"oligosaccharide"} and present != {"oligosaccharide", "NA-hybrid"}:
        return "NA/oligosaccharide"
    if len(present) == 2:
        return "other" if "protein" in present else "other type pair"
    return "other type composition"


def polymer_type(composition: str) -> str:
    """rcsb_entry_info.selected_polymer_entity_types."""
    return {
        "homomeric protein": "Protein (only)",
        "heteromeric protein": "Protein (only)",
        "DNA": "Nucleic acid (only)",
        "RNA": "Nucleic acid (only)",
        "NA-hybrid": "Nucleic acid (only)",
        "DNA/RNA": "Nucleic acid (only)",
        "protein/NA": "Protein/NA",
        "protein/oligosaccharide": "Protein/Oligosaccharide",
        "oligosaccharide": "Oligosaccharide (only)",
    }.get(composition, "Other")


def nucleic_acid_type(composition: str) -> str:
    """rcsb_entry_info.na_polymer_entity_types: `Other` also for every entry that has a protein."""
    return f"{composition} (only)" if composition in ("DNA", "RNA", "NA-hybrid", "DNA/RNA") else "Other"
