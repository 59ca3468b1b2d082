"""Our ESM-IF1 rows are those of fair-esm, by either backend; missing is not padding; the frame is the deposited one."""

import numpy as np
import pytest
import torch
from row_errors import largest_error, relative_error
from scipy.spatial.transform import Rotation

from proteingpt.encoders import fair_esm, load_esm_if1, weights
from proteingpt.encoders.esm_if1 import NUM_TOKENS, code_name, esm_if1_shapes, inputs_of, read_esm_if1
from proteingpt.encoders.esm_if1_packed import FIRST_POSITION, MASK_TOKEN
from proteingpt.encoders.packed import tensors_in

BACKENDS = ("fast", "reference")


@pytest.fixture(scope="module", params=BACKENDS)
def encoder(esm_if1_file, request):
    return load_esm_if1(str(esm_if1_file), backend=request.param)


@pytest.fixture(scope="module")
def fast(esm_if1_file):
    return load_esm_if1(str(esm_if1_file))


@pytest.fixture(scope="module")
def reference(esm_if1_file):
    return load_esm_if1(str(esm_if1_file), backend="reference")


@pytest.fixture(scope="module")
def published(esm_if1_file, load_with_fair_esm):
    """fair-esm's whole model and its alphabet, with the same weights."""
    return load_with_fair_esm(esm_if1_file, "esm_if1_tiny")


def rows_of_fair_esm(model, alphabet, coords, confidence=None):
    """fair-esm's batch converter and encoder, all L + 2 rows (its get_encoder_output cuts the first and last)."""
    convert = fair_esm.inverse_folding().util.CoordBatchConverter(alphabet)
    coords, confidence, _, _, padding = convert([(coords, confidence, None)])
    with torch.no_grad():
        return model.encoder(coords, padding, confidence)["encoder_out"][0][:, 0]


def test_a_complete_chain_equals_fair_esms_utility(encoder, published, make_protein):
    protein = make_protein(60)
    rows = encoder.encode([protein])[0]
    with torch.no_grad():
        wanted = fair_esm.inverse_folding().util.get_encoder_output(*published, protein.backbone)
    assert rows.shape == (62, encoder.width) == (62, 64)
    assert relative_error(rows[1:-1], wanted) < 1e-6
    assert relative_error(rows, rows_of_fair_esm(*published, protein.backbone)) < 1e-6


def test_names_of_the_published_file_are_mapped_as_fair_esm_does():
    """Pairs read off fair-esm's `update_name`."""
    for published, code in {
        "encoder.gvp_encoder.W_v.0.ws.weight": "encoder.gvp_encoder.embed_graph.embed_node.0.ws.weight",
        "encoder.gvp_encoder.W_e.1.scalar_norm.bias": "encoder.gvp_encoder.embed_graph.embed_edge.1.scalar_norm.bias",
        "encoder.gvp_encoder.embed_score.bias": "encoder.gvp_encoder.embed_graph.embed_confidence.bias",
        "encoder.embed_scores.0.weight": "encoder.embed_confidence.weight",
        "encoder.embed_ingraham_features.norm_nodes.gain": "encoder.embed_dihedrals.norm_nodes.gain",
        "encoder.embed_gvp_in_local_frame.0.weight": "encoder.embed_gvp_output.weight",
        "encoder.embed_features_in_local_frame.0.bias": "encoder.embed_gvp_input_features.bias",
        "encoder.layers.0.fc1.weight": "encoder.layers.0.fc1.weight",
    }.items():
        assert code_name(published) == code


def test_inputs_by_hand(make_protein):
    protein = make_protein(3)
    protein.backbone[1, 2, 0] = np.nan
    coords, confidence = inputs_of(protein)
    assert np.isposinf(coords[[0, 2, 4]]).all()
    assert np.array_equal(coords[[1, 3]], protein.backbone[[0, 2]])
    assert confidence.tolist() == [0, 1, 0, 1, 0]
    assert coords.dtype == confidence.dtype == np.float32


