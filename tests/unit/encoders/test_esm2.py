"""Our ESM-2 rows are those of fair-esm, by either backend, in any batch, and survive half precision."""

import pytest
import torch
from row_errors import largest_error, relative_error

from proteingpt.encoders import fair_esm, load_esm2, packed
from proteingpt.encoders.esm2 import esm2_shapes, read_esm2, tokens_of
from proteingpt.encoders.packed import tensors_in

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"
BACKENDS = ("fast", "reference")


@pytest.fixture(scope="module", params=BACKENDS)
def encoder(esm2_file, request):
    return load_esm2(str(esm2_file), backend=request.param)


@pytest.fixture(scope="module")
def reference(esm2_file):
    return load_esm2(str(esm2_file), backend="reference")


def floats_of(encoder) -> list[torch.Tensor]:
    """All weights, the rotary frequencies left out."""
    if hasattr(encoder.model, "module"):
        return list(encoder.model.module.parameters())
    kept_aside = {id(layer.inv_freq) for layer in encoder.model.layers}
    return [value for value in tensors_in(encoder.model) if id(value) not in kept_aside]


def rows_of_fair_esm(model, alphabet, sequence):
    """As fair-esm's README has it: batch converter, then the representations of the last layer."""
    _, _, tokens = alphabet.get_batch_converter()([("protein", sequence)])
    with torch.no_grad():
        return model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers][0]


def test_rows_equal_fair_esms(encoder, esm2_file, make_protein, load_with_fair_esm):
    model, alphabet = load_with_fair_esm(esm2_file, "esm2_tiny")
    for protein in (make_protein(70), make_protein(25, sequence=LETTERS)):
        rows = encoder.encode([protein])[0]
        assert rows.shape == (len(protein) + 2, encoder.width) == (len(protein) + 2, 64)
        assert relative_error(rows, rows_of_fair_esm(model, alphabet, protein.sequence)) < 1e-6


def test_settings_come_from_the_file(edited, esm2_file, encoder, make_protein, load_with_fair_esm):
    """token_dropout scales the embeddings by 0.88 also in eval mode; without it the rows differ."""
    path = edited(esm2_file, lambda c: vars(c["cfg"]["model"]).update(token_dropout=False, encoder_attention_heads=2))
    with pytest.raises(ValueError, match="inv_freq has shape"):
        load_esm2(path)
    path = edited(esm2_file, lambda c: vars(c["cfg"]["model"]).update(token_dropout=False))
    protein = make_protein(40)
    rows = load_esm2(path).encode([protein])[0]
    assert relative_error(rows, rows_of_fair_esm(*load_with_fair_esm(path, "esm2_tiny"), protein.sequence)) < 1e-6
    assert relative_error(rows, encoder.encode([protein])[0]) > 0.01


def test_rotary_frequencies_come_from_the_file(edited, esm2_file, encoder, make_protein, load_with_fair_esm):
    """The published ones were rounded to fp16 before training: recomputed ones give other rows."""
    protein = make_protein(300)
    rows = encoder.encode([protein])[0]

    def recompute(checkpoint):
        for name, value in checkpoint["model"].items():
            if name.endswith("inv_freq"):
                checkpoint["model"][name] = 10000.0 ** (-torch.arange(len(value)) / len(value))

    path = edited(esm2_file, recompute)
    recomputed = load_esm2(path).encode([protein])[0]
    oracle = rows_of_fair_esm(*load_with_fair_esm(path, "esm2_tiny"), protein.sequence)
    assert relative_error(recomputed, oracle) < 1e-6
    assert relative_error(recomputed, rows) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_keeps_frequencies_and_tables_in_float32(
    esm2_file, reference, make_protein, load_with_fair_esm, backend
):
    protein = make_protein(400)
    wanted = reference.encode([protein])[0]
    half = load_esm2(str(esm2_file), dtype=torch.bfloat16, backend=backend)
    rows = half.encode([protein])[0]
    assert rows.dtype == torch.bfloat16
    assert {value.dtype for value in floats_of(half)} == {torch.bfloat16}
    error = relative_error(rows, wanted)
    assert error < 0.03

    model, alphabet = load_with_fair_esm(esm2_file, "esm2_tiny")
    naive = relative_error(rows_of_fair_esm(model.to(torch.bfloat16), alphabet, protein.sequence), wanted)
    assert naive > 3 * error, "casting the whole module does no harm here: this test proves nothing"

    finer = load_esm2(str(esm2_file), dtype=torch.float16, backend=backend)
    assert relative_error(finer.encode([protein])[0], wanted) < 0.005


