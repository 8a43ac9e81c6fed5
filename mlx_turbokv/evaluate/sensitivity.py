"""Sensitivity of each layer's K and V to each format.

One slot (K or V of one KV layer) is changed at a time, everything else stays at the base, and the
divergence from the f16 run is measured over the same windows. Windows are the outer loop, so the
f16 run's distribution is held for one batch of windows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cache.factory import CacheFactory
from ..checked import Kind
from ..errors import InputError
from ..model.caches import own_caches
from ..policy import Protection
from ..policy.protection import DEFAULT_PROTECTION, LEAVE_TOGETHER
from .checkpoint import Journal
from .configuration import layer_list
from .divergence import Reference, check_finite
from .first_piece import FirstPiece
from .windows import batch_logits, targets_of

PARTS = ("k", "v")
GPU_BATCH = 4
Pairs = Sequence[tuple[str, str]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Change:
    """One slot in another format than the base's.

    layer: ordinal of the KV layer.
    part: 0 for K, 1 for V.
    format: the format's name.
    """

    layer: int
    part: int
    format: str

    @property
    def key(self) -> str:
        """Its name in records, such as 3.k.turbo2."""
        return f"{self.layer}.{PARTS[self.part]}.{self.format}"

    def applied(self, base: Pairs) -> list[tuple[str, str]]:
        """The base with this change."""
        pairs, (k, v) = list(base), base[self.layer]
        pairs[self.layer] = (k, self.format) if self.part else (self.format, v)
        return pairs


WINDOWS = Kind(
    "an array of tokens [n_windows, n_ctx], as cut_windows makes it",
    lambda x: isinstance(x, np.ndarray) and x.ndim == 2 and x.size > 0 and x.dtype.kind in "iu",
)


@dataclass(frozen=True)
class Sensitivity:
    """Mean KLD from the f16 run, window by window.

    base: the formats of all layers that are not changed.
    base_kld: of the base itself, [n_windows].
    kld: of the base with one change, [n_windows] each.
    """

    base: list[tuple[str, str]]
    base_kld: np.ndarray
    kld: dict[Change, np.ndarray]

    def added(self, change: Change) -> np.ndarray:
        """What a change adds to the base's KLD, [n_windows]."""
        if self.base[change.layer][change.part] == change.format:
            return np.zeros_like(self.base_kld)
        return self.kld[change] - self.base_kld

    def table(self, formats: Sequence[str]) -> np.ndarray:
        """Mean over windows of what each change adds; infinite where it was not measured.

        Shapes: returns [n_layers, 2, n_formats].
        """

        def mean(change: Change) -> float:
            known = change in self.kld or self.base[change.layer][change.part] == change.format
            return self.added(change).mean() if known else np.inf

        shape = len(self.base), len(PARTS), len(formats)
        slots = product(range(shape[0]), range(shape[1]), formats)
        return np.array([mean(Change(*slot)) for slot in slots]).reshape(shape)

    def predicted(self, pairs: Pairs) -> np.ndarray:
        """The additive prediction of an assignment's KLD, [n_windows]."""
        total = self.base_kld.copy()
        for layer, pair in enumerate(pairs):
            for part, name in enumerate(pair):
                total += self.added(Change(layer, part, name))
        return total


def all_changes(base: Pairs, formats: Sequence[str]) -> list[Change]:
    """Every slot in every format but its own."""
    return [
        Change(layer, part, name)
        for layer, pair in enumerate(base)
        for part in range(len(PARTS))
        for name in formats
        if pair[part] != name
    ]


def check_context(n_ctx: int, protection: Protection) -> None:
    """Raises: InputError where every token of such windows is protected: no format would matter."""
    if not protection.rows_after(n_ctx)[0]:
        raise InputError(
            f"All tokens of windows of {n_ctx} are protected, whatever the formats: give a context "
            f"of at least {protection.recent + LEAVE_TOGETHER} tokens, several times as many for "
            "figures of long texts, or --recent 0."
        )


