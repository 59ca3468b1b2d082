"""What is asked about a protein, and what is said of it, from the facts of its entry.

Closed questions have one exact answer, so that they can be marked by comparing strings. `PUBLISHED` are the 30 of
ProteinChat and ProteinGPT, wording and answer format as in their data, slips included; `_own_answers` adds a few that
they lack. A fact that is not known is not asked about, and neither is a list that is empty (no radiation, no bound
components): so the published sets have 28 to 30 questions a protein.
"""

from collections.abc import Callable
from dataclasses import dataclass

from proteingpt.data.structure.fact_texts import COMPUTED_METHODS
from proteingpt.protein import Facts, Protein, Turn

# rcsb_entry_info.experimental_method, by the deposited method. Source: py-rcsb_utils_dictionary,
# `filterExperimentalMethod`.
METHOD_FAMILIES = {
    "X-RAY DIFFRACTION": "X-ray",
    "FIBER DIFFRACTION": "X-ray",
    "POWDER DIFFRACTION": "X-ray",
    "SOLUTION NMR": "NMR",
    "SOLID-STATE NMR": "NMR",
    "NMR": "NMR",
    "ELECTRON MICROSCOPY": "EM",
    "ELECTRON CRYSTALLOGRAPHY": "EM",
    "ELECTRON DIFFRACTION": "EM",
    "CRYO-ELECTRON MICROSCOPY": "EM",
    "ELECTRON TOMOGRAPHY": "EM",
    "NEUTRON DIFFRACTION": "Neutron",
}

# Deposited methods are in capitals; in a sentence only these words keep any.
METHOD_SPELLINGS = {"x-ray": "X-ray", "nmr": "NMR", "epr": "EPR"}


@dataclass(frozen=True)
class ClosedQuestion:
    """rule: the answer from the facts, None where the question is not asked."""

    question: str
    rule: Callable[[Facts], str | None]

    def turn(self, facts: Facts) -> Turn | None:
        answer = self.rule(facts)
        return None if answer is None else Turn(self.question, answer)


def _count(name: str) -> Callable[[Facts], str | None]:
    """The number itself."""

    def rule(facts: Facts) -> str | None:
        number = getattr(facts, name)
        return None if number is None else str(number)

    return rule


def _any(name: str) -> Callable[[Facts], str | None]:
    """YES where that count is above zero."""

    def rule(facts: Facts) -> str | None:
        number = getattr(facts, name)
        return None if number is None else "YES" if number > 0 else "NO"

    return rule


def _text(name: str) -> Callable[[Facts], str | None]:
    """The text as it is, on one line."""

    def rule(facts: Facts) -> str | None:
        return " ".join((getattr(facts, name) or "").split()) or None

    return rule


def _list(name: str) -> Callable[[Facts], str | None]:
    """In alphabetical order."""

    def rule(facts: Facts) -> str | None:
        return ", ".join(sorted(getattr(facts, name) or ())) or None

    return rule


def format_number(number: float | None, num_decimals: int) -> str | None:
    """Rounded, without trailing zeros but for one: 1.8, 2.0, 1.098."""
    return None if number is None else str(round(float(number), num_decimals))


def experimental_method(methods: tuple[str, ...] | None) -> str | None:
    """The published name of the deposited method: X-ray, NMR, EM, Neutron, Other; `Multiple methods` for any two.

    None where no experiment is named.
    """
    measured = [method.upper() for method in methods or () if method.upper() not in COMPUTED_METHODS]
    if len(measured) > 1:
        return "Multiple methods"
    return METHOD_FAMILIES.get(measured[0], "Other") if measured else None


def _has_polymers(facts: Facts) -> str | None:
    return _any("num_polymer_entities")(facts) or _any("num_chains")(facts)


def _has_solvent(facts: Facts) -> str | None:
    """A water entity is there exactly where an atom of water is."""
    return _any("num_solvent_entities")(facts) or _any("num_solvent_atoms")(facts)


