"""What is asked about a protein, and what is said of it, from the structure file alone.

Closed questions have one exact answer, so that they can be marked by comparing strings. Where one of the 30 published
ProteinChat / ProteinGPT wordings asks for a fact we hold, that very wording and answer format is used; the rest follow
their style. A fact the file does not state is not asked about. Given up here: the published questions about atoms,
bonds, assemblies, software and citation, whose answers `Facts` does not carry.
"""

from proteingpt.protein import Facts, Protein, Turn

# Answers of the published question, after RCSB's rcsb_entry_info.experimental_method. The public sample holds X-ray,
# NMR, EM and Neutron only; `Other` and `Multiple methods` follow RCSB's names for the rest.
METHOD_FAMILIES = {
    "X-RAY DIFFRACTION": "X-ray",
    "SOLUTION NMR": "NMR",
    "SOLID-STATE NMR": "NMR",
    "NMR": "NMR",
    "ELECTRON MICROSCOPY": "EM",
    "ELECTRON CRYSTALLOGRAPHY": "EM",
    "NEUTRON DIFFRACTION": "Neutron",
}
THEORETICAL = "THEORETICAL MODEL"

# Deposited methods are in capitals; in a sentence only these words keep any.
METHOD_SPELLINGS = {"x-ray": "X-ray", "nmr": "NMR", "epr": "EPR"}


def closed_questions(protein: Protein, facts: Facts) -> tuple[Turn, ...]:
    """The closed questions that this chain and the facts of its entry answer, always in the same order.

    Counts are plain integers, the resolution is a decimal number in angstrom (`1.8`, `2.0`), lists are joined by ", ".
    The first two are about the chain and always there; the others are about the entry.
    """
    answers = [
        ("How many residues does this protein chain have?", len(protein)),
        ("How many residues of this protein chain are unresolved?", int((~protein.resolved).sum())),
        ("How many polymer chains does the structure of this protein have?", facts.num_chains),
        ("How many polymer entities does this protein have?", facts.num_polymer_entities),
        ("How many model structures deposited for this protein?", facts.num_models),
        (
            "What experimental method(s) were used to determine the structure of this protein?",
            experimental_method(facts.methods),
        ),
        ("Is this protein determined by experimental or computational methods?", methodology(protein, facts.methods)),
        ("What is the resolution in angstroms for this protein?", format_resolution(facts.resolution)),
        ("What source organism(s) were reported for this protein?", ", ".join(facts.organisms) or None),
        ("In which year was the structure of this protein deposited?", facts.year),
    ]
    return tuple(Turn(question, str(answer)) for question, answer in answers if answer is not None)


def experimental_method(methods: tuple[str, ...]) -> str | None:
    """Family of the deposited methods in the published spelling: X-ray, NMR, EM, Neutron, Other, Multiple methods.

    None where no experiment is named. Two methods of one family (solution and solid-state NMR) are still one family.
    """
    families = {METHOD_FAMILIES.get(method.upper(), "Other") for method in methods if method.upper() != THEORETICAL}
    if len(families) > 1:
        return "Multiple methods"
    return families.pop() if families else None


def methodology(protein: Protein, methods: tuple[str, ...]) -> str | None:
    """`experimental` or `computational`; None where the file gives no sign of either.

    A predicted model has a confidence, or says THEORETICAL MODEL where the method stands.
    """
    if protein.confidence is not None or THEORETICAL in (method.upper() for method in methods):
        return "computational"
    return "experimental" if methods else None


def format_resolution(resolution: float | None) -> str | None:
    """Angstrom, to the three decimals the archive keeps, without trailing zeros but for one: 1.8, 2.0, 1.098."""
    return None if resolution is None else str(round(float(resolution), 3))


def describe(protein: Protein, facts: Facts) -> str:
    """The deposited title and keywords, the method and the organisms, in English sentences.

    One paragraph without line breaks, the same for the same input. What is not known is left out; the last sentence,
    the length of the chain, is always there, so the description is never empty.
    """
    sentences = [
        _title_sentence(facts.title),
        _list_sentence("keyword", facts.keywords),
        _method_sentence(facts.methods, facts.resolution),
        _list_sentence("source organism", facts.organisms),
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
    # Each once, whatever its case: files repeat their class, HYDROLASE, among the keywords as Hydrolase.
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
    measured = [_spell_method(method) for method in methods if method.upper() != THEORETICAL]
    if measured:
        at_resolution = f" at a resolution of {format_resolution(resolution)} angstroms" if resolution else ""
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