def test_predicted_structures_bring_their_confidence(encoder, published, make_protein):
    plddt = np.linspace(0.3, 0.9, 20, dtype=np.float32)
    protein = make_protein(20, missing=[4], confidence=plddt)
    assert inputs_of(protein)[1][1:-1].tolist() == [0 if i == 4 else value for i, value in enumerate(plddt.tolist())]
    rows = encoder.encode([protein])[0]
    coords = np.where(np.isnan(protein.backbone), np.inf, protein.backbone)
    assert relative_error(rows, rows_of_fair_esm(*published, coords, plddt.tolist())) < 1e-6
    assert relative_error(rows, encoder.encode([make_protein(20, missing=[4])])[0]) > 0.01


def test_a_confidence_that_is_not_a_share_is_refused(encoder, make_protein):
    for wrong in (87.5, -0.1, np.nan):
        confidence = np.full(6, 0.9, np.float32)
        confidence[2] = wrong
        with pytest.raises(ValueError, match=r"protein test_A: confidence .* wanted 0..1 \(pLDDT / 100\)"):
            encoder.encode([make_protein(6, confidence=confidence)])
        encoder.encode([make_protein(6, confidence=confidence, missing=[2])])


@pytest.mark.parametrize("missing", [[0], [19], [7], [5, 6, 7, 8], [0, 1, 10, 18, 19]])
def test_missing_residues_are_attended_to_as_missing(encoder, published, make_protein, missing):
    """To fair-esm inf is a missing residue and NaN is padding; what is NaN in ours must reach it as inf."""
    protein = make_protein(20, missing=missing)
    rows = encoder.encode([protein])[0]
    assert rows.isfinite().all()
    as_inf = np.where(np.isnan(protein.backbone), np.inf, protein.backbone)
    assert relative_error(rows, rows_of_fair_esm(*published, as_inf)) < 1e-6
    as_padding = rows_of_fair_esm(*published, protein.backbone)
    assert relative_error(rows, as_padding) > 1e-3, "padding does no harm here: this test proves nothing"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("atom", [0, 1, 2])
def test_one_missing_atom_makes_the_whole_residue_missing(encoder, make_protein, atom, value):
    whole, part = make_protein(15, missing=[6]), make_protein(15)
    part.backbone[6, atom, 1] = value
    assert torch.equal(encoder.encode([whole])[0], encoder.encode([part])[0])
    assert not torch.equal(encoder.encode([whole])[0], encoder.encode([make_protein(15)])[0])


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_a_protein_without_any_coordinates_has_finite_rows(encoder, make_protein, length):
    rows = encoder.encode([make_protein(length, missing=range(length))])[0]
    assert rows.shape == (length + 2, 64) and rows.isfinite().all()


def test_a_protein_of_one_residue(encoder, published, make_protein):
    protein = make_protein(1)
    rows = encoder.encode([protein])[0]
    assert rows.shape == (3, 64) and rows.isfinite().all()
    assert relative_error(rows, rows_of_fair_esm(*published, protein.backbone)) < 1e-6


def test_rotation_changes_nothing(encoder, make_protein):
    protein = make_protein(50, missing=[20, 21])
    rows = encoder.encode([protein])[0]
    for rotation in Rotation.random(5, rng=np.random.default_rng(0)):
        turned = (protein.backbone @ rotation.as_matrix().T).astype(np.float32)
        assert (encoder.encode([make_protein(50, backbone=turned)])[0] - rows).abs().max() < 1e-4


def test_the_deposited_frame_is_kept(encoder, published, make_protein):
    """A missing neighbour sits at the origin, so a shift shows in the rows beside it; centring would be an error."""
    protein = make_protein(40)
    shifted = make_protein(40, backbone=protein.backbone + np.float32([40, -25, 10]))
    rows = encoder.encode([shifted])[0]
    assert relative_error(rows, rows_of_fair_esm(*published, shifted.backbone)) < 1e-6
    assert (rows - encoder.encode([protein])[0])[[0, 1, -2, -1]].abs().max() > 0.01


