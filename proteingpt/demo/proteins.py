"""The demo world: proteins built from ideal helix, strand and coil geometry, so that every answer is known exactly.

Secondary structure and sequence are drawn independently, so the questions on structure need the structure encoder and
those on residues need the sequence encoder. Answers are close to uniform for each question, which keeps a model that is
blind to the protein under 50 %. Given up: side chains, realistic folds, and any tie between sequence and structure.
"""

from collections import Counter

import numpy as np

from proteingpt.protein import Protein, Sample, Turn

STRUCTURE_NAMES = {"H": "helix", "E": "strand", "C": "coil"}

RESIDUE_NAMES = {
    "A": "alanine", "R": "arginine", "N": "asparagine", "D": "aspartate", "C": "cysteine",
    "Q": "glutamine", "E": "glutamate", "G": "glycine", "H": "histidine", "I": "isoleucine",
    "L": "leucine", "K": "lysine", "M": "methionine", "F": "phenylalanine", "P": "proline",
    "S": "serine", "T": "threonine", "W": "tryptophan", "Y": "tyrosine", "V": "valine",
}  # fmt: skip

# Engh & Huber (1991) Acta Cryst. A47:392-400, the values for residues other than glycine and proline.
BOND_N_CA, BOND_CA_C, BOND_C_N = 1.458, 1.525, 1.329  # angstrom
ANGLE_N_CA_C, ANGLE_CA_C_N, ANGLE_C_N_CA = 111.2, 116.2, 121.7  # degrees
OMEGA = 180.0  # degrees, trans peptide

# (phi, psi) in degrees. Helix (alpha) and strand (antiparallel): IUPAC-IUB (1970) Biochemistry 9:3471-3479, after
# Arnott and co-workers. Coil mixes polyproline II (Adzhubei & Sternberg 1993, J Mol Biol 229:472-493) with residue
# i + 2 of a type II turn (Venkatachalam 1968, Biopolymers 6:1425-1436).
HELIX_ANGLES = (-57.0, -47.0)
STRAND_ANGLES = (-139.0, 135.0)
COIL_ANGLES = ((-75.0, 145.0), (80.0, 0.0))
COIL_WEIGHTS = (0.65, 0.35)

# No length between, so that no answer hangs on a single residue.
SHORT_LENGTHS = (16, 36)
LONG_LENGTHS = (44, 64)
LONG_ABOVE = 40

# Disjoint sets, so that the first residue says nothing of the most frequent one.
FREQUENT_RESIDUES = "AEGKLV"
FIRST_RESIDUES = "DMST"

# With these, each kind begins 1 protein in 3, and half the proteins hold a helix, half a strand:
# 1/3 have it as main structure, and of the other 2/3 a quarter have it beside.
MINOR_PROBABILITY = 1 / 4
LEADING_COIL_PROBABILITY = (1 / 3 - 9 / 48) / (1 - 9 / 48)  # 9/48 are coil throughout, and so begin with it

MIN_CONTACT = 4.0  # angstrom, between CA three or more residues apart
MAX_COIL_DRAWS = 1000
UNRESOLVED_PROBABILITY = 1 / 8

ASK_MAIN = "What is the main secondary structure of this protein?"
ASK_BEGIN = "Which secondary structure does this protein begin with?"
ASK_HELIX = "Does this protein contain a helix?"
ASK_STRAND = "Does this protein contain a strand?"
ASK_LONG = f"Is this protein longer than {LONG_ABOVE} residues?"
ASK_FREQUENT = "Which amino acid is the most frequent in this protein?"
ASK_FIRST = "What is the first residue of this protein?"
ASK_CYSTEINE = "Does this protein contain cysteine?"


def demo_samples(num_proteins: int, seed: int) -> list[Sample]:
    """Proteins `demo00000`, `demo00001`, ... of chain A, each with a description and the same 8 questions.

    Lengths are 16 to 64 residues; the backbone is float32 (L, 3, 3) in angstrom, NaN for up to three residues in one
    protein of eight. Sample i depends on (seed, i) alone, so a smaller set is the beginning of a larger one.
    metadata: `source` and `secondary_structure`, one letter of H, E, C per residue.
    Raises ValueError for fewer than one protein or a negative seed.
    """
    if num_proteins < 1 or seed < 0:
        raise ValueError(
            f"demo_samples: found num_proteins {num_proteins} and seed {seed}, wanted at least 1 protein and a seed "
            "of 0 or more"
        )
    return [_sample(index, np.random.default_rng((seed, index))) for index in range(num_proteins)]


