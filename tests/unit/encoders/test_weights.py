"""Weights are found where a user puts them, and read without trusting what is in the file."""

import hashlib
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteingpt.encoders import fair_esm, load_esm2, load_esm_if1, weights


def test_published_names_and_addresses_are_those_of_fair_esm(monkeypatch):
    pretrained = fair_esm.esm().pretrained
    fetched = []
    monkeypatch.setattr(pretrained, "load_hub_workaround", fetched.append)
    for name in weights.PUBLISHED_NAMES:
        assert callable(getattr(pretrained, name))
        pretrained._download_model_and_regression_data(name)
        assert weights.MODEL_URL.format(name=name) in fetched
    assert set(weights.ESM2_NAMES) == {name for name in vars(pretrained) if name.startswith("esm2_t")}


def test_a_path_is_taken_as_it_is(tmp_path):
    file = tmp_path / "mine.weights"
    file.write_bytes(b"x")
    assert weights.find_weights(str(file), tmp_path / "nowhere") == file


def test_a_name_is_found_in_weights_dir_before_torch_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "esm2_t6_8M_UR50D.pt").write_bytes(b"x")
    own = tmp_path / "weights"
    own.mkdir()
    assert weights.find_weights("esm2_t6_8M_UR50D", own) == hub / "esm2_t6_8M_UR50D.pt"
    (own / "esm2_t6_8M_UR50D.pt").write_bytes(b"x")
    assert weights.find_weights("esm2_t6_8M_UR50D", own) == own / "esm2_t6_8M_UR50D.pt"


@pytest.mark.parametrize("name, load", [("esm2_t36_3B_UR50D", load_esm2), (weights.ESM_IF1_NAME, load_esm_if1)])
def test_missing_weights_say_what_where_and_whence(name, load, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(weights.WeightsNotFound) as caught:
        load(name, weights_dir=tmp_path / "weights")
    message = str(caught.value)
    assert str(tmp_path / "weights" / f"{name}.pt") in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / f"{name}.pt") in message
    assert f"https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt" in message
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FileNotFoundError)