def test_any_batch_gives_the_rows_of_each_alone(encoder, make_protein, monkeypatch):
    """Also where a protein alone has fewer residues than neighbours are asked for, and the batch has more."""
    monkeypatch.setattr("proteingpt.encoders.fair_esm.padded_batches.__defaults__", (0.0,))
    lengths_and_gaps = [(1, []), (40, [3]), (7, [0]), (8, range(8)), (38, [37]), (40, []), (90, range(20, 40)), (2, [])]
    proteins = [make_protein(length, seed=length, missing=gaps) for length, gaps in lengths_and_gaps]
    alone = [encoder.encode([protein])[0] for protein in proteins]
    for max_positions in (10_000, 100):
        monkeypatch.setattr("proteingpt.encoders.reference.ESM_IF1_MAX_POSITIONS", max_positions)
        monkeypatch.setattr("proteingpt.encoders.packed.MAX_ROWS_CPU", max_positions)
        together = encoder.encode(proteins)
        for protein, one, other in zip(proteins, alone, together, strict=True):
            assert one.shape == other.shape == (len(protein) + 2, 64)
            assert torch.allclose(one, other, atol=1e-5)


def parts_in_half(encoder) -> set[str]:
    if hasattr(encoder.model, "module"):
        named = [(name.split(".")[0], value) for name, value in encoder.model.module.named_parameters()]
    else:
        named = [(name, value) for name, part in encoder.model._asdict().items() for value in tensors_in(part)]
    mixed = {name for name, value in named if value.dtype == torch.float32}
    found = {name for name, value in named if value.dtype == torch.bfloat16}
    assert not mixed & found
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_leaves_geometry_in_float32(esm_if1_file, make_protein, backend):
    encoder = load_esm_if1(str(esm_if1_file), backend=backend)
    protein = make_protein(80, missing=[30])
    shifted = make_protein(80, backbone=protein.backbone + np.float32(60))
    wanted = encoder.encode([shifted])[0]
    half = load_esm_if1(str(esm_if1_file), dtype=torch.bfloat16, backend=backend)
    rows = half.encode([shifted])[0]
    assert rows.dtype == torch.bfloat16
    assert parts_in_half(half) == {"fast": {"layers", "final_norm"}, "reference": {"layers", "layer_norm"}}[backend]
    error = relative_error(rows, wanted)
    assert error < 0.015

    rounded = torch.from_numpy(shifted.backbone).bfloat16().float().numpy()
    naive = relative_error(encoder.encode([make_protein(80, backbone=rounded)])[0], wanted)
    assert naive > 3 * error, "rounded coordinates do no harm here: this test proves nothing"


def test_no_proteins_no_rows(encoder):
    assert encoder.encode([]) == []


def test_rows_are_frozen_but_fit_for_autograd(encoder, make_protein):
    held = encoder.model.module.parameters() if hasattr(encoder.model, "module") else tensors_in(encoder.model)
    assert not any(value.requires_grad for value in held)
    rows = encoder.encode([make_protein(5)])[0]
    assert not rows.requires_grad and not rows.is_inference()
    projection = torch.nn.Linear(64, 3)
    projection(rows).sum().backward()
    assert torch.allclose(projection.weight.grad[0], rows.sum(0), atol=1e-5)


