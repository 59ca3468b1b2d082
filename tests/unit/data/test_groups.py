"""What all order in an epoch comes from: hashes that no library can change, and fingerprints that tell inputs apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.groups import fingerprint, hash_keys, mix

# ------------------------------------------------------------------------------------------------------------- mix


def splitmix64(state: int, number: int) -> list[int]:
    """The reference generator (Vigna's splitmix64.c) in Python integers."""
    outputs = []
    for _ in range(number):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


# Published outputs of splitmix64 with seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_unseeded_it_is_splitmix64():
    assert splitmix64(1234567, 5) == PUBLISHED
    states = [(1234567 + n * 0x9E3779B97F4A7C15) % 2**64 for n in range(5)]
    assert mix(np.array(states, np.uint64)).tolist() == PUBLISHED


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**40), max_size=3))
def test_each_seed_is_one_more_round_that_starts_elsewhere(value, seeds):
    state = value
    for seed in (*seeds, 0):
        # 2 * seed golden steps on; the reference takes one more by itself.
        state = splitmix64((state + 2 * seed * 0x9E3779B97F4A7C15) % 2**64, 1)[0]
    assert mix(np.array([value], np.uint64), *seeds).tolist() == [state]


def test_stored_hashes():
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    stored = [909140996058378746, 895922513266348529, 9145051384581628249, 10435787699283145447]
    assert mix(values, 42, 0, 1).tolist() == stored
    # python -c 'import hashlib; print(int.from_bytes(hashlib.blake2b(b"1cbs_A", digest_size=8).digest(), "little"))'
    assert hash_keys(["1cbs_A", "4hhb_B"]).tolist() == [9525869841353725312, 7179624607032906335]


def test_hashing_leaves_its_input_alone():
    values = np.arange(4, dtype=np.uint64)
    mix(values, 1)
    assert values.tolist() == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------- fingerprint


PARTS = (np.array([1, 2]), np.array([3, 4]), [5, 6], (42, 128, 8, 30))


@pytest.mark.parametrize(
    "changed",
    [
        (np.array([1, 3]), *PARTS[1:]),
        (np.array([2, 1]), *PARTS[1:]),
        (PARTS[0], np.array([3, 5]), *PARTS[2:]),
        (*PARTS[:2], [5, 7], PARTS[3]),
        (*PARTS[:2], [5], PARTS[3]),
        (*PARTS[:3], (43, 128, 8, 30)),
        (PARTS[1], PARTS[0], *PARTS[2:]),
        PARTS[:3],
    ],
)
def test_a_fingerprint_changes_with_each_of_its_parts(changed):
    assert fingerprint(*changed) != fingerprint(*PARTS)
    assert fingerprint(*changed) == fingerprint(*changed)


arrays = st.lists(st.integers(0, 2), max_size=4)


@given(st.lists(arrays, max_size=3), st.lists(arrays, max_size=3))
def test_fingerprints_are_equal_only_for_equal_parts(one, other):
    """Where a part ends counts: [1, 0] beside [] is not [1] beside [0]."""
    prints = [fingerprint(*(np.array(part, np.int64) for part in parts)) for parts in (one, other)]
    assert (prints[0] == prints[1]) == (one == other)


def test_fingerprints_tell_where_a_part_ends():
    def of(*parts):
        return fingerprint(*(np.array(part, np.int64) for part in parts))

    assert of([1, 0], []) != of([1], [0])