def default_batch() -> int:
    """Windows at a time: one window of a small model does not fill a GPU."""
    return GPU_BATCH if mx.default_device().type == mx.DeviceType.gpu else 1


def measure(
    model: nn.Module,
    windows: np.ndarray,
    base: Pairs,
    changes: Iterable[Change],
    *,
    backend: str | None = None,
    centre: Any = True,
    batch: int | None = None,
    protection: Protection = DEFAULT_PROTECTION,
    records: Journal | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure changes of a base over windows.

    Args:
        base: the pair of every KV layer that is not changed.
        backend, centre: as `make_prompt_cache` takes them.
        batch: windows at a time; None as `default_batch`.
        protection: the protected tokens, of the base as of every change.
        records: what was measured before is taken from it, what is measured is added to it.
        progress: called with (runs done, all runs, what ran) after each.

    Shapes: windows [n_windows, n_ctx].
    Raises: InputError where logits are not numbers, a format does not fit the model, or every
        token of a window is protected.
    """
    WINDOWS("windows", windows)
    check_context(windows.shape[1], protection)
    base, changes = list(base), list(changes)
    batch = batch or default_batch()
    factory = CacheFactory(model, layer_list(base, "base", protection), backend, centre=centre)
    # A format that does not fit is refused here, before anything is measured.
    makers: dict[str, Callable[[], list]] = {
        c.key: factory.with_policy(layer_list(c.applied(base), c.key, protection)) for c in changes
    }
    if any(name != "f16" for pair in base for name in pair):
        makers = {"base": factory, **makers}
    measurer = _Measurer(model, base, records)
    starts = range(0, len(windows), batch)
    total, found = len(starts) * len(makers), {key: [] for key in makers}
    for i, start in enumerate(starts):
        measurer.begin(start, windows[start : start + batch])
        for j, (key, make_caches) in enumerate(makers.items(), 1):
            kld, was_kept = measurer.kld(key, make_caches)
            found[key].append(kld)
            if progress:
                progress(i * len(makers) + j, total, "kept" if was_kept else key)
    joined = {key: np.concatenate(parts) for key, parts in found.items()}
    base_kld = joined.get("base", np.zeros(len(windows)))
    return Sensitivity(base, base_kld, {c: joined[c.key] for c in changes})


class _Measurer:
    """Measures one batch of windows at a time; the f16 run is made when it is first needed."""

    def __init__(self, model: nn.Module, base: Pairs, records: Journal | None):
        self.model, self.records = model, records
        self.base = ["/".join(pair) for pair in base]
        self.kept = {
            (*record["windows"], record["run"]): record["kld"]
            for record in (records.parts if records else [])
            if record["base"] == self.base
        }

    def begin(self, start: int, windows: np.ndarray) -> None:
        """Go on to the batch of windows that begins at ``start``."""
        self.start, self.windows, self.reference = start, windows, None
        self.first_piece = FirstPiece(self.model)

    def kld(self, key: str, make_caches: Callable[[], list]) -> tuple[np.ndarray, bool]:
        """Mean KLD of each window of the batch, and whether it had been measured before."""
        n = len(self.windows)
        kept = self.kept.get((self.start, n, key))
        if kept is not None:
            return np.array(kept), True
        if self.reference is None:
            targets = targets_of(self.windows).reshape(-1)
            self.reference = Reference(self._logits(own_caches(self.model)), targets)
        found = self.reference.kld(self._logits(make_caches()))
        mx.clear_cache()  # runs differ in shapes: what one frees the next one can seldom use
        check_finite(found, key)
        means = found.reshape(n, -1).mean(axis=1, dtype=np.float64)
        if self.records:
            self.records.add(
                {"base": self.base, "windows": [self.start, n], "run": key, "kld": means.tolist()}
            )
        return means, False

    def _logits(self, caches: list) -> mx.array:
        logits = batch_logits(self.model, self.windows, caches, self.first_piece)
        mx.eval(logits)
        return logits.reshape(-1, logits.shape[-1])
