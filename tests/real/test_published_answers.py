"""Our answers from structure files against the published ProteinChat answers, for entries that are in both.

Only files of PDB format are in both as ../shared/data is; mmCIF or BinaryCIF files put there are compared as well.
docs/published_answers.md holds the table of agreement; run with -s to print it.
"""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

from proteingpt.data.published import read_embedding
from proteingpt.data.questions import PUBLISHED, published_questions
from proteingpt.data.structure import find_structures, read_entry
from proteingpt.data.structure.composition import nucleic_acid_type, polymer_type

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
if not (DATA / "proteinchat" / "qa.json").is_file() or not (DATA / "pdb").is_dir():
    pytest.skip(f"no real data: {DATA} is absent", allow_module_level=True)

TERMS = "What are the terms characterizing the protein?"

# (entry, question): (published, ours, why). Every one there is.
DISAGREEMENTS = {
    ("4day", TERMS): (
        "protein binding/Hydrolase",
        "PROTEIN BINDING/HYDROLASE",
        "PDB format has its HEADER in capitals; mmCIF, from which the published answer comes, keeps the case",
    ),
}

# What PDB format does not say, by question; the other twenty-odd are answered from it too.
NOT_IN_PDB_FORMAT = {
    "How many assemblies does this protein have?",
    "How many entities does this protein have?",
    "Does this protein contain non-polymer entities?",
    "Does this protein contain branched entities?",
    "What is the polymer entity composition for this protein?",
    "What is the nucleic acid polymer entity type for this protein?",
    "What is the molecular mass (KDa) of polymer and non-polymer entities (exclusive of solvent) for this protein?",
    "What is the polymer entity type for this protein?",
    "What are the software programs reported in connection with the production of this protein?",
}
# It lists bonds together (LINK), so these are answered only where there is none.
ONLY_WITHOUT_LINKS = {
    "How many intermolecular covalent bonds does this protein have?",
    "How many intermolecular metalic bonds does this protein have?",
    "What are the bound nonpolymer components for this protein",
}


@lru_cache(maxsize=None)
def published() -> dict[str, dict[str, str]]:
    data = json.loads((DATA / "proteinchat" / "qa.json").read_text())
    return {entry_id: {turn["Q"]: str(turn["A"]) for turn in turns} for entry_id, turns in data.items()}


@lru_cache(maxsize=None)
def ours() -> dict[Path, dict[str, str]]:
    """Of every file whose entry has published answers."""
    paths = [path for path in find_structures(DATA / "pdb") if path.name.split(".")[0] in published()]
    turns = {path: published_questions(read_entry(path).facts) for path in paths}
    return {path: {turn.question: turn.answer for turn in turns[path]} for path in paths}


def compared() -> list[tuple[Path, str, str, str]]:
    """(file, question, published, ours) where both have an answer."""
    return [
        (path, question, published()[path.name.split(".")[0]][question], answer)
        for path, answers in ours().items()
        for question, answer in answers.items()
        if question in published()[path.name.split(".")[0]]
    ]


def normalised(answer: str) -> str:
    return " ".join(answer.upper().split())


def test_every_disagreement_is_known_and_explained():
    found = {(path.name.split(".")[0], question): (a, b) for path, question, a, b in compared() if a != b}
    assert found == {key: (a, b) for key, (a, b, _) in DISAGREEMENTS.items()}
    assert not [row for row in compared() if normalised(row[2]) != normalised(row[3])]


def agreement() -> list[tuple[str, int, int, int]]:
    """(question, published answers of entries whose files we have, those we answer, those equal to the letter)."""
    there, answered, equal = Counter(), Counter(), Counter()
    for path in ours():
        there.update(published()[path.name.split(".")[0]].keys())
    for _, question, a, b in compared():
        answered[question] += 1
        equal[question] += a == b
    rows = [(closed.question, *(count[closed.question] for count in (there, answered, equal))) for closed in PUBLISHED]
    return rows + [("in all", there.total(), answered.total(), equal.total())]


