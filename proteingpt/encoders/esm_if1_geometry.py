"""What ESM-IF1 sees of a backbone: dihedrals, directions, and a graph of nearest neighbours, all in float32.

N rows of all proteins in a pack (residues, and a BOS and EOS row each), E edges, T rows of one protein.

Proteins lie end to end, and no feature needs to know where one ends: those that look at the next or the last residue
meet a BOS or EOS row there, whose coordinates are zero, as in fair-esm the ends of a chain do. Only neighbours are
searched protein by protein. Vectors have the axis of x, y, z before that of the channels, so that a linear map of the
channels is one matrix product.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from proteingpt.encoders.packed import Segments

_EPS = 1e-8
# Distances computed at once, in the search for neighbours: 4 bytes each, three times over.
_MAX_PAIRS = 2**20
# fair-esm's distance of a pair that lacks coordinates, in angstrom, and what it adds for each residue in between.
_MISSING_DISTANCE, _MISSING_STEP = 1e8, 1e6
NUM_BINS = 16
_MAX_DISTANCE = 20.0


class Graph(NamedTuple):
    """Edges from `source` to `target`, int64 (E,) row numbers in the pack, ordered by target; both ends resolved.

    distance: float32 (E,) angstrom. counts: int64 (N,) edges into each row, on the CPU.
    """

    source: torch.Tensor
    target: torch.Tensor
    distance: torch.Tensor
    counts: np.ndarray


def length_of(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Euclidean length along `dim` as fair-esm smooths it, sqrt(sum + 1e-8)."""
    return x.square().sum(dim).add_(_EPS).sqrt_()


def direction(x: torch.Tensor) -> torch.Tensor:
    """x (..., 3) over its length; of zeros, zeros."""
    return x / length_of(x).unsqueeze(-1)


def rbf(x: torch.Tensor, highest: float) -> torch.Tensor:
    """Radial basis functions of x at 16 centres from 0 to `highest`: (...,) -> (..., 16)."""
    centres = torch.linspace(0.0, highest, NUM_BINS).to(x.device)
    return torch.exp(-(((x.unsqueeze(-1) - centres) / (highest / NUM_BINS)) ** 2))


def dihedrals(coords: torch.Tensor, unit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """coords (N, 3, 3) -> (N, 6): cosines, then sines, of phi, psi and omega. `unit` normalises vectors (..., 3).

    Where an end of a chain leaves an angle undefined it is 0.
    """
    bonds = unit(coords.flatten(0, 1).diff(dim=0))
    normals = unit(torch.linalg.cross(bonds[:-1], bonds[1:], dim=-1))
    cosine = (normals[:-1] * normals[1:]).sum(-1).clamp(-1 + 1e-7, 1 - 1e-7)
    angle = torch.sign((bonds[:-2] * normals[1:]).sum(-1)) * cosine.acos()
    angles = F.pad(angle, (1, 2)).view(-1, 3)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def node_vectors(coords: torch.Tensor) -> torch.Tensor:
    """coords (N, 3, 3) -> (N, xyz, 3): directions to the next and to the last CA, and towards the side chain."""
    n, alpha, c = coords.unbind(1)
    steps = direction(alpha.diff(dim=0))
    forward, backward = F.pad(steps, (0, 0, 0, 1)), F.pad(-steps, (0, 0, 1, 0))
    c, n = direction(c - alpha), direction(n - alpha)
    across = direction(torch.linalg.cross(c, n, dim=-1))
    # Where an ideal CB would be, from the bisector of C and N and the normal of their plane.
    side_chain = -direction(c + n) * math.sqrt(1 / 3) - across * math.sqrt(2 / 3)
    return torch.stack((forward, backward, side_chain), dim=-1)


def frames(coords: torch.Tensor) -> torch.Tensor:
    """coords (N, 3, 3) -> (N, 3 axes, xyz): the local frame of each residue, first axis from CA to C."""
    n, alpha, c = coords.unbind(1)
    first = direction(c - alpha)
    to_n = n - alpha
    second = direction(to_n - first * (first * to_n).sum(-1, keepdim=True))
    return torch.stack((first, second, torch.linalg.cross(first, second, dim=-1)), dim=1)


def neighbours(
    alpha: torch.Tensor, resolved: torch.Tensor, num_resolved: int, num_neighbours: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source, target, distance) of the edges from each resolved residue to its nearest, itself among them.

    alpha (T, 3), resolved bool (T,). All rows are in the search, as in fair-esm, so that ties fall the same way.
    """
    rows = resolved.nonzero().squeeze(1)
    positions = torch.arange(len(alpha), device=alpha.device)
    num_searched = min(num_neighbours, len(alpha))
    # Nearest first, and what lacks coordinates is farther than all else: so the edges to keep come first.
    num_kept = min(num_searched, num_resolved)
    found = []
    for part in rows.split(max(1, _MAX_PAIRS // len(alpha))):
        distance = length_of(alpha.unsqueeze(0) - alpha[part].unsqueeze(1))
        apart = (positions - part.unsqueeze(1)).abs() * _MISSING_STEP + _MISSING_DISTANCE
        nearest, index = torch.where(resolved, distance, apart).topk(num_searched, largest=False)
        found.append((nearest[:, :num_kept], index[:, :num_kept]))
    if not found:
        return positions[:0], positions[:0], alpha.new_zeros(0)
    distance, target = (torch.cat(parts) for parts in zip(*found))
    return rows.repeat_interleave(num_kept), target.flatten(), distance.flatten()


def build_graph(coords: torch.Tensor, resolved: np.ndarray, segments: Segments, num_neighbours: int) -> Graph:
    """coords (N, 3, 3) with zeros where `resolved`, bool (N,), is false."""
    edges, start = [], 0
    for length in segments.lengths:
        part = resolved[start : start + length]
        mask = torch.from_numpy(part).to(coords.device)
        source, target, distance = neighbours(
            coords[start : start + length, 1], mask, int(part.sum()), num_neighbours
        )
        edges.append((source + start, target + start, distance))
        start += length
    source, target, distance = (torch.cat(parts) for parts in zip(*edges))
    target, order = target.sort(stable=True)
    counts = torch.bincount(target, minlength=len(coords)).cpu().numpy()
    return Graph(source[order], target, distance[order], counts)


def edge_scalars(graph: Graph, frequencies: torch.Tensor) -> torch.Tensor:
    """(E, 34): distance, separation in sequence (source minus target), and two flags that no kept edge has set."""
    angles = (graph.source - graph.target).unsqueeze(-1) * frequencies
    distances = rbf(graph.distance, _MAX_DISTANCE)
    return torch.cat((distances, angles.cos(), angles.sin(), distances.new_zeros(len(distances), 2)), dim=-1)


def edge_vectors(graph: Graph, alpha: torch.Tensor) -> torch.Tensor:
    """(E, xyz, 1): directions from target to source."""
    return direction(alpha[graph.source] - alpha[graph.target]).unsqueeze(-1)


def separation_frequencies() -> torch.Tensor:
    """float32 (8,), as in fair-esm's `_positional_embeddings` of 16 features."""
    return torch.exp(torch.arange(0, 16, 2, dtype=torch.float32) * -(np.log(10000.0) / 16))


def position_frequencies(width: int) -> torch.Tensor:
    """float32 (width / 2,) of the sinusoidal position table."""
    half = width // 2
    return torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
