"""Ways to quantise keys that were tried: there and back in float32, by mx ops.

A head's dims are cut into groups. Each group is rotated and stored as Lloyd-Max codes of its own
bits, under an fp16 norm, as the turbo formats do with one group. What may differ is what the dims
are divided by first, the bits of a group, and what shares a norm: a group, a head, or all heads
of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import mlx.core as mx
import numpy as np

from mlx_turbokv.quant.codebook import boundaries, codebook
from mlx_turbokv.quant.rotation import rotation_matrix

NORM_BITS = 16
EXACT = 16  # bits of a group that is stored as it is
MOST_BITS, MOST_GROUPS = 6, 3
UNIT = 2  # pairs that get the same bits


@dataclass(frozen=True)
class Group:
    """Dims of a head that are rotated together and stored in `bits` bits each; 0 stores none."""

    dims: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class Scheme:
    """How the keys of one layer are stored.

    groups: of each head.
    scales: what the dims are divided by first, [H, head_dim].
    norm: what shares a norm: "group", "head" or "layer".
    """

    groups: tuple[tuple[Group, ...], ...]
    scales: np.ndarray
    norm: str = "group"

    @property
    def bits_per_value(self) -> float:
        """Norms included."""
        n_heads, head_dim = self.scales.shape
        coded = [g for groups in self.groups for g in groups if 0 < g.bits < EXACT]
        norms = {"group": len(coded), "head": n_heads, "layer": 1}[self.norm]
        codes = sum(len(g.dims) * g.bits for groups in self.groups for g in groups)
        return (codes + NORM_BITS * norms) / (n_heads * head_dim)

    def __call__(self, keys: mx.array) -> mx.array:
        """Keys as they read back.

        Shapes: keys and what is returned [B, H, n, head_dim] float32.
        """
        x = keys / mx.array(self.scales[:, None].astype(np.float32))
        raw = None if self.norm == "group" else _rms(x, (1, 3) if self.norm == "layer" else 3)
        heads = []
        for h, groups in enumerate(self.groups):
            shared = raw if raw is None or self.norm == "layer" else raw[:, h : h + 1]
            heads.append([_Coded(x[:, h : h + 1], g, shared) for g in groups])
        if self.norm == "group":
            norms = [[_unbiased([g]) for g in coded] for coded in heads]
        elif self.norm == "head":
            norms = [[_unbiased(coded)] * len(coded) for coded in heads]
        else:
            norms = [[_unbiased(sum(heads, []))] * len(coded) for coded in heads]
        back = [_joined(coded, n) for coded, n in zip(heads, norms)]
        return mx.concatenate(back, axis=1) * mx.array(self.scales[:, None].astype(np.float32))


class _Coded:
    """One group of one head: rotated values and the levels chosen for them."""

    def __init__(self, x: mx.array, group: Group, raw: mx.array | None) -> None:
        self.group, self.width = group, len(group.dims)
        self.given = x[..., mx.array(np.array(group.dims, np.int32))]
        if not 0 < group.bits < EXACT:
            return
        self.rotation = _rotation(self.width)
        self.values = self.given @ self.rotation.T
        raw = _rms(self.values, 3) if raw is None else raw
        normal = self.values / mx.where(raw > 0, raw, mx.inf)
        edges = mx.array(boundaries(group.bits, self.width))
        codes = (normal[..., None] > edges).sum(axis=-1)
        self.levels = mx.array(codebook(group.bits, self.width))[codes]

    def read(self, norm: mx.array) -> mx.array:
        if self.group.bits == 0:
            return mx.zeros_like(self.given)
        if self.group.bits >= EXACT:
            return self.given
        return (self.levels * norm) @ self.rotation


def _unbiased(coded: list[_Coded]) -> mx.array | None:
    """The norm that turbo rows store, over one or several groups: <y, y> / <y, levels>."""
    coded = [g for g in coded if 0 < g.group.bits < EXACT]
    if not coded:
        return None
    energy = sum(mx.square(g.values).sum(axis=-1, keepdims=True) for g in coded)
    product = sum((g.values * g.levels).sum(axis=-1, keepdims=True) for g in coded)
    return mx.where(energy == 0, 0, energy / product).astype(mx.float16).astype(mx.float32)


def _joined(coded: list[_Coded], norms: list[mx.array | None]) -> mx.array:
    """A head's dims in their own order."""
    back = mx.concatenate([g.read(n) for g, n in zip(coded, norms)], axis=-1)
    place = np.argsort(np.concatenate([g.group.dims for g in coded]))
    return back[..., mx.array(place.astype(np.int32))]


