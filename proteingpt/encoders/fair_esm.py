"""fair-esm's own modules, made importable: the one place that knows what fair-esm 2.0.0 needs and no longer finds.

Its inverse-folding package imports torch_scatter and torch_geometric, of which this path uses one mean over incoming
edges, and a biotite function that has been renamed. Stand-ins are there only while that package is imported and only
for what is absent; afterwards sys.modules and biotite are as they were.
"""

import importlib
import importlib.util
import sys
import types
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

# `Alphabet.from_architecture` names: ESM-2 shares ESM-1b's letters.
ESM2_ALPHABET = "ESM-1b"
ESM_IF1_ALPHABET = "vt_medium_with_invariant_gvp"


class MessagePassing(nn.Module):
    """The part of torch_geometric's class that fair-esm's GVPConv uses: source to target, mean over incoming edges.

    Subclasses define `message(s_i, v_i, s_j, v_j, edge_attr)`, with j the source and i the target of an edge.
    """

    def __init__(self, aggr: str = "mean"):
        super().__init__()
        assert aggr == "mean", f"ESM-IF1 aggregates by the mean, not by {aggr}"

    def propagate(self, edge_index, s, v, edge_attr):
        """edge_index int64 (2, E) of source and target; s (N, S); v (N, 3 V). Gives (N, M); no edge gives 0."""
        source, target = edge_index
        messages = self.message(s[target], v[target], s[source], v[source], edge_attr)
        total = messages.new_zeros(s.shape[0], messages.shape[1]).index_add_(0, target, messages)
        count = messages.new_zeros(s.shape[0]).index_add_(0, target, messages.new_ones(target.shape[0]))
        return total / count.clamp(min=1).unsqueeze(-1)


def _scatter_add(src, index, dim=-1, out=None, dim_size=None):
    """torch_scatter.scatter_add as fair-esm calls it: for one dimension, counting edges."""
    assert src.dim() == 1 and out is None
    size = dim_size if dim_size is not None else int(index.max()) + 1
    return src.new_zeros(size).index_add_(0, index, src)


def _scatter(*args, **kwargs):
    raise NotImplementedError("fair-esm imports torch_scatter.scatter but never calls it")


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules to put in sys.modules, by name: only those that are not installed."""
    modules = {}
    if importlib.util.find_spec("torch_scatter") is None:
        modules["torch_scatter"] = types.ModuleType("torch_scatter")
        modules["torch_scatter"].scatter_add = _scatter_add
        modules["torch_scatter"].scatter = _scatter
    if importlib.util.find_spec("torch_geometric") is None:
        modules["torch_geometric"] = types.ModuleType("torch_geometric")
        modules["torch_geometric.nn"] = types.ModuleType("torch_geometric.nn")
        modules["torch_geometric.nn"].MessagePassing = MessagePassing
    return modules


@contextmanager
def _importable() -> Iterator[None]:
    """Within it fair-esm's inverse folding can be imported; on leaving, nothing of the stand-ins remains."""
    stand_ins = _stand_ins()
    # By name: biotite is only read here because fair-esm imports it. Its filter_backbone became
    # filter_peptide_backbone in biotite 1.0.
    structure = importlib.import_module("biotite.structure")
    renamed = not hasattr(structure, "filter_backbone")
    sys.modules.update(stand_ins)
    if renamed:
        structure.filter_backbone = structure.filter_peptide_backbone
    try:
        yield
    finally:
        if renamed:
            del structure.filter_backbone
        for name in stand_ins:
            del sys.modules[name]


@cache
def esm() -> types.ModuleType:
    """The package `esm` of fair-esm. ImportError that says so where another package of that name is installed."""
    try:
        package = importlib.import_module("esm")
        importlib.import_module("esm.model.esm2")
        importlib.import_module("esm.pretrained")
    except ImportError as error:
        raise ImportError(
            f"fair-esm cannot be imported ({error}). The PyPI package `esm` has the same import name and must not be "
            "installed beside it: pip uninstall esm, then pip install --force-reinstall fair-esm"
        ) from error
    return package


@cache
def inverse_folding() -> types.ModuleType:
    """fair-esm's package `esm.inverse_folding`, with its submodules."""
    esm()
    with _importable():
        return importlib.import_module("esm.inverse_folding")


@cache
def alphabet(architecture: str):
    """fair-esm's alphabet: `tok_to_idx`, `get_idx(letter)` (unknown letters give `<unk>`), `cls_idx`, `eos_idx`, ..."""
    return esm().Alphabet.from_architecture(architecture)


def build_esm2(cfg: Namespace) -> nn.Module:
    """fair-esm's ESM2 on the meta device. cfg: encoder_layers, encoder_embed_dim, ..., as in the checkpoint."""
    with torch.device("meta"):
        return esm().ESM2(
            num_layers=cfg.encoder_layers,
            embed_dim=cfg.encoder_embed_dim,
            attention_heads=cfg.encoder_attention_heads,
            alphabet=alphabet(ESM2_ALPHABET),
            token_dropout=cfg.token_dropout,
        )


def build_esm_if1(args: Namespace) -> nn.Module:
    """fair-esm's whole GVPTransformerModel, encoder and decoder, on the meta device."""
    with torch.device("meta"):
        return inverse_folding().gvp_transformer.GVPTransformerModel(args, alphabet(ESM_IF1_ALPHABET))


def build_esm_if1_encoder(args: Namespace) -> nn.Module:
    """fair-esm's GVPTransformerEncoder on the meta device. args: the `encoder_*`, `gvp_*` and dropout fields."""
    model, letters = inverse_folding().gvp_transformer.GVPTransformerModel, alphabet(ESM_IF1_ALPHABET)
    with torch.device("meta"):
        embed_tokens = model.build_embedding(args, letters, args.encoder_embed_dim)
        return model.build_encoder(args, letters, embed_tokens)


def padded_batches(lengths: Sequence[int], max_positions: int, min_fill: float = 0.75) -> list[list[int]]:
    """Indices of `lengths`, longest first, cut into batches for fair-esm's padded forward.

    A batch pads to its first member: it has at most `max_positions` padded positions (or one member), and no member
    shorter than `min_fill` of the first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= max_positions and lengths[index] >= min_fill * longest
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