def _sample(index: int, rng: np.random.Generator) -> Sample:
    length = int(rng.integers(*[SHORT_LENGTHS, LONG_LENGTHS][rng.integers(2)], endpoint=True))
    structure = _draw_structure(rng, length)
    sequence = _draw_sequence(rng, length)
    backbone = _draw_backbone(rng, structure)
    if rng.random() < UNRESOLVED_PROBABILITY:
        backbone = _lose_residues(rng, backbone)
    known = answers(sequence, structure)
    return Sample(
        protein=Protein(id=f"demo{index:05d}", chain="A", sequence=sequence, backbone=backbone),
        description=describe(known),
        turns=tuple(Turn(question, answer) for question, answer in known.items()),
        metadata={"source": "demo", "secondary_structure": structure},
    )


def answers(sequence: str, structure: str) -> dict[str, str]:
    """The 8 questions with their answers, read off one letter per residue: amino acid, and H, E or C.

    Where two are equally frequent the alphabetically first letter counts; demo proteins have no such tie.
    """
    return {
        ASK_MAIN: STRUCTURE_NAMES[_commonest(structure)],
        ASK_BEGIN: STRUCTURE_NAMES[structure[0]],
        ASK_HELIX: _yes_no("H" in structure),
        ASK_STRAND: _yes_no("E" in structure),
        ASK_LONG: _yes_no(len(sequence) > LONG_ABOVE),
        ASK_FREQUENT: RESIDUE_NAMES[_commonest(sequence)],
        ASK_FIRST: RESIDUE_NAMES[sequence[0]],
        ASK_CYSTEINE: _yes_no("C" in sequence),
    }


def describe(known: dict[str, str]) -> str:
    """Two sentences that state every answer of `answers`: what stage 1 aligns on."""

    def some(question: str) -> str:
        return "a" if known[question] == "yes" else "no"

    longer = "longer" if known[ASK_LONG] == "yes" else "not longer"
    cysteine = "cysteine" if known[ASK_CYSTEINE] == "yes" else "no cysteine"
    return (
        f"This protein is mainly {known[ASK_MAIN]}, begins with {known[ASK_BEGIN]}, contains {some(ASK_HELIX)} helix "
        f"and {some(ASK_STRAND)} strand, and is {longer} than {LONG_ABOVE} residues. Its first residue is "
        f"{known[ASK_FIRST]}, its most frequent amino acid is {known[ASK_FREQUENT]}, and it contains {cysteine}."
    )


def _yes_no(condition: bool) -> str:
    return "yes" if condition else "no"


def _commonest(letters: str) -> str:
    counts = Counter(letters)
    return min(counts, key=lambda letter: (-counts[letter], letter))


def _draw_structure(rng: np.random.Generator, length: int) -> str:
    """One letter of H, E, C per residue. The main kind has at least twice the residues of any other."""
    main = "HEC"[rng.integers(3)]
    minors = [kind for kind in "HE" if kind != main and rng.random() < MINOR_PROBABILITY]
    num_main_elements = 0 if main == "C" else 1 + (length > LONG_ABOVE)
    elements = [str(kind) for kind in rng.permutation(minors + [main] * num_main_elements)]
    if not elements:
        return "C" * length
    leading = ["C"] if rng.random() < LEADING_COIL_PROBABILITY else []
    trailing = ["C"] if main == "C" else []
    return _lay_out(leading + list("C".join(elements)) + trailing, main, length)