def _rms(x: mx.array, axes) -> mx.array:
    return mx.sqrt(mx.square(x).mean(axis=axes, keepdims=True))


@cache
def _rotation(width: int) -> mx.array:
    """turbo's own where there is one for the width, else a random orthogonal matrix."""
    try:
        return mx.array(rotation_matrix(width))
    except ValueError:
        made, _ = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))
        return mx.array(made.astype(np.float32))


def uniform(bits: int, n_heads: int, head_dim: int, scales=None, norm="head", width=None) -> Scheme:
    """Every head in groups of `width` dims of the same bits; the whole head by default."""
    width = width or head_dim
    groups = tuple(
        Group(tuple(range(first, first + width)), bits) for first in range(0, head_dim, width)
    )
    return Scheme(
        (groups,) * n_heads, np.ones((n_heads, head_dim)) if scales is None else scales, norm
    )


@cache
def distortion(bits: int, width: int = 64) -> float:
    """The share of a rotated group's energy that its codes miss."""
    if bits == 0:
        return 1.0
    x = np.random.default_rng(0).standard_normal((20_000, width))
    x *= np.sqrt(width) / np.linalg.norm(x, axis=1, keepdims=True)
    near = codebook(bits, width)[np.searchsorted(boundaries(bits, width), x)]
    return float(np.mean(np.square(x - near)))


def allocated(
    query_energy: np.ndarray, key_energy: np.ndarray, bits: float, scaled: bool, shared: bool
) -> tuple[list[tuple[np.ndarray, int]], float]:
    """Bits for the pairs of one head, as few groups as pay, at the bits of one turbo group.

    Block-wise allocation by energy (arXiv 2606.24033), solved by trying every cut: pairs are
    sorted by energy, cut into at most MOST_GROUPS runs, and each run gets its own bits. What is
    made small is the expected squared error of a score.

    Args:
        query_energy, key_energy: mean energy in each pair.
        bits: codes of one turbo group; its norm comes on top, and so do the norms of groups.
        scaled: pairs of a group are divided by (key energy / query energy) ** 1/4 first.
        shared: one norm for all groups, at a ratio that calibration fixes.

    Shapes: query_energy and key_energy [pairs].
    Returns: (pairs, bits) of each group, and the error over that of one group unscaled.
    """
    best: tuple[float, list] = (np.inf, [])
    n_units = len(key_energy) // UNIT
    one = distortion(int(bits)) * query_energy.sum() * key_energy.sum() / (2 * len(key_energy))
    for order in (np.argsort(-query_energy * key_energy), np.argsort(-key_energy)):
        q, k = query_energy[order], key_energy[order]
        sums = {name: np.concatenate([[0], np.cumsum(x)]) for name, x in
                (("q", q), ("k", k), ("root", np.sqrt(q * k)), ("product", q * k))}  # fmt: skip
        for n_groups in range(1, MOST_GROUPS + 1):
            for inner in combinations(range(1, n_units), n_groups - 1):
                cuts = np.array([0, *inner, n_units]) * UNIT
                parts = {name: np.diff(x[cuts]) for name, x in sums.items()}
                widths = 2 * np.diff(cuts)
                each = parts["root"] ** 2 if scaled else parts["q"] * parts["k"]
                choices = _choices(n_groups)
                norms = 1 if shared else np.count_nonzero(choices, axis=1)
                fits = choices @ widths + NORM_BITS * norms <= 2 * len(k) * bits + NORM_BITS
                missed = np.where(choices == 0, parts["product"] / 2, each / widths)
                totals = np.where(fits, (missed * _distortions()[choices]).sum(axis=1), np.inf)
                at = int(np.argmin(totals))
                if totals[at] < best[0]:
                    runs = [order[a:b] for a, b in zip(cuts[:-1], cuts[1:])]
                    best = float(totals[at]), list(zip(runs, choices[at].tolist()))
    return best[1], best[0] / one


@cache
def _choices(n_groups: int) -> np.ndarray:
    """Falling bits of a number of groups: [choices, n_groups]."""
    return np.array([c[::-1] for c in combinations(range(MOST_BITS + 1), n_groups)])


@cache
def _distortions() -> np.ndarray:
    return np.array([distortion(b) for b in range(MOST_BITS + 1)])
