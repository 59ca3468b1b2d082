"""RCSB's words for what polymers an entry has, by cases read off its own loading code (`getPolymerComposition`)."""

from collections import Counter

import pytest

from proteingpt.data.structure.composition import composition, count_kinds, nucleic_acid_type, polymer_type

PEPTIDE, DNA, RNA = "polypeptide(L)", "polydeoxyribonucleotide", "polyribonucleotide"
HYBRID, SUGAR, PNA = "polydeoxyribonucleotide/polyribonucleotide hybrid", "oligosaccharide", "peptide nucleic acid"


@pytest.mark.parametrize(("types", "words"), [
    ([PEPTIDE], ("homomeric protein", "Protein (only)", "Other")),
    ([PEPTIDE, "polypeptide(D)"], ("heteromeric protein", "Protein (only)", "Other")),
    ([DNA, DNA], ("DNA", "Nucleic acid (only)", "DNA (only)")),
    ([RNA], ("RNA", "Nucleic acid (only)", "RNA (only)")),
    ([HYBRID], ("NA-hybrid", "Nucleic acid (only)", "NA-hybrid (only)")),
    ([DNA, RNA], ("DNA/RNA", "Nucleic acid (only)", "DNA/RNA (only)")),
    ([DNA, RNA, HYBRID], ("DNA/RNA", "Nucleic acid (only)", "DNA/RNA (only)")),
    ([PEPTIDE, PEPTIDE, DNA], ("protein/NA", "Protein/NA", "Other")),
    ([PEPTIDE, DNA, RNA, HYBRID], ("protein/NA", "Protein/NA", "Other")),
    ([PEPTIDE, SUGAR], ("protein/oligosaccharide", "Protein/Oligosaccharide", "Other")),
    ([PEPTIDE, SUGAR, RNA], ("protein/NA/oligosaccharide", "Other", "Other")),
    ([SUGAR], ("oligosaccharide", "Oligosaccharide (only)", "Other")),
    ([SUGAR, DNA], ("NA/oligosaccharide", "Other", "Other")),
    ([SUGAR, HYBRID], ("other type pair", "Other", "Other")),
    ([DNA, HYBRID], ("other type pair", "Other", "Other")),
    ([PEPTIDE, PNA], ("other", "Other", "Other")),
    ([PNA], ("other", "Other", "Other")),
    ([PEPTIDE, PNA, DNA], ("other type composition", "Other", "Other")),
])  # fmt: skip
def test_composition_and_what_follows_from_it(types, words):
    named = composition(count_kinds(types))
    assert (named, polymer_type(named), nucleic_acid_type(named)) == words


def test_kinds_are_counted_whatever_the_case_of_their_name():
    assert count_kinds(["POLYPEPTIDE(L)", "cyclic-pseudo-peptide", "other"]) == Counter(protein=1, other=2)
