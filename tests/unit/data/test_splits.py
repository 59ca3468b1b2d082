"""Splits as pure functions: exact shares, whole clusters, and the published numbers."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.splits import (
    SplitError,
    cluster_by_mmseqs,
    clusters_by_entry,
    connect,
    draw_test_clusters,
    draw_test_entries,
    name_mmseqs,
    newest_entries,
    num_test_entries,
    read_clusters,
    read_mmseqs,
    shared_share,
)

names = st.lists(st.text("abcdef0123", min_size=1, max_size=6), unique=True, max_size=40)


def test_the_published_numbers():
    """dataset.json of ProteinGPT: 105,673 to train on and 26,419 held out, of 132,092."""
    assert num_test_entries(132_092, 0.2) == 26_419
    test = draw_test_entries((f"{n:06d}" for n in range(132_092)), 0.2, seed=42)
    assert len(test) == 26_419 and 132_092 - len(test) == 105_673


@pytest.mark.parametrize(
    "num_entries, fraction, wanted",
    [(5, 0.2, 1), (10, 0.3, 3), (10, 0.7, 7), (11, 0.2, 3), (1, 0.2, 0), (0, 0.2, 0), (3, 0.0, 0), (2, 0.99, 1)],
)
def test_the_share_is_counted_in_decimals_and_one_entry_is_always_trained_on(num_entries, fraction, wanted):
    assert num_test_entries(num_entries, fraction) == wanted


@given(names, st.floats(0, 0.99), st.integers(0, 2**31))
def test_the_lot_is_exact_and_does_not_depend_on_the_order(entries, fraction, seed):
    test = draw_test_entries(entries, fraction, seed)
    assert len(test) == num_test_entries(len(entries), fraction) and test <= set(entries)
    assert draw_test_entries(entries[::-1], fraction, seed) == test


def test_another_seed_draws_another_split():
    entries = [f"{n}abc" for n in range(100)]
    assert draw_test_entries(entries, 0.2, 1) != draw_test_entries(entries, 0.2, 2)


def test_an_entry_that_is_added_moves_at_most_one_other():
    entries = [f"{n}abc" for n in range(100)]
    before, after = draw_test_entries(entries, 0.2, 1), draw_test_entries(entries + ["new"], 0.2, 1)
    assert len(before - after) <= 1


def test_the_newest_are_held_out_and_a_bare_year_comes_before_its_days():
    dates = {"a": "2019-03-01", "b": "2019", "c": "2018-12-31", "d": "2019-03-01"}
    assert newest_entries(dates, 0.5) == {"a", "d"}
    assert newest_entries(dates, 0.25) == {"d"}
    assert newest_entries(dates, 0.2, test_from="2019-01-01") == {"a", "d"}


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.sets(st.integers(0, 12), max_size=2), min_size=1),
    st.floats(0, 0.9),
    st.integers(0, 100),
)
def test_no_cluster_is_on_both_sides(clusters, fraction, seed):
    try:
        test = draw_test_clusters(clusters, fraction, seed)
    except SplitError:
        return
    of_test = set().union(*(clusters[name] for name in test))
    of_train = set().union(*(clusters[name] for name in clusters if name not in test))
    assert not of_test & of_train
    assert len(test) <= num_test_entries(len(clusters), fraction)


def test_clusters_fill_the_share_where_single_ones_are_left():
    """60 entries in one cluster and 40 on their own: 20 of the latter are taken, whatever the lot."""
    clusters = {f"big{n}": {0} for n in range(60)} | {f"one{n}": {n + 1} for n in range(40)}
    for seed in range(5):
        test = draw_test_clusters(clusters, 0.2, seed)
        assert len(test) == 20 and all(name.startswith("one") for name in test)


def test_a_single_cluster_cannot_be_split():
    with pytest.raises(SplitError, match="no group .* is as small as 2"):
        draw_test_clusters({f"{n}abc": {0} for n in range(8)}, 0.2, 1)


def test_rcsb_cluster_files(tmp_path):
    path = tmp_path / "clusters.txt"
    path.write_text("1ABC_1 2DEF_2\n1ABC_2\n")
    clusters = read_clusters(path)
    assert clusters["1ABC_1"] == clusters["2DEF_2"] != clusters["1ABC_2"]
    assert clusters_by_entry(clusters) == {"1abc": {0, 1}, "2def": {0}}
    path.write_text("")
    with pytest.raises(SplitError, match="no cluster in it"):
        read_clusters(path)
    with pytest.raises(SplitError, match="cannot be read"):
        read_clusters(tmp_path / "none.txt")


def test_mmseqs_tables_and_its_absence():
    """b is a domain of a; c shares with a but a fifth of either."""
    table = ["a\ta\t1.000\t1.000\n", "a\tb\t0.300\t0.950\n", "a\tc\t0.200\t0.210\n"]
    assert list(read_mmseqs(table)) == [("a", "a"), ("a", "b")]
    groups = connect("abcd", [("a", "b"), ("c", "d"), ("b", "b")])
    assert groups["a"] == groups["b"] != groups["c"] == groups["d"]
    with pytest.raises(SplitError, match="give --clusters FILE .* or install MMseqs2"):
        cluster_by_mmseqs({"a": "ACDEF"}, program="no-such-mmseqs")


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed (Debian: mmseqs2)")
def test_mmseqs_is_named_with_its_version_and_what_it_is_asked():
    version = subprocess.run(["mmseqs", "version"], capture_output=True, text=True).stdout.strip()
    assert name_mmseqs().startswith(f"MMseqs2 {version} easy-search --min-seq-id 0.3 ") and version


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed (Debian: mmseqs2)")
def test_mmseqs_puts_near_copies_and_parts_together():
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQ"
    other = "GSHMASMTGGQQMGRGSEFELRRQACGRTRAPPPPPLRSGCWWNPDYFNEHKLIVTSGAQWPDYKNMCHEFRTLIVGSAQ"
    found = cluster_by_mmseqs({"a": sequence, "b": sequence[:-2] + "AA", "c": other, "d": sequence + other[::-1]})
    assert found["a"] == found["b"] == found["d"] != found["c"]


def test_the_share_of_test_items_that_are_also_trained_on():
    assert shared_share(["x", "x", "y", "z"], ["x", "z", "w"]) == (3, 0.75)
    assert shared_share([], ["x"]) == (0, 0.0)