def test_the_fast_backend_holds_no_module_and_the_files_frequencies(esm2_file):
    """Nothing that an engine could cast: tensors in tuples."""
    half = load_esm2(str(esm2_file), dtype=torch.bfloat16)
    assert isinstance(half.model, tuple) and not isinstance(half.model, torch.nn.Module)
    stored = torch.load(esm2_file, weights_only=False)["model"]
    for number, layer in enumerate(half.model.layers):
        name = f"encoder.sentence_encoder.layers.{number}.self_attn.rot_emb.inv_freq"
        assert layer.inv_freq.dtype == torch.float32 and torch.equal(layer.inv_freq, stored[name].float())


def test_frequencies_are_out_of_reach_of_a_cast(esm2_file):
    """An engine that casts what it holds must not get at them, even if it is handed the module by mistake."""
    module = load_esm2(str(esm2_file), backend="reference").model.module.to(torch.bfloat16)
    stored = torch.load(esm2_file, weights_only=False)["model"]
    for number, layer in enumerate(module.layers):
        name = f"encoder.sentence_encoder.layers.{number}.self_attn.rot_emb.inv_freq"
        assert layer.self_attn.rot_emb.inv_freq.dtype == torch.float32
        assert torch.equal(layer.self_attn.rot_emb.inv_freq, stored[name].float())
    assert not any("inv_freq" in name for name in module.state_dict())


def test_letters_are_those_of_fair_esm():
    """Its order is l, a, g, ... after <cls>, <pad>, <eos>, <unk>; its own converter is the second witness."""
    assert tokens_of("LAG") == [0, 4, 5, 6, 2]
    alphabet = fair_esm.esm().Alphabet.from_architecture("ESM-1b")
    _, _, tokens = alphabet.get_batch_converter()([("protein", LETTERS)])
    assert tokens_of(LETTERS) == tokens[0].tolist() == [0, *range(4, 29), 2]


def test_a_file_with_the_other_prefix_that_fair_esm_knows_gives_the_same_rows(edited, esm2_file, encoder, make_protein):
    def shorten(checkpoint):
        stored = checkpoint["model"]
        checkpoint["model"] = {name.replace("sentence_encoder.", ""): value for name, value in stored.items()}

    renamed, protein = load_esm2(edited(esm2_file, shorten)), make_protein(30)
    assert torch.allclose(renamed.encode([protein])[0], encoder.encode([protein])[0], atol=1e-5)


def test_unknown_letters_are_one_unk_each():
    unknown = 3
    assert tokens_of("AJJ*1A") == [0, 5, unknown, unknown, unknown, unknown, 5, 2]


def test_lower_case_is_read_as_upper_case():
    assert tokens_of("mkvl") == tokens_of("MKVL")
    assert len(tokens_of("aßa")) == 5


def test_any_batch_gives_the_rows_of_each_alone(encoder, make_protein, monkeypatch):
    proteins = [make_protein(length, seed=length) for length in (1, 40, 7, 38, 33, 40, 90, 2)]
    alone = [encoder.encode([protein])[0] for protein in proteins]
    for max_positions in (4096, 100):
        monkeypatch.setattr("proteingpt.encoders.reference.ESM2_MAX_POSITIONS", max_positions)
        monkeypatch.setattr("proteingpt.encoders.packed.MAX_ROWS_CPU", max_positions)
        together = encoder.encode(proteins)
        for protein, one, other in zip(proteins, alone, together, strict=True):
            assert one.shape == other.shape == (len(protein) + 2, 64)
            assert torch.allclose(one, other, atol=1e-5)


def test_padding_would_show_if_it_were_attended_to(reference, make_protein):
    """The test above has teeth: the same tokens with padding read as a letter give other rows."""
    protein, longer = make_protein(30), make_protein(34)
    tokens = torch.tensor([tokens_of(protein.sequence) + [5] * 4, tokens_of(longer.sequence)])
    leaky = reference.model.module(tokens, repr_layers=[2])["representations"][2][0, :32]
    assert (leaky - reference.encode([protein, longer])[0]).abs().max() > 0.01


def test_a_pack_that_ignores_where_proteins_end_would_show(esm2_file, make_protein, monkeypatch):
    """The same test for the fast forward: attention over the whole pack gives other rows."""
    encoder, proteins = load_esm2(str(esm2_file)), [make_protein(30), make_protein(34)]
    wanted = encoder.encode(proteins)
    one_by_one = "proteingpt.encoders.packed.attend_one_by_one"
    original = packed.attend_one_by_one
    monkeypatch.setattr(one_by_one, lambda q, k, v, lengths: original(q, k, v, (sum(lengths),)))
    assert (encoder.encode(proteins)[0] - wanted[0]).abs().max() > 0.01