def test_agreement_per_question_is_as_the_documentation_has_it():
    """Only where the data are those it was written about: more files may give more rows, none may disagree."""
    *questions, (_, _, num_answered, num_equal) = agreement()
    for question, num_there, answered, equal in [*questions, agreement()[-1]]:
        print(f"{num_there:3} published {answered:3} answered {equal:3} equal  {question}")
    assert len(ours()) >= 4 and num_answered >= 70 and num_equal == num_answered - len(DISAGREEMENTS)
    assert all(equal == answered for question, _, answered, equal in questions if question != TERMS)
    if len(ours()) == 4:
        lines = (REPOSITORY / "docs" / "published_answers.md").read_text().splitlines()
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        assert table[1:] == [[str(cell) for cell in row] for row in agreement()]


def test_published_embeddings_have_the_observed_residues_of_the_same_files():
    """Of entries with a file and an embedding: chain A without its unresolved residues, and two rows more."""
    sizes = {}
    for path in find_structures(DATA / "pdb"):
        embedding = DATA / "proteinchat" / "pt" / f"{path.name.split('.')[0]}.pt"
        if embedding.is_file():
            protein = read_entry(path).protein("A")
            sizes[path.name] = (int(protein.resolved.sum()), len(read_embedding(embedding)) - 2)
    assert len(sizes) >= 2 and all(ours == theirs for ours, theirs in sizes.values()), sizes


def test_nothing_is_answered_that_was_not_asked_and_nothing_left_out_but_what_the_format_lacks():
    for path, answers in ours().items():
        asked = published()[path.name.split(".")[0]]
        assert answers.keys() <= asked.keys(), path.name
        missing = asked.keys() - answers.keys()
        if ".pdb" in path.suffixes:
            has_bonds = any(asked[question] != "0" for question in ONLY_WITHOUT_LINKS & asked.keys())
            assert missing == NOT_IN_PDB_FORMAT | (ONLY_WITHOUT_LINKS & asked.keys() if has_bonds else set()), path.name
        else:
            assert not missing, path.name


# ------------------------------------------------------------------ rules that the published answers keep by themselves


def answers_starting(entry: dict[str, str], start: str) -> str | None:
    found = [answer for question, answer in entry.items() if question.startswith(start)]
    assert len(found) <= 1, start
    return found[0] if found else None


def test_published_answers_keep_the_rules_ours_are_made_by():
    assert len(published()) > 500
    for entry_id, entry in published().items():
        check_rules(entry_id, entry)


def check_rules(entry_id: str, entry: dict[str, str]) -> None:
    def a(start: str) -> str | None:
        return answers_starting(entry, start)

    dna, rna = a("Does this protein contain DNA") == "YES", a("Does this protein contain RNA") == "YES"
    covalent, metal = int(a("How many intermolecular cov")), int(a("How many intermolecular met"))
    composition = a("What is the polymer entity composition")
    # One kind of polymer is what every polymer question speaks of.
    assert a("Does this protein contain polymer") == "YES", entry_id
    assert a("What is the polymer entity type") == polymer_type(composition), entry_id
    assert a("What is the nucleic acid") == nucleic_acid_type(composition), entry_id
    assert (composition == "protein/NA") == (dna or rna) == (int(a("How many nucleic")) > 0), entry_id
    assert int(a("How many nucleic")) >= dna + rna, entry_id
    assert ("oligosaccharide" in composition) == (a("Does this protein contain branched") == "YES"), entry_id
    # Water is an entity where an atom of it is.
    assert (a("Does this protein contain solvent") == "YES") == (int(a("How many heavy solvent")) > 0), entry_id
    # What is bound is a non-polymer, held by a bond that is counted; a metal bond always holds one.
    bound = a("What are the bound")
    if bound is not None:
        assert a("Does this protein contain non-polymer") == "YES" and covalent + metal > 0, entry_id
        assert bound.split(", ") == sorted(set(bound.split(", "))), entry_id
    if metal:
        assert bound is not None, entry_id
    # Radiation has a wavelength of at most four decimals; NMR and electron microscopy have none.
    wavelength, method = a("What is the radiation"), a("What experimental")
    if wavelength is not None:
        assert wavelength == str(round(float(wavelength), 4)) and method in ("X-ray", "Neutron"), entry_id
    assert a("What is the molecular mass") == str(round(float(a("What is the molecular mass")), 2)), entry_id
