"""What the fast forwards are made of: attention within each protein, linear maps, packs."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.encoders import packed
from proteingpt.encoders.packed import Segments, attend, linear, packs

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def softmax_attention(q, k, v, lengths):
    """Written out in float64, with a mask of who may see whom."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    q, k, v = (x.cpu().double().transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(owner[:, None] != owner[None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_rows_attend_to_their_own_protein_only(device, dtype, tolerance):
    lengths = [3, 1, 70, 129, 2]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 4, 16, generator=generator).to(device, dtype) for _ in range(3))
    found = attend(2 * q, k, v, Segments.of(lengths, torch.device(device)))
    assert found.shape == q.shape and found.dtype == dtype
    assert (found.cpu().double() - softmax_attention(2 * q, k, v, lengths)).abs().max() < tolerance


def test_segments_by_hand():
    segments = Segments.of([2, 3], torch.device("cpu"))
    assert segments.lengths == (2, 3)
    assert segments.offsets.tolist() == [0, 2, 5] and segments.offsets.dtype == torch.int32
    assert segments.positions.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("by_onednn", [True, False])
def test_linear_maps_by_either_library(activation, by_onednn, monkeypatch):
    """Against float64 and the formulas; several shapes, with and without a bias, nothing at all."""
    monkeypatch.setattr(packed, "_ONEDNN", by_onednn and packed._ONEDNN)
    formula = {
        "none": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    }[activation]
    generator = torch.Generator().manual_seed(0)
    for shape, num_out in (((7, 5), 3), ((1, 513), 64), ((40, 3, 33), 17), ((0, 5), 3)):
        x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (num_out, shape[-1]), (num_out,)))
        for offset in (bias, None):
            found = linear(x, weight, offset, activation)
            wanted = formula(x.double() @ weight.double().T + (0 if offset is None else offset.double()))
            assert found.shape == wanted.shape and torch.allclose(found.double(), wanted, atol=2e-5)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=40), most=st.integers(1, 60))
def test_packs_hold_every_protein_once_in_order_and_no_more_than_fits(lengths, most):
    found = list(packs(lengths, most))
    assert [index for pack in found for index in pack] == list(range(len(lengths)))
    assert all(pack and (sum(lengths[i] for i in pack) <= most or len(pack) == 1) for pack in found)


def test_the_fast_backend_runs_without_fair_esm_and_graph_libraries(esm2_file, esm_if1_file):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['esm', 'torch_geometric', 'torch_scatter', 'biotite']))\n"
        "import numpy as np\n"
        "from proteingpt.encoders import load_esm2, load_esm_if1\n"
        "from proteingpt.protein import Protein\n"
        "protein = Protein('p', 'A', 'MKV', np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32))\n"
        "print(*(load(path).encode([protein])[0].shape[0] for load, path in\n"
        "        zip((load_esm2, load_esm_if1), sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(esm2_file), str(esm_if1_file)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["5", "5"], done.stderr