def test_the_fast_forward_equals_fair_esm_at_any_length_and_mixture(
    esm2_file, encoder, make_protein, load_with_fair_esm
):
    """fair-esm as it is, one protein at a time; it has no J, for which its alphabet's <unk> is given. Attention in the
    file is sharp (weights of q and k times 3), so that an error of position would show."""
    model, alphabet = load_with_fair_esm(esm2_file, "esm2_tiny")
    proteins = [make_protein(length, seed=1) for length in (1, 2, 700, 3, 64, 2000, 257, 30)]
    proteins += [make_protein(26, sequence=LETTERS + "J"), make_protein(6, sequence="jxbuzo")]
    for protein, found in zip(proteins, encoder.encode(proteins), strict=True):
        wanted = rows_of_fair_esm(model, alphabet, protein.sequence.upper().replace("J", "<unk>"))
        assert found.shape == wanted.shape and largest_error(found, wanted) < 5e-5, len(protein)


def test_any_layer_is_fair_esms_and_later_layers_are_not_loaded(esm2_file, make_protein, load_with_fair_esm):
    model, alphabet = load_with_fair_esm(esm2_file, "esm2_tiny")
    protein = make_protein(50)
    _, _, tokens = alphabet.get_batch_converter()([("protein", protein.sequence)])
    with torch.no_grad():
        wanted = model(tokens, repr_layers=[0, 1, 2])["representations"]
    for backend in BACKENDS:
        for layer in (0, 1, 2):
            encoder = load_esm2(str(esm2_file), layer=layer, backend=backend)
            assert relative_error(encoder.encode([protein])[0], wanted[layer][0]) < 1e-6
            assert encoder.layer == layer
    sizes = [sum(value.numel() for value in tensors_in(load_esm2(str(esm2_file), layer=n).model)) for n in (0, 1, 2)]
    assert sizes[0] == 33 * 64 and sizes[2] - sizes[1] - 2 * 64 == sizes[1] - sizes[0]
    assert load_esm2(str(esm2_file)).layer == 2


def test_a_layer_or_backend_that_is_not_there_is_refused(esm2_file):
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer {layer} .* it has layers 0 .* to 2"):
            load_esm2(str(esm2_file), layer=layer)
    with pytest.raises(ValueError, match="backend 'faster' is not known: wanted one of fast, reference"):
        load_esm2(str(esm2_file), backend="faster")


def test_frequencies_that_differ_between_layers_are_each_used(edited, esm2_file, make_protein):
    def change(checkpoint):
        checkpoint["model"]["encoder.sentence_encoder.layers.1.self_attn.rot_emb.inv_freq"] *= 0.5

    path, protein = edited(esm2_file, change), make_protein(80)
    found, wanted = (load_esm2(path, backend=backend).encode([protein])[0] for backend in BACKENDS)
    assert largest_error(found, wanted) < 5e-5
    assert relative_error(found, load_esm2(str(esm2_file)).encode([protein])[0]) > 1e-3


def test_wanted_shapes_are_those_of_fair_esms_module(esm2_file):
    cfg, tensors = read_esm2(esm2_file)
    heads = ("lm_head.", "contact_head.")
    module = {name: tuple(v.shape) for name, v in fair_esm.build_esm2(cfg).state_dict().items()}
    assert esm2_shapes(cfg) == {name: shape for name, shape in module.items() if not name.startswith(heads)}
    assert tensors.keys() == esm2_shapes(cfg).keys()


def test_no_proteins_no_rows(encoder):
    assert encoder.encode([]) == []


def test_rows_are_frozen_but_fit_for_autograd(encoder, make_protein):
    assert not any(value.requires_grad for value in floats_of(encoder))
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


def test_weights_do_not_lie_on_the_file(esm2_file, tmp_path, make_protein):
    """The file may be replaced while the encoder is in use."""
    copy = tmp_path / "copy.pt"
    copy.write_bytes(esm2_file.read_bytes())
    encoder, protein = load_esm2(str(copy), dtype=torch.float16), make_protein(9)
    before = encoder.encode([protein])[0]
    with open(copy, "r+b") as stream:
        stream.write(bytes(copy.stat().st_size))
    assert torch.equal(encoder.encode([protein])[0], before)
