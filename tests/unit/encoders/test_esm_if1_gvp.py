"""Message passing in chunks of edges: every edge once, in a fixed order, and memory that grows with the residues
only."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.demo.encoders import write_tiny_esm_if1
from proteingpt.encoders import load_esm_if1
from proteingpt.encoders.esm_if1_gvp import chunks_of, sum_segments
from proteingpt.training.capacity import of_process, peak_of


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=60), most=st.integers(1, 100))
def test_chunks_cover_all_nodes_once_and_hold_no_more_edges_than_said(counts, most):
    runs = list(chunks_of(np.array(counts), most))
    assert [node for first, end in runs for node in range(first, end)] == list(range(len(counts)))
    assert all(sum(counts[first:end]) <= most or end - first == 1 for first, end in runs)


def test_sums_over_runs_of_edges_by_hand():
    """The way taken on a GPU, where adding by index has no fixed order."""
    values = torch.arange(12.0).view(6, 2)
    found = sum_segments(values, torch.tensor([0, 2, 1, 0, 3]))
    assert found.tolist() == [[0, 0], [2, 4], [4, 5], [0, 0], [24, 27]]
    cubes = torch.arange(24.0).view(4, 2, 3)
    assert torch.equal(sum_segments(cubes, torch.tensor([1, 3]))[1], cubes[1:].sum(0))


@pytest.mark.nightly
def test_memory_is_linear_in_residues_and_at_most_half_a_gigabyte_at_a_thousand(tmp_path, make_protein):
    """At the published widths; with one layer of each kind, since nothing that a layer takes outlives it. The process's
    own peak, over the weights."""
    size = dict(
        num_layers=1,
        width=512,
        num_heads=8,
        num_gvp_layers=1,
        node_dims=(1024, 256),
        edge_dims=(32, 1),
        num_neighbors=30,
    )
    encoder = load_esm_if1(str(write_tiny_esm_if1(tmp_path / "wide.pt", **size)))
    encoder.encode([make_protein(40)])

    def bytes_for(length: int) -> float:
        protein = make_protein(length)
        ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would hide a new peak
        before = of_process("VmRSS")
        return peak_of(lambda: encoder.encode([protein]), torch.device("cpu")) - before

    one, two = bytes_for(1000), bytes_for(2000)
    assert 0.05e9 < one < 0.5e9 and two < 2.2 * one  # the square would be four times as much
