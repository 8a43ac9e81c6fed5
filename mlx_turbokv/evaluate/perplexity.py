"""Perplexity and divergence of several cache configurations over the same windows of a text.

The protocol is llama-perplexity's (windows.py). Windows are the outer loop and configurations the
inner one, so that the reference's distribution is held for one window at a time; the first
configuration is the reference of all paired figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.nn as nn
import numpy as np

from ..errors import InputError
from . import statistics
from .checkpoint import Checkpoint
from .divergence import PositionStats, Reference, check_finite
from .first_piece import FirstPiece
from .prepared import Prepared
from .windows import digest, first_scored, scored_logits, targets_of

Progress = Callable[[int, int, str], None]


@dataclass
class ConfigResult:
    """Results of one configuration, window by window.

    config: the configuration.
    windows: statistics of each window's scored positions.
    kv_bytes: bytes its caches held at the end of a window.
    """

    config: Prepared
    windows: list[PositionStats] = field(default_factory=list)
    kv_bytes: int = 0

    def of(self, name: str) -> list[np.ndarray]:
        """One statistic, window by window."""
        return [getattr(w, name) for w in self.windows]

    def window_means(self, name: str) -> np.ndarray:
        """Mean of one statistic in each window, [n_windows]."""
        return np.array([np.mean(x, dtype=np.float64) for x in self.of(name)])


@dataclass
class Evaluation:
    """Results of all configurations over the same windows; the first is the reference."""

    n_ctx: int
    results: list[ConfigResult]
    seconds: float = 0.0

    @property
    def n_windows(self) -> int:
        return len(self.results[0].windows)

    def result(self, name: str) -> ConfigResult:
        """The results of the configuration of this name."""
        return next(r for r in self.results if r.config.name == name)

    def summary(self) -> list[dict]:
        """One record a configuration, as the tables and the JSON file use it."""
        return [self._summarise(r) for r in self.results]

    def _summarise(self, result: ConfigResult) -> dict:
        reference, config = self.results[0], result.config
        nll, kld, delta_p = result.of("nll"), result.of("kld"), result.of("delta_p")
        delta = [a - b for a, b in zip(nll, reference.of("nll"))]
        # The first scored position predicts the token after it.
        first = first_scored(self.n_ctx)
        same_top = [x.astype(np.float64) for x in result.of("same_top")]
        right = np.concatenate(result.of("top_right"))
        was_right = np.concatenate(reference.of("top_right"))
        all_kld = np.concatenate(kld)
        k_bits, v_bits, bits = config.bits_at(self.n_ctx)
        return {
            "config": config.name,
            "bits_per_value": bits,
            "k_bits_per_value": k_bits,
            "v_bits_per_value": v_bits,
            "layers": config.layers,
            "layer_bits": config.layer_bits,
            "backend": config.backend,
            "centred": config.centred,
            "warnings": list(config.warnings),
            "protected": str(config.protection) if config.protection else None,
            "kv_bytes": result.kv_bytes,
            "n_predictions": int(all_kld.size),
            "ppl": statistics.perplexity(nll),
            "nll": statistics.block_summary(nll),
            "delta_nll": statistics.block_summary(delta),
            "kld": {
                **statistics.block_summary(kld),
                **statistics.percentiles(all_kld),
                "intervals": statistics.percentile_intervals(kld),
            },
            "delta_p": {**statistics.block_summary(delta_p), **statistics.rms(delta_p)},
            "same_top": statistics.block_summary(same_top),
            "flips": {
                "rate": statistics.block_summary([1 - x for x in same_top]),
                "top": int(sum(np.sum(x == 0) for x in same_top)),
                "right_to_wrong": int(np.sum(was_right & ~right)),
                "wrong_to_right": int(np.sum(~was_right & right)),
            },
            "by_position": {
                "kld": statistics.by_position(kld, first),
                "delta_nll": statistics.by_position(delta, first),
            },
            "nll_by_window": result.window_means("nll").tolist(),
            "kld_by_window": result.window_means("kld").tolist(),
        }


def settings_of(
    windows: np.ndarray,
    configs: Sequence[Prepared],
    model_name: str,
    text_sha256: str,
    versions: dict,
) -> dict:
    """The settings that must be equal for two runs to share windows."""
    first = windows[:1]
    return {
        "model": model_name,
        "text_sha256": text_sha256,
        "n_ctx": int(windows.shape[1]),
        "first_window": digest(first),
        "configurations": [
            [c.name, c.layers, c.backend, c.centred, *([str(c.protection)] if c.protection else [])]
            for c in configs
        ],
        "versions": {k: versions[k] for k in ("mlx_turbokv", "mlx", "mlx_lm")},
        "device": versions["device"],
    }  # fmt: skip


def evaluate_windows(
    model: nn.Module,
    windows: np.ndarray,
    configs: Sequence[Prepared],
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate configurations made ready on windows already cut.

    A window that `checkpoint` has is not measured again; each one that finishes is added to it.

    Shapes: windows [n_windows, n_ctx].
    Raises: InputError if two configurations have one name, or logits are not numbers.
    """
    names = [c.name for c in configs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"Configuration {twice[0]!r} is given twice.")
    if not names:
        raise InputError("No configuration is given: at least one is needed.")
    results = [ConfigResult(c) for c in configs]
    started, total = time.perf_counter(), len(windows) * len(configs)
    for i, window in enumerate(windows):
        done = i * len(configs)
        found = checkpoint.get(i) if checkpoint else None
        if found is None:
            found = {}
            for config, measured in _measure_window(model, window, configs):
                found[config.name] = measured
                if progress:
                    progress(done + len(found), total, config.name)
            if checkpoint:
                checkpoint.put(i, found)
        elif progress:
            progress(done + len(configs), total, "kept")
        for result in results:
            stats, result.kv_bytes = found[result.config.name]
            result.windows.append(stats)
    return Evaluation(int(windows.shape[1]), results, time.perf_counter() - started)


def _measure_window(
    model: nn.Module, window: np.ndarray, configs: Sequence[Prepared]
) -> Iterator[tuple[Prepared, tuple[PositionStats, int]]]:
    """Each configuration with its statistics and KV bytes; the first is the reference."""
    reference, first_piece = None, FirstPiece(model)
    for config in configs:
        caches = config.make_caches()
        logits = scored_logits(model, window, caches, first_piece)
        if reference is None:
            reference = Reference(logits, targets_of(window))
            stats = reference.own_stats()
        else:
            stats = reference.compare(logits)
        check_finite(stats.nll, f"configuration {config.name}")
        yield config, (stats, sum(c.nbytes for c in caches))
