"""The shim lets fair-esm be imported and leaves no trace; the module sizes are those of the published models."""

import importlib.util
import sys
import types
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.encoders import fair_esm


def test_no_stand_in_is_left_behind():
    """Others ask `find_spec` or the biotite module what is installed, and must get the true answer."""
    package = fair_esm.inverse_folding()
    assert package.util.CoordBatchConverter and package.gvp_transformer.GVPTransformerModel
    for name in ("torch_scatter", "torch_geometric"):
        if importlib.util.find_spec(name) is None:
            assert not [module for module in sys.modules if module.split(".")[0] == name]
    structure = sys.modules["biotite.structure"]
    assert hasattr(structure, "filter_peptide_backbone")
    assert not hasattr(structure, "filter_backbone")


def test_another_package_named_esm_is_called_that(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "esm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "esm", types.ModuleType("esm"))
    with pytest.raises(ImportError, match="pip uninstall esm"):
        fair_esm.esm.__wrapped__()


class SumOfEnds(fair_esm.MessagePassing):
    def message(self, s_i, v_i, s_j, v_j, edge_attr):
        return torch.cat((10 * s_i + s_j, v_j - v_i, edge_attr), dim=1)


def test_messages_go_from_source_to_target_and_are_averaged():
    """By hand: edges 0->1, 2->1 and 1->0; node 2 has none coming in."""
    s, v = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [5.0]])
    edges, attributes = torch.tensor([[0, 2, 1], [1, 1, 0]]), torch.tensor([[1.0], [2.0], [7.0]])
    got = SumOfEnds("mean").propagate(edges, s=s, v=v, edge_attr=attributes)
    assert got.tolist() == [[12.0, 0.0, 7.0], [22.5, 2.0, 1.5], [0.0, 0.0, 0.0]]


def test_scatter_add_counts_edges_by_node():
    index = torch.tensor([2, 0, 2])
    assert fair_esm._scatter_add(torch.ones_like(index), index, dim_size=4).tolist() == [1, 0, 2, 0]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_esm2_3b_has_the_published_number_of_parameters():
    cfg = Namespace(encoder_layers=36, encoder_embed_dim=2560, encoder_attention_heads=40, token_dropout=True)
    module = fair_esm.build_esm2(cfg)
    assert count(module) == 2_839_005_634
    assert module.embed_tokens.weight.is_meta and module.embed_dim == 2560


def test_esm_if1_has_the_published_number_of_parameters():
    args = Namespace(
        encoder_embed_dim=512, encoder_ffn_embed_dim=2048, encoder_attention_heads=8, encoder_layers=8,
        decoder_embed_dim=512, decoder_ffn_embed_dim=2048, decoder_attention_heads=8, decoder_layers=8,
        dropout=0.1, attention_dropout=0.1, gvp_dropout=0.1, gvp_top_k_neighbors=30, gvp_num_encoder_layers=4,
        gvp_node_hidden_dim_scalar=1024, gvp_node_hidden_dim_vector=256,
        gvp_edge_hidden_dim_scalar=32, gvp_edge_hidden_dim_vector=1,
    )  # fmt: skip
    assert count(fair_esm.build_esm_if1(args)) == 141_662_150
    assert count(fair_esm.build_esm_if1_encoder(args)) == 107_993_030


@given(lengths=st.lists(st.integers(1, 300), max_size=40), max_positions=st.integers(1, 1000))
def test_batches_hold_each_index_once_within_bounds(lengths, max_positions):
    batches = fair_esm.padded_batches(lengths, max_positions, min_fill=0.75)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_positions
        assert min(lengths[index] for index in batch) >= 0.75 * longest


def test_proteins_of_one_length_share_batches():
    assert fair_esm.padded_batches([10] * 7, max_positions=30) == [[0, 1, 2], [3, 4, 5], [6]]
