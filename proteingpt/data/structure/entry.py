"""One parsed structure file: its facts, and its chains as proteins."""

from dataclasses import dataclass, field
from pathlib import Path

from proteingpt.data.structure.atoms import Polymer, StructureError, unique
from proteingpt.data.structure.residues import backbone_of, confidence_of, letter_of, one_conformer
from proteingpt.protein import Facts, Protein

LABEL_PREFIX = "label:"


@dataclass(frozen=True)
class Entry:
    """One parsed structure file.

    id: as `short_id` gives it, from the file, or by the file's name where it does not say.
    chains: author ids of the polypeptide chains, in file order. A blank chain id of PDB format is `_`.
    released: ISO day of the first release, where the file says it.
    """

    id: str
    facts: Facts
    chains: tuple[str, ...]
    path: Path
    polymers: tuple[Polymer, ...] = field(repr=False)
    parents: dict[str, frozenset[str]] = field(repr=False)
    plddt_scale: float | None = None
    released: str | None = None

    def protein(self, chain: str = "A") -> Protein:
        """The chain of that author id, or of that mmCIF `label_asym_id` if asked for as `label:B`.

        sequence: the deposited one; a modified residue by its parent, X where it has none or several.
        backbone: float32 (L, 3, 3), angstrom; NaN atom by atom, where that atom was not resolved.
        confidence: float32 (L,), pLDDT / 100 (0 at a residue without coordinates) of a predicted structure, else None.
        Raises StructureError if there is no such chain, it is not a polypeptide, or no residue has all of N, CA, C.
        """
        try:
            polymer = choose_polymer(self.polymers, chain)
            return self._build(polymer)
        except StructureError as error:
            raise StructureError(f"{self.path}: {error}") from None

    def _build(self, polymer: Polymer) -> Protein:
        atoms = one_conformer(polymer.atoms, polymer.components)
        protein = Protein(
            id=self.id,
            chain=polymer.chain,
            sequence="".join(letter_of(name, self.parents) for name in polymer.components),
            backbone=backbone_of(atoms, len(polymer.components)),
            confidence=confidence_of(atoms, len(polymer.components), self.plddt_scale),
        )
        if not protein.resolved.any():
            raise StructureError(
                f"no complete backbone in chain {polymer.chain!r}: none of its {len(protein)} residues has all of "
                f"N, CA and C; wanted at least one"
            )
        return protein


def choose_polymer(polymers: tuple[Polymer, ...], chain: str) -> Polymer:
    by_label = chain.startswith(LABEL_PREFIX)
    wanted = chain.removeprefix(LABEL_PREFIX)
    if by_label and all(p.label is None for p in polymers):
        raise StructureError(f"chain {chain!r} was asked for, but this file has no label ids; ask by author chain id")
    found = [p for p in polymers if (p.label if by_label else p.chain) == wanted]
    peptides = [p for p in found if p.is_peptide]
    if peptides:
        return peptides[0]
    there = ", ".join(unique(p.label if by_label else p.chain for p in polymers if p.is_peptide)) or "none"
    if found:
        raise StructureError(f"chain {chain!r} is not a polypeptide; the polypeptide chains are: {there}")
    raise StructureError(f"no polymer chain {chain!r}; the polypeptide chains are: {there}")
