"""The pair of encoders, and the one that remembers rows."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proteingpt.config import ConfigError, EncodersConfig
from proteingpt.encoders.esm2 import load_esm2
from proteingpt.encoders.esm_if1 import load_esm_if1
from proteingpt.encoders.pair import Encoders, Remembering, num_encoders
from proteingpt.encoders.weights import WeightsNotFound


@pytest.fixture(scope="module")
def config(esm2_file, esm_if1_file):
    return EncodersConfig(esm2=str(esm2_file), esm_if1=str(esm_if1_file), dtype="float32")


@pytest.fixture(scope="module")
def encoders(config):
    return Encoders.load(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def proteins(make_protein):
    """Five, of different lengths and keys."""
    return [dataclasses.replace(make_protein(length, seed=length), id=f"p{length}") for length in (5, 9, 3, 12, 7)]


class Counting:
    """Passes everything on, and counts what it is asked for."""

    def __init__(self, encoders):
        self.encoders, self.asked = encoders, Counter()

    def encode(self, proteins):
        self.asked.update(protein.key for protein in proteins)
        return self.encoders.encode(proteins)


def assert_equal_rows(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def alone(encoders, proteins):
    pairs = [encoders.encode([protein]) for protein in proteins]
    return [structure for (structure,), _ in pairs], [sequence for _, (sequence,) in pairs]


def test_structure_rows_are_from_esm_if1_and_sequence_rows_from_esm2(encoders, proteins, esm2_file, esm_if1_file):
    options = {"weights_dir": ".", "device": torch.device("cpu"), "dtype": torch.float32}
    structure, sequence = encoders.encode_together(proteins)
    assert_equal_rows((structure,), (load_esm_if1(str(esm_if1_file), **options).encode(proteins),))
    assert_equal_rows((sequence,), (load_esm2(str(esm2_file), **options).encode(proteins),))
    assert [len(rows) for rows in structure] == [len(rows) for rows in sequence] == [len(p) + 2 for p in proteins]


def test_rows_do_not_depend_on_the_other_proteins_to_the_bit(encoders, proteins):
    """Packed into one forward they would, in the last bits: so what a pack shares, what a resumed run has met before,
    and what a cache was made with would show in the losses."""
    wanted = alone(encoders, proteins)
    assert_equal_rows(encoders.encode(proteins), wanted)
    assert_equal_rows(encoders.encode(proteins[::-1]), tuple(part[::-1] for part in wanted))
    for ours, theirs in zip(encoders.encode_together(proteins), wanted):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_an_encoder_that_is_left_out_has_no_rows_and_no_weights(config, proteins):
    for left_out, kept, width in (("esm2", "structure", 64), ("esm_if1", "sequence", 64)):
        only = dataclasses.replace(config, **{left_out: "none"})
        Encoders.find(only)
        encoders = Encoders.load(only, torch.device("cpu"))
        rows = dict(zip(("structure", "sequence"), encoders.encode(proteins)))
        assert [r.shape for r in rows.pop(kept)] == [(len(p) + 2, width) for p in proteins]
        (absent,) = rows.values()
        assert [r.shape for r in absent] == [(0, 0)] * len(proteins) and num_encoders(encoders) == 1
    with pytest.raises(ConfigError, match="at least one encoder"):
        dataclasses.replace(config, esm2="none", esm_if1="none")


def test_the_layer_is_a_setting(config, proteins, esm2_file):
    inner = Encoders.load(dataclasses.replace(config, esm2_layer=1), torch.device("cpu"))
    wanted = load_esm2(str(esm2_file), layer=1).encode(proteins[:1])
    assert_equal_rows((inner.encode(proteins[:1])[1],), (wanted,))
    assert not torch.equal(wanted[0], load_esm2(str(esm2_file)).encode(proteins[:1])[0])


def test_the_backend_is_that_of_the_settings_and_the_fast_one_without(config, encoders, proteins):
    """Both give the same rows, by other models."""
    by_fair_esm = Encoders.load(SimpleNamespace(**{**vars(config), "backend": "reference"}), torch.device("cpu"))
    for ours, theirs in ((encoders.structure, by_fair_esm.structure), (encoders.sequence, by_fair_esm.sequence)):
        assert not hasattr(ours.model, "module") and isinstance(theirs.model.module, torch.nn.Module)
        for found, wanted in zip(ours.encode(proteins), theirs.encode(proteins), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)


def test_a_setting_that_is_missing_or_wrong_is_named_and_nothing_is_loaded(tmp_path, config):
    with pytest.raises(ConfigError, match="encoders.esm_if1 is not set"):
        Encoders.find(dataclasses.replace(config, esm_if1=None))
    with pytest.raises(WeightsNotFound):
        Encoders.find(dataclasses.replace(config, esm2=str(tmp_path / "none.pt")))
    Encoders.find(config)


def test_remembered_rows_are_the_rows_and_are_computed_once(encoders, proteins):
    counting = Counting(encoders)
    remembering = Remembering(counting, 2**20)
    wanted = remembering.encode(proteins)
    assert_equal_rows(remembering.encode(proteins), wanted)
    assert_equal_rows(remembering.encode(proteins[::-1]), tuple(rows[::-1] for rows in wanted))
    assert counting.asked == Counter(protein.key for protein in proteins)


def test_rows_come_in_the_order_asked_with_repeats(encoders, proteins):
    """Some kept, some new, some twice in one call."""
    counting = Counting(encoders)
    remembering = Remembering(counting, 2**20)
    remembering.encode(proteins[1:3])
    a, b, c, d, e = proteins
    asked = [d, b, a, d, c, b, e, a]
    structure, sequence = remembering.encode(asked)
    assert [len(rows) for rows in structure] == [len(rows) for rows in sequence] == [len(p) + 2 for p in asked]
    wanted = alone(encoders, asked)
    for found, expected in zip((structure, sequence), wanted):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected))
    assert set(counting.asked.values()) == {1}


def test_no_proteins_give_no_rows(encoders):
    assert Remembering(encoders, 2**20).encode([]) == ([], [])


def test_it_never_keeps_more_than_its_bytes_and_forgets_the_longest_unused(encoders, proteins):
    sizes = {p.key: sum(rows[0].nbytes for rows in encoders.encode([p])) for p in proteins}
    a, b, c, _, e = proteins
    counting = Counting(encoders)
    remembering = Remembering(counting, sizes[a.key] + sizes[b.key] + sizes[c.key])
    for protein in (a, b, c, a):  # full; b has now been unused the longest
        remembering.encode([protein])
    remembering.encode([c])
    assert set(remembering.kept) == {a.key, b.key, c.key}
    remembering.encode([e])  # shorter than b, so that b's place is enough
    assert set(remembering.kept) == {a.key, c.key, e.key}
    assert kept_bytes(remembering) == remembering.num_bytes <= remembering.max_bytes


def test_one_that_can_keep_nothing_still_answers(encoders, proteins):
    counting = Counting(encoders)
    forgetful = Remembering(counting, 1)
    assert_equal_rows(forgetful.encode([*proteins, proteins[0]]), encoders_of(encoders, [*proteins, proteins[0]]))
    forgetful.encode(proteins)
    assert not forgetful.kept and forgetful.num_bytes == 0
    assert set(counting.asked.values()) == {2}


def encoders_of(encoders, proteins):
    """Each protein once in the batch, as it is asked of the encoders, so that equal means to the bit."""
    unique = {protein.key: protein for protein in proteins}
    structure, sequence = encoders.encode(list(unique.values()))
    place = {key: number for number, key in enumerate(unique)}
    return [structure[place[p.key]] for p in proteins], [sequence[place[p.key]] for p in proteins]


def kept_bytes(remembering) -> int:
    """Memory really held, by storage: a view of a batch would hold the whole batch."""
    storages = {
        rows.untyped_storage().data_ptr(): rows.untyped_storage().nbytes()
        for pair in remembering.kept.values()
        for rows in pair
    }
    return sum(storages.values())


@pytest.mark.parametrize("num_calls", [1, 5])
def test_the_bytes_counted_are_the_bytes_held(encoders, proteins, num_calls):
    """Encoded in one call or one by one."""
    remembering = Remembering(encoders, 2**20)
    for some in np.array_split(np.arange(len(proteins)), num_calls):
        remembering.encode([proteins[i] for i in some])
    assert len(remembering.kept) == len(proteins)
    assert kept_bytes(remembering) == remembering.num_bytes