def _lay_out(pieces: list[str], main: str, length: int) -> str:
    """Gives each piece its residues: a linker 2, a minor element a fifth of the protein, the main kind the rest."""
    sizes = {"C": 2, "H": max(4, length // 5), "E": max(4, length // 5)}
    num_main = pieces.count(main)
    rest = length - sum(sizes[kind] for kind in pieces if kind != main)
    shares = iter([rest // num_main + (i < rest % num_main) for i in range(num_main)])
    return "".join(kind * (next(shares) if kind == main else sizes[kind]) for kind in pieces)


def _draw_sequence(rng: np.random.Generator, length: int) -> str:
    """Two fifths one residue of FREQUENT_RESIDUES, in half the proteins an eighth cysteine, the rest spread evenly."""
    frequent = FREQUENT_RESIDUES[rng.integers(len(FREQUENT_RESIDUES))]
    first = FIRST_RESIDUES[rng.integers(len(FIRST_RESIDUES))]
    chosen = [frequent] * round(0.4 * length) + ["C"] * (int(rng.integers(2)) * (length // 8))
    others = [letter for letter in RESIDUE_NAMES if letter not in (frequent, "C")]
    # Dealt in turn rather than drawn, so that no other residue can become frequent by chance.
    chosen += np.resize(rng.permutation(others), length - 1 - len(chosen)).tolist()
    return first + "".join(rng.permutation(chosen))


def _draw_backbone(rng: np.random.Generator, structure: str) -> np.ndarray:
    """float32 (L, 3, 3), angstrom. Coil angles are drawn again until the chain keeps clear of itself."""
    for _ in range(MAX_COIL_DRAWS):
        coil = rng.choice(len(COIL_ANGLES), size=len(structure), p=COIL_WEIGHTS)
        angles = {"H": HELIX_ANGLES, "E": STRAND_ANGLES}
        phi_psi = [angles.get(kind) or COIL_ANGLES[choice] for kind, choice in zip(structure, coil)]
        backbone = build_backbone(np.array(phi_psi))
        if _smallest_contact(backbone[:, 1]) >= MIN_CONTACT:
            return backbone
    raise AssertionError(f"no chain without a clash in {MAX_COIL_DRAWS} draws for {structure}")


def build_backbone(phi_psi: np.ndarray) -> np.ndarray:
    """Atom by atom from ideal bonds and angles: (L, 2) degrees -> float32 (L, 3, 3) angstrom, atoms N CA C.

    The first N lies at the origin. phi of the first residue and psi of the last one place no atom.
    Torsions follow IUPAC-IUB (1970): seen along the middle bond, clockwise is positive, cis is 0.
    """
    torsions, bend_angles, bonds = _internal_coordinates(phi_psi)
    turns = _turns(np.radians(torsions), np.radians(bend_angles))
    positions = np.empty((len(bonds), 3))
    frame, position = np.eye(3), np.zeros(3)
    for atom, (turn, bond) in enumerate(zip(turns, bonds)):
        frame = frame @ turn
        position = position + bond * frame[:, 0]
        positions[atom] = position
    return (positions - positions[0]).reshape(-1, 3, 3).astype(np.float32)


def _internal_coordinates(phi_psi: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Torsion and bend (degrees) before each bond, and its length (angstrom): three arrays (3 L,), by atom led to."""
    num_residues = len(phi_psi)
    phi, psi = phi_psi[:, 0], phi_psi[:, 1]
    # N is turned by psi of the residue before, CA by omega, C by phi of its own residue.
    psi_before = np.concatenate([[0.0], psi[:-1]])
    torsions = np.stack([psi_before, np.full(num_residues, OMEGA), phi], axis=1).ravel()
    bend_angles = np.tile([ANGLE_CA_C_N, ANGLE_C_N_CA, ANGLE_N_CA_C], num_residues)
    bonds = np.tile([BOND_C_N, BOND_N_CA, BOND_CA_C], num_residues)
    return torsions, bend_angles, bonds


def _turns(torsions: np.ndarray, bend_angles: np.ndarray) -> np.ndarray:
    """(A, 3, 3): from the frame of a bond, with x along it, to that of the next. Radians.

    The product of a rotation about x by the torsion and one about z by the supplement of the bend.
    """
    ct, st = np.cos(torsions), np.sin(torsions)
    cb, sb = -np.cos(bend_angles), np.sin(bend_angles)
    rows = [[cb, -sb, np.zeros_like(cb)], [ct * sb, ct * cb, -st], [st * sb, st * cb, ct]]
    return np.moveaxis(np.array(rows), -1, 0)


def _smallest_contact(alpha_carbons: np.ndarray) -> float:
    distances = np.linalg.norm(alpha_carbons[:, None] - alpha_carbons[None, :], axis=-1)
    return float(distances[np.triu_indices(len(alpha_carbons), k=3)].min())


def _lose_residues(rng: np.random.Generator, backbone: np.ndarray) -> np.ndarray:
    """Sets one to three neighbouring residues to NaN: fewer than any helix or strand has, never the first four."""
    num_lost = int(rng.integers(1, 4))
    start = int(rng.integers(4, len(backbone) - num_lost + 1))
    lost = backbone.copy()
    lost[start : start + num_lost] = np.nan
    return lost
