"""The demo proteins: geometry measured back with gemmi, answers by hand and by counters of this file."""

import math
from collections import Counter

import gemmi
import numpy as np
import pytest

from proteingpt.demo.proteins import (
    ASK_BEGIN,
    ASK_CYSTEINE,
    ASK_FIRST,
    ASK_FREQUENT,
    ASK_HELIX,
    ASK_LONG,
    ASK_MAIN,
    ASK_STRAND,
    answers,
    build_backbone,
    demo_samples,
)

# (phi, psi) in degrees by kind of residue, from the papers that the module cites.
PHI_PSI = {"H": [(-57, -47)], "E": [(-139, 135)], "C": [(-75, 145), (80, 0)]}


@pytest.fixture(scope="module")
def samples():
    return demo_samples(400, seed=7)


@pytest.fixture(scope="module")
def complete(samples):
    """Those with every residue resolved."""
    return [sample for sample in samples if sample.protein.resolved.all()]


def positions(backbone):
    """One list of gemmi positions, in the order N CA C N CA C ..."""
    return [gemmi.Position(*map(float, atom)) for atom in backbone.reshape(-1, 3)]


def angles(atoms):
    return [math.degrees(gemmi.calculate_angle(*atoms[i : i + 3])) for i in range(len(atoms) - 2)]


def torsions(atoms):
    """Entry i turns about the bond between atoms i + 1 and i + 2: psi, omega, phi of the next residue, psi, ..."""
    return [math.degrees(gemmi.calculate_dihedral(*atoms[i : i + 4])) for i in range(len(atoms) - 3)]


def circular_gap(a, b):
    return abs((a - b + 180) % 360 - 180)


def structure_from(backbone):
    """Reads H, E or C of each residue off the coordinates: each phi, and each psi, belongs to one kind only."""
    measured = torsions(positions(backbone))
    by_phi = {phi: kind for kind, pairs in PHI_PSI.items() for phi, _ in pairs}
    by_psi = {psi: kind for kind, pairs in PHI_PSI.items() for _, psi in pairs}
    first = by_psi[min(by_psi, key=lambda psi: circular_gap(psi, measured[0]))]
    others = [by_phi[min(by_phi, key=lambda phi: circular_gap(phi, value))] for value in measured[2::3]]
    return first + "".join(others)


def test_bonds_and_angles_are_those_of_engh_and_huber(complete):
    for sample in complete[:40]:
        atoms = positions(sample.protein.backbone)
        bonds = [a.dist(b) for a, b in zip(atoms, atoms[1:])]
        np.testing.assert_allclose(bonds[0::3], 1.458, atol=1e-3)  # N-CA
        np.testing.assert_allclose(bonds[1::3], 1.525, atol=1e-3)  # CA-C
        np.testing.assert_allclose(bonds[2::3], 1.329, atol=1e-3)  # C-N
        bends = angles(atoms)
        np.testing.assert_allclose(bends[0::3], 111.2, atol=0.05)  # N-CA-C
        np.testing.assert_allclose(bends[1::3], 116.2, atol=0.05)  # CA-C-N
        np.testing.assert_allclose(bends[2::3], 121.7, atol=0.05)  # C-N-CA


def test_phi_psi_and_omega_are_those_of_each_residues_kind(complete):
    for sample in complete[:40]:
        kinds = sample.metadata["secondary_structure"]
        measured = torsions(positions(sample.protein.backbone))
        psi, omega, phi = measured[0::3], measured[1::3], measured[2::3]
        assert all(circular_gap(value, 180) < 0.05 for value in omega)
        # Inner residues have both angles: phi[i - 1] leads to residue i, psi[i] on from it.
        for i in range(1, len(kinds) - 1):
            gaps = [max(circular_gap(phi[i - 1], a), circular_gap(psi[i], b)) for a, b in PHI_PSI[kinds[i]]]
            assert min(gaps) < 0.05, (sample.protein.id, i, kinds[i], phi[i - 1], psi[i])


def test_neighbouring_alpha_carbons_are_3_8_angstrom_apart_and_no_others_touch(complete):
    for sample in complete[:100]:
        alpha = sample.protein.backbone[:, 1].astype(float)
        distances = np.linalg.norm(alpha[:, None] - alpha, axis=-1)
        np.testing.assert_allclose(np.diag(distances, 1), 3.80, atol=0.03)
        assert distances[np.triu_indices(len(alpha), k=2)].min() > 3.9