def test_a_missing_path_is_named_with_its_address_if_it_is_a_published_file(tmp_path):
    with pytest.raises(weights.WeightsNotFound, match="no encoder weights at .*own.pt$"):
        weights.find_weights(tmp_path / "own.pt")
    with pytest.raises(weights.WeightsNotFound, match="fair-esm/models/esm2_t6_8M_UR50D.pt"):
        weights.find_weights(tmp_path / "esm2_t6_8M_UR50D.pt")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(weights.WeightsNotFound, match="is a directory"):
        weights.find_weights(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(weights.UnknownWeights) as caught:
        weights.find_weights("esm2_t36_3B")
    assert all(name in str(caught.value) for name in weights.PUBLISHED_NAMES)


def test_fingerprint_is_the_sha256_of_the_bytes_that_were_loaded(tmp_path, esm2_file):
    loaded = esm2_file.read_bytes()
    copies = [tmp_path / "asked_before.pt", tmp_path / "asked_after.pt"]
    for copy in copies:
        copy.write_bytes(loaded)
    before, after = (load_esm2(str(copy)) for copy in copies)
    assert before.fingerprint == hashlib.sha256(loaded).hexdigest()
    for copy in copies:
        copy.write_bytes(loaded + b"more")
    assert before.fingerprint == hashlib.sha256(loaded).hexdigest()
    with pytest.raises(ValueError, match="asked_after.pt has changed since it was loaded"):
        after.fingerprint


class Attack:
    """Runs a shell command when a trusting unpickler reads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class OptimizerState(dict):
    """A class that torch does not know. Notes when an unpickler builds one."""

    built = []

    def __setstate__(self, state):
        OptimizerState.built.append(state)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_not_run_and_the_weights_are_still_read(as_zip, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "attack.pt"
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"model": {"w": weight}, "extra": Attack(marker)}, file, _use_new_zipfile_serialization=as_zip)
    checkpoint = weights.load_checkpoint(file)
    assert not marker.exists()
    assert isinstance(checkpoint["extra"], weights.InertStub)
    assert torch.equal(checkpoint["model"]["w"], weight)
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file of this test does not attack"


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_optimizer_state_of_unknown_classes_does_not_stop_the_weights(as_zip, tmp_path, esm_if1_file):
    state = OptimizerState(step=3, average=torch.ones(4))
    state.history = [torch.zeros(2), {"lr": 0.1}, {1, 2}, torch.float16, torch.device("cpu")]
    checkpoint = torch.load(esm_if1_file, weights_only=False)
    checkpoint["last_optimizer_state"] = {"state": state, "param_groups": [state]}
    checkpoint["parameter"] = torch.nn.Parameter(torch.ones(3))
    torch.save(checkpoint, tmp_path / "full.pt", _use_new_zipfile_serialization=as_zip)
    OptimizerState.built.clear()
    read = weights.load_checkpoint(tmp_path / "full.pt")
    assert OptimizerState.built == []
    assert isinstance(read["last_optimizer_state"]["state"], weights.InertStub)
    assert torch.equal(read["parameter"].data, torch.ones(3))
    assert vars(read["args"]) == vars(checkpoint["args"])
    assert read["model"].keys() == checkpoint["model"].keys()
    assert all(torch.equal(read["model"][name], value) for name, value in checkpoint["model"].items())
    assert load_esm_if1(str(tmp_path / "full.pt")).width == 64


def test_weights_of_an_unknown_class_are_refused_by_name(edited, esm2_file):
    def change(checkpoint):
        checkpoint["model"]["encoder.sentence_encoder.emb_layer_norm_after.bias"] = OptimizerState()

    with pytest.raises(weights.BadCheckpoint, match="emb_layer_norm_after.bias is a OptimizerState, wanted a tensor"):
        load_esm2(edited(esm2_file, change))


def test_a_web_page_saved_as_weights_is_called_that(tmp_path):
    page = tmp_path / "esm2.pt"
    page.write_text("\n<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    with pytest.raises(weights.BadCheckpoint, match="web page"):
        load_esm2(str(page))


def test_an_empty_file_is_called_that(tmp_path):
    (tmp_path / "empty.pt").touch()
    with pytest.raises(weights.BadCheckpoint, match="is empty"):
        load_esm2(str(tmp_path / "empty.pt"))


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 0.999))
def test_a_file_cut_short_anywhere_is_a_bad_checkpoint(as_zip, share, tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"model": {"w": torch.ones(300)}}, whole, _use_new_zipfile_serialization=as_zip)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(weights.BadCheckpoint, match="empty|cut short"):
        weights.load_checkpoint(cut)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=64))
def test_any_other_bytes_are_a_bad_checkpoint(data, tmp_path):
    (tmp_path / "bytes.pt").write_bytes(data)
    with pytest.raises(weights.BadCheckpoint):
        weights.load_checkpoint(tmp_path / "bytes.pt")


def test_other_files_that_parse_are_refused_for_what_they_are(tmp_path, esm2_file, esm_if1_file, edited):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"embeddings.weight": torch.ones(2)}, tmp_path / "state.pt")
    with open(tmp_path / "pickle.pt", "wb") as stream:
        pickle.dump({"a": 1}, stream, protocol=2)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme", "hello")

    def esm1b(checkpoint):
        checkpoint["args"].arch = "roberta_large"

    for path, reason in [
        (tmp_path / "list.pt", "holds a list"),
        (tmp_path / "state.pt", "keys .*embeddings.weight"),
        (tmp_path / "pickle.pt", "another kind"),
        (tmp_path / "zip.pt", "another kind"),
        (esm_if1_file, "is ESM-IF1: wanted an ESM-2"),
        (edited(esm_if1_file, esm1b), "roberta_large.*: wanted an ESM-2"),
    ]:
        with pytest.raises(weights.BadCheckpoint, match=reason):
            load_esm2(str(path))
    with pytest.raises(weights.BadCheckpoint, match="is ESM-2: wanted an ESM-IF1"):
        load_esm_if1(str(esm2_file))


EMBED = "encoder.sentence_encoder.embed_tokens.weight"
LAST_LAYER = "encoder.sentence_encoder.layers.1."


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c["model"].pop(EMBED), "embed_tokens.weight is missing"),
        (lambda c: c["model"].pop(LAST_LAYER + "self_attn.rot_emb.inv_freq"), "rot_emb.inv_freq is missing"),
        (lambda c: c["model"].update({EMBED: torch.ones(3, 4)}), r"shape \(3, 4\), wanted \(33, 64\)"),
        (lambda c: vars(c["cfg"]["model"]).update(encoder_layers=1), "layers.1.* is not part of the model"),
        (lambda c: vars(c["cfg"]["model"]).update(encoder_layers=3), "layers.2.* is missing"),
        (lambda c: vars(c["cfg"]["model"]).pop("token_dropout"), r"token_dropout = 'missing' \(wanted bool\)"),
        (lambda c: vars(c["cfg"]["model"]).update(encoder_layers="2"), r"encoder_layers = '2' \(wanted int\)"),
        (lambda c: c.pop("model"), "no weights"),
    ],
)
def test_an_esm2_file_that_does_not_fit_says_why(edited, esm2_file, change, reason):
    with pytest.raises(weights.BadCheckpoint, match=reason):
        load_esm2(edited(esm2_file, change))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c["model"].pop("encoder.gvp_encoder.W_v.0.wh.weight"), "embed_node.0.wh.weight is missing"),
        (lambda c: c["model"].update({"encoder.extra": torch.ones(1)}), "extra is not part of the model"),
        (lambda c: vars(c["args"]).update(gvp_node_hidden_dim_scalar=16), "has shape"),
        (lambda c: vars(c["args"]).pop("gvp_top_k_neighbors"), "gvp_top_k_neighbors = 'missing'"),
    ],
)
def test_an_esm_if1_file_that_does_not_fit_says_why(edited, esm_if1_file, change, reason):
    with pytest.raises(weights.BadCheckpoint, match=reason):
        load_esm_if1(edited(esm_if1_file, change))


def test_only_the_parts_used_must_be_there(edited, esm2_file, esm_if1_file, make_protein):
    """The heads and the decoder give nothing to the rows: a file without them serves, and one with a contact head."""

    def drop(prefix):
        def change(checkpoint):
            for name in [name for name in checkpoint["model"] if name.startswith(prefix)]:
                del checkpoint["model"][name]

        return change

    protein = make_protein(12)
    for load, file, prefix in ((load_esm2, esm2_file, "encoder.lm_head"), (load_esm_if1, esm_if1_file, "decoder.")):
        whole, part = load(str(file)), load(edited(file, drop(prefix)))
        assert torch.equal(whole.encode([protein])[0], part.encode([protein])[0])
    contact = {"encoder.sentence_encoder.contact_head.regression.bias": torch.zeros(1)}
    assert load_esm2(edited(esm2_file, lambda c: c["model"].update(contact))).width == 64