PUBLISHED = tuple(
    ClosedQuestion(question, rule)
    for question, rule in (
        ("How many assemblies does this protein have?", _count("num_assemblies")),
        ("How many entities does this protein have?", _count("num_entities")),
        ("How many heavy atom coordinates records does this protein have?", _count("num_heavy_atoms")),
        ("How many hydrogen atom coordinates records does this protein have?", _count("num_hydrogen_atoms")),
        ("How many model structures deposited for this protein?", _count("num_models")),
        ("How many polymer monomers does this protein have?", _count("num_polymer_monomers")),
        ("How many heavy solvent atom coordinates records does this protein have?", _count("num_solvent_atoms")),
        (
            "How many nucleic acid polymer entities (DNA or RNA) does this protein have?",
            _count("num_nucleic_acid_entities"),
        ),
        (
            "What is the radiation wavelength in angstroms for this protein?",
            lambda facts: format_number(facts.wavelength, 4),
        ),
        ("How many intermolecular covalent bonds does this protein have?", _count("num_covalent_bonds")),
        ("How many intermolecular metalic bonds does this protein have?", _count("num_metal_bonds")),
        ("Does this protein contain non-polymer entities?", _any("num_nonpolymer_entities")),
        ("Does this protein contain polymer entities?", _has_polymers),
        ("Does this protein contain DNA polymer entities?", _any("num_dna_entities")),
        ("Does this protein contain RNA polymer entities?", _any("num_rna_entities")),
        ("Does this protein contain solvent entities?", _has_solvent),
        ("Does this protein contain branched entities?", _any("num_branched_entities")),
        ("Does this protein have unmodeled polymer monomers?", _any("num_unmodeled_monomers")),
        ("Does this protein have hybrid nucleic acid polymer entities?", _any("num_hybrid_entities")),
        ("Does this protein have cis-peptide linkages?", _any("num_cis_peptides")),
        ("What is the polymer entity composition for this protein?", _text("polymer_composition")),
        ("What is the nucleic acid polymer entity type for this protein?", _text("nucleic_acid_type")),
        ("What are the bound nonpolymer components for this protein", _list("nonpolymer_components")),
        (
            "What experimental method(s) were used to determine the structure of this protein?",
            lambda facts: experimental_method(facts.methods),
        ),
        (
            "What is the molecular mass (KDa) of polymer and non-polymer entities (exclusive of solvent) "
            "for this protein?",
            lambda facts: format_number(facts.molecular_weight, 2),
        ),
        ("What is the polymer entity type for this protein?", _text("polymer_type")),
        (
            "What are the software programs reported in connection with the production of this protein?",
            _list("software"),
        ),
        ("Is this protein determined by experimental or computational methods?", _text("methodology")),
        ("What are the terms characterizing the protein?", _text("classification")),
        ("When is this protein first published?", _count("publication_year")),
    )
)


def published_questions(facts: Facts) -> tuple[Turn, ...]:
    """Those of the 30 published questions that the facts answer, in the published order."""
    turns = (closed.turn(facts) for closed in PUBLISHED)
    return tuple(turn for turn in turns if turn is not None)


def closed_questions(protein: Protein, facts: Facts) -> tuple[Turn, ...]:
    """The closed questions that this chain and the facts of its entry answer, always in the same order.

    The published ones, then our own; of these the first two are about the chain and always there. Counts are plain
    integers, the resolution is a decimal number in angstrom (`1.8`, `2.0`), lists are joined by ", ".
    """
    own = tuple(Turn(question, answer) for question, answer in _own_answers(protein, facts) if answer is not None)
    return published_questions(facts) + own


def _own_answers(protein: Protein, facts: Facts) -> list[tuple[str, str | None]]:
    return [
        ("How many residues does this protein chain have?", str(len(protein))),
        ("How many residues of this protein chain are unresolved?", str(int((~protein.resolved).sum()))),
        ("How many polymer chains does the structure of this protein have?", _count("num_chains")(facts)),
        ("What is the resolution in angstroms for this protein?", format_number(facts.resolution, 3)),
        ("What source organism(s) were reported for this protein?", ", ".join(facts.organisms or ()) or None),
        ("In which year was the structure of this protein deposited?", _count("year")(facts)),
    ]


def describe(protein: Protein, facts: Facts) -> str:
    """The deposited title, class and keywords, the method and the organisms, in English sentences.

    One paragraph without line breaks, the same for the same input. What is not known is left out; the last sentence,
    the length of the chain, is always there, so the description is never empty.
    """
    sentences = [
        _title_sentence(facts.title),
        _list_sentence("classification", (facts.classification or "",)),
        _list_sentence("keyword", facts.keywords or ()),
        _method_sentence(facts.methods or (), facts.resolution),
        _list_sentence("source organism", facts.organisms or ()),
        _length_sentence(protein),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _tidy(text: str) -> str:
    """One line, single spaces, no closing full stop, and no double quote, since the title is quoted."""
    return " ".join(text.split()).replace('"', "'").rstrip(" .")


def _title_sentence(title: str | None) -> str:
    title = _tidy(title or "")
    return f'The title of this structure is "{title}".' if title else ""


def _list_sentence(noun: str, values: tuple[str, ...]) -> str:
    # Each once, whatever its case.
    first_of: dict[str, str] = {}
    for value in filter(None, map(_tidy, values)):
        first_of.setdefault(value.casefold(), value)
    values = list(first_of.values())
    if not values:
        return ""
    if len(values) == 1:
        return f"The {noun} is {values[0]}."
    return f"The {noun}s are {_enumerate(values)}."


def _method_sentence(methods: tuple[str, ...], resolution: float | None) -> str:
    measured = [_spell_method(method) for method in methods if method.upper() not in COMPUTED_METHODS]
    if measured:
        at_resolution = f" at a resolution of {format_number(resolution, 3)} angstroms" if resolution else ""
        return f"The structure was determined by {_enumerate(measured)}{at_resolution}."
    return "The structure was predicted by computation." if methods else ""


def _length_sentence(protein: Protein) -> str:
    num_unresolved = int((~protein.resolved).sum())
    residues = "1 residue" if len(protein) == 1 else f"{len(protein)} residues"
    if num_unresolved == 0:
        return f"The protein chain has {residues}."
    verb = "is" if num_unresolved == 1 else "are"
    return f"The protein chain has {residues}, of which {num_unresolved} {verb} unresolved."


def _spell_method(method: str) -> str:
    return " ".join(METHOD_SPELLINGS.get(word, word) for word in method.lower().split())


def _enumerate(values: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