def test_a_helix_rises_1_5_angstrom_and_a_strand_more_than_3_3_per_residue():
    """Textbook figures, which no constant of the module states; 0.1 of room, as bond angles differ between sources."""
    helix = build_backbone(np.array([[-57.0, -47.0]] * 19))[:, 1]
    # Five turns of 3.6 residues bring the chain back above where it began, so this distance is pure rise.
    assert np.linalg.norm(helix[18] - helix[0]) / 18 == pytest.approx(1.5, abs=0.1)
    strand = build_backbone(np.array([[-139.0, 135.0]] * 11))[:, 1]
    assert 3.3 < np.linalg.norm(strand[10] - strand[0]) / 10 < 3.6


def test_backbones_are_float32_and_lengths_lie_within_16_and_64(samples):
    assert {sample.protein.backbone.dtype for sample in samples} == {np.dtype("float32")}
    lengths = [len(sample.protein) for sample in samples]
    assert min(lengths) == 16 and max(lengths) == 64
    assert not [length for length in lengths if 36 < length < 44]


def test_answers_of_the_first_protein_checked_by_hand():
    """57 residues: two long strands, then eleven residues of helix; 22 alanines, 7 cysteines."""
    sample = demo_samples(1, seed=0)[0]
    assert sample.protein.sequence == "SAKAAAFPHWAVMCGAASAAYCTCDAPACQEAAADCHAIAAMCAAAACNRENLAAKY"
    assert sample.metadata["secondary_structure"] == "E" * 21 + "CC" + "E" * 21 + "CC" + "H" * 11
    assert {turn.question: turn.answer for turn in sample.turns} == {
        "What is the main secondary structure of this protein?": "strand",
        "Which secondary structure does this protein begin with?": "strand",
        "Does this protein contain a helix?": "yes",
        "Does this protein contain a strand?": "yes",
        "Is this protein longer than 40 residues?": "yes",
        "Which amino acid is the most frequent in this protein?": "alanine",
        "What is the first residue of this protein?": "serine",
        "Does this protein contain cysteine?": "yes",
    }
    assert sample.description == (
        "This protein is mainly strand, begins with strand, contains a helix and a strand, and is longer than 40 "
        "residues. Its first residue is serine, its most frequent amino acid is alanine, and it contains cysteine."
    )


def test_answers_of_a_short_helix_written_by_hand():
    assert answers("MKKVKK", "CHHHHC") == {
        ASK_MAIN: "helix",
        ASK_BEGIN: "coil",
        ASK_HELIX: "yes",
        ASK_STRAND: "no",
        ASK_LONG: "no",
        ASK_FREQUENT: "lysine",
        ASK_FIRST: "methionine",
        ASK_CYSTEINE: "no",
    }


def test_forty_residues_are_not_longer_than_40():
    assert answers("A" * 40, "C" * 40)[ASK_LONG] == "no"
    assert answers("A" * 41, "C" * 41)[ASK_LONG] == "yes"


def test_structure_answers_hold_for_what_the_coordinates_show(complete):
    for sample in complete:
        shown = structure_from(sample.protein.backbone)
        given = {turn.question: turn.answer for turn in sample.turns}
        names = {"H": "helix", "E": "strand", "C": "coil"}
        assert given[ASK_MAIN] == names[Counter(shown).most_common(1)[0][0]]
        assert given[ASK_BEGIN] == names[shown[0]]
        assert given[ASK_HELIX] == ("yes" if "H" in shown else "no")
        assert given[ASK_STRAND] == ("yes" if "E" in shown else "no")


def test_sequence_answers_hold_and_are_clear_cut(samples):
    one_letter = {"alanine": "A", "glutamate": "E", "glycine": "G", "lysine": "K", "leucine": "L", "valine": "V"}
    firsts = {"aspartate": "D", "methionine": "M", "serine": "S", "threonine": "T"}
    for sample in samples:
        sequence = sample.protein.sequence
        given = {turn.question: turn.answer for turn in sample.turns}
        (top, top_count), (_, next_count) = Counter(sequence).most_common(2)
        assert one_letter[given[ASK_FREQUENT]] == top and top_count >= 1.5 * next_count
        assert firsts[given[ASK_FIRST]] == sequence[0]
        assert given[ASK_CYSTEINE] == ("yes" if sequence.count("C") >= 2 else "no")
        assert sequence.count("C") != 1
        assert given[ASK_LONG] == ("yes" if len(sequence) > 40 else "no")