def test_an_autocast_region_of_the_caller_changes_nothing(encoder, make_protein):
    protein = make_protein(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = encoder.encode([protein])[0]
    assert torch.equal(rows, encoder.encode([protein])[0])


def test_the_input_is_not_changed(encoder, make_protein):
    protein = make_protein(10, missing=[3])
    before = protein.backbone.copy()
    encoder.encode([protein])
    assert np.array_equal(before, protein.backbone, equal_nan=True)


def test_the_fast_forward_equals_fair_esm_in_any_mixture(fast, published, make_protein):
    """fair-esm as it is, one protein at a time, missing residues as its inf."""
    gaps = {1: [], 2: [1], 13: [0, 12], 60: range(20, 50), 400: [7, 8, 250], 900: []}
    proteins = [make_protein(length, seed=3, missing=missing) for length, missing in gaps.items()]
    proteins.append(make_protein(30, seed=4, missing=range(30)))
    proteins.append(make_protein(70, seed=5, confidence=np.linspace(0.2, 1, 70, dtype=np.float32)))
    broken = make_protein(50, seed=6).backbone
    broken[20:] += np.float32([60, -10, 5])  # a chain break: no residue is missing, the next is far away
    proteins.append(make_protein(50, seed=6, backbone=broken))
    for protein, found in zip(proteins, fast.encode(proteins), strict=True):
        coords = np.where(np.isnan(protein.backbone), np.inf, protein.backbone)
        confidence = None if protein.confidence is None else protein.confidence.tolist()
        assert largest_error(found, rows_of_fair_esm(*published, coords, confidence)) < 1e-5, len(protein)


def ideal_helix(length: int) -> np.ndarray:
    """float32 (length, 3, 3): 100 degrees and 1.5 angstrom a residue. Radius, turn and rise of N and C by eye."""
    shift, rise, radius = (np.array(values)[None] for values in ((-27, 0, 26), (-0.9, 0, 1.1), (1.6, 2.3, 1.7)))
    angle = np.deg2rad(100 * np.arange(length)[:, None] + shift)
    height = 1.5 * np.arange(length)[:, None] + rise
    radius = np.broadcast_to(radius, angle.shape)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), height), axis=-1).astype(np.float32)


def test_neighbours_at_equal_distances_are_chosen_as_fair_esm_does(fast, reference, make_protein):
    """In an ideal helix the neighbours before and after a residue tie, so rounding decides which one is the last."""
    protein = make_protein(80, backbone=ideal_helix(80), missing=())
    assert largest_error(fast.encode([protein])[0], reference.encode([protein])[0]) < 1e-5


def test_chunks_of_edges_and_of_distances_do_not_show(fast, make_protein, monkeypatch):
    proteins = [make_protein(50, missing=[3]), make_protein(4), make_protein(90)]
    wanted = fast.encode(proteins)
    monkeypatch.setattr("proteingpt.encoders.esm_if1_packed._MAX_EDGES_CPU", 17)
    monkeypatch.setattr("proteingpt.encoders.esm_if1_geometry._MAX_PAIRS", 300)
    for found, rows in zip(fast.encode(proteins), wanted, strict=True):
        assert torch.allclose(found, rows, atol=1e-5)


@pytest.mark.parametrize("others", [[30], [12, 45]])
def test_a_complex_has_fair_esms_rows_of_its_target(encoder, published, make_protein, others):
    """By its own utility for complexes, which puts the target first and ten residues between chains."""
    target, *rest = (make_protein(length, seed=9) for length in (40, *others))
    rows = encoder.encode_in_complex(target, rest)
    coords = {str(number): chain.backbone for number, chain in enumerate([target, *rest])}
    utility = fair_esm.inverse_folding().multichain_util
    with torch.no_grad():
        wanted = utility.get_encoder_output_for_complex(*published, coords, "0")
    assert rows.shape == (42, 64) and rows.isfinite().all()
    assert relative_error(rows[1:-1], wanted) < 1e-6
    assert relative_error(rows, encoder.encode([target])[0]) > 0.01


def test_a_target_alone_is_no_complex(encoder, make_protein):
    protein = make_protein(20, missing=[4])
    assert torch.equal(encoder.encode_in_complex(protein, []), encoder.encode([protein])[0])


def test_wanted_shapes_are_those_of_fair_esms_module(esm_if1_file):
    args, tensors = read_esm_if1(esm_if1_file)
    module = fair_esm.build_esm_if1_encoder(args).state_dict()
    del module["embed_positions._float_tensor"]
    assert esm_if1_shapes(args) == {name: tuple(value.shape) for name, value in module.items()}
    assert tensors.keys() == module.keys()


def test_tokens_and_first_position_are_those_of_fair_esms_alphabet():
    alphabet = fair_esm.alphabet(fair_esm.ESM_IF1_ALPHABET)
    assert (MASK_TOKEN, FIRST_POSITION) == (alphabet.mask_idx, alphabet.padding_idx + 1)
    assert len(alphabet) == NUM_TOKENS


def test_a_directory_is_no_esm_if1(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(weights.BadCheckpoint, match="is a directory: wanted the published ESM-IF1 file"):
        load_esm_if1(str(tmp_path))