def test_the_main_structure_has_twice_the_residues_of_any_other(samples):
    for sample in samples:
        counts = [count for _, count in Counter(sample.metadata["secondary_structure"]).most_common()]
        assert len(counts) == 1 or counts[0] >= 2 * counts[1]


def test_every_question_has_balanced_answers(samples):
    """No answer is more than 8 points (about 3 standard deviations of 400 draws) from an equal share."""
    num_answers = {ASK_MAIN: 3, ASK_BEGIN: 3, ASK_FREQUENT: 6, ASK_FIRST: 4}
    given = {}
    for sample in samples:
        assert len(sample.turns) == 8
        for turn in sample.turns:
            given.setdefault(turn.question, Counter())[turn.answer] += 1
    for question, counts in given.items():
        wanted = num_answers.get(question, 2)
        assert len(counts) == wanted, question
        assert all(abs(count / len(samples) - 1 / wanted) < 0.08 for count in counts.values()), (question, counts)


def test_a_model_blind_to_the_protein_scores_between_35_and_45_percent(samples):
    training, held_out = samples[:300], samples[300:]
    seen = {}
    for sample in training:
        for turn in sample.turns:
            seen.setdefault(turn.question, Counter())[turn.answer] += 1
    guess = {question: counts.most_common(1)[0][0] for question, counts in seen.items()}
    hits = [guess[turn.question] == turn.answer for sample in held_out for turn in sample.turns]
    assert 0.35 < sum(hits) / len(hits) < 0.45


def test_the_sequence_says_nothing_of_the_structure(samples):
    """The best guess of the main structure from the most frequent residue stays near a third."""
    training, held_out = samples[:300], samples[300:]

    def residue_and_main(sample):
        given = {turn.question: turn.answer for turn in sample.turns}
        return given[ASK_FREQUENT], given[ASK_MAIN]

    seen = {}
    for sample in training:
        residue, main = residue_and_main(sample)
        seen.setdefault(residue, Counter())[main] += 1
    hits = [seen[residue].most_common(1)[0][0] == main for residue, main in map(residue_and_main, held_out)]
    assert sum(hits) / len(hits) < 0.50


def test_a_few_proteins_have_up_to_three_unresolved_residues_and_keep_their_answers_visible(samples):
    incomplete = [sample for sample in samples if not sample.protein.resolved.all()]
    assert 0.05 < len(incomplete) / len(samples) < 0.25
    for sample in incomplete:
        resolved = sample.protein.resolved
        lost = np.flatnonzero(~resolved)
        assert 1 <= len(lost) <= 3 and lost[0] >= 4 and np.isnan(sample.protein.backbone[lost]).all()
        kinds = np.array(list(sample.metadata["secondary_structure"]))
        assert set(kinds[resolved]) >= set(kinds) - {"C"}


def test_the_same_seed_gives_the_same_samples_and_a_longer_set_begins_with_the_shorter():
    short, long, other = demo_samples(5, seed=3), demo_samples(8, seed=3), demo_samples(5, seed=4)
    for a, b in zip(short, long):
        assert a.protein.sequence == b.protein.sequence and a.turns == b.turns and a.metadata == b.metadata
        assert a.protein.backbone.tobytes() == b.protein.backbone.tobytes()
    assert [a.protein.sequence for a in short] != [b.protein.sequence for b in other]


def test_keys_are_numbered_and_unique(samples):
    assert samples[17].key == "demo00017_A"
    assert len({sample.key for sample in samples}) == len(samples)


@pytest.mark.parametrize("num_proteins, seed", [(0, 0), (-1, 0), (3, -1)])
def test_refuses_no_proteins_and_negative_seeds(num_proteins, seed):
    with pytest.raises(ValueError, match="wanted at least 1 protein and a seed of 0 or more"):
        demo_samples(num_proteins, seed)
