"""Windows of one length through many configurations, side by side, for quality_table.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlx_turbokv.centring import first_use

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_turbokv.evaluate.divergence import PositionStats, Reference

REFERENCE = "f16/f16"
BIAS, MEAN, SCALES = "key bias", "mean", "mean and scales"
BYTES_AT = 32768  # tokens
ASKED_WINDOWS = 6  # of the package's sample, where what keys are centred by is asked for
MANY = 1024  # windows
PIECE = 256  # tokens at a time where none are protected


class Measurement:
    """One model with its key references."""

    def __init__(self, loaded: Any, text: Any, backend: str | None) -> None:
        self.loaded, self.text, self.backend = loaded, text, backend

    @cached_property
    def first_use(self) -> Any:
        """Mean keys and scales as the first use of the model measures them."""
        return self._references(first_use.N_WINDOWS)

    @cached_property
    def asked(self) -> Any:
        """The same of more windows."""
        return self._references(ASKED_WINDOWS)

    def _references(self, n_windows: int) -> Any:
        from mlx_turbokv.centring.calibration import calibrate_keys
        from mlx_turbokv.evaluate.text import load_text
        from mlx_turbokv.model.text_windows import cut_windows

        sample = load_text("sample")
        windows = cut_windows(self.loaded.tokenizer, sample.text, first_use.N_CTX, n_windows)
        return calibrate_keys(self.loaded.model, windows, sample.sha256, scale=True)

    def prepared(self, name: str, keys: str | None) -> tuple[Any, str]:
        """A configuration, and what its keys are centred by.

        Raises: InputError where it does not fit the model.
        """
        from mlx_turbokv.evaluate.configuration import prepare

        centre: Any = True
        if keys is None:
            keys, centre = SCALES, self.first_use
        elif keys == MEAN:
            centre = replace(self.asked, scales={})
        elif keys == SCALES:
            centre = self.asked
        config = prepare(self.loaded.model, name, self.backend, centre=centre)
        return config, keys if config.centres else "–"

    @cached_property
    def n_values(self) -> int:
        """Values of K and V in a token, over the layers that a policy packs."""
        from mlx_turbokv.evaluate.configuration import kv_shapes

        shapes = kv_shapes(self.loaded.model) or []
        return sum(s.n_kv_heads * (s.k_head_dim + s.v_head_dim) for s in shapes)

    def batch_size(self) -> int:
        """Windows side by side: one on a CPU, else all."""
        import mlx.core as mx

        return MANY if mx.default_device().type == mx.DeviceType.gpu else 1


class Windows:
    """Windows of one length, with the reference's predictions in them.

    Scored positions are compared PROTECTED_STEP at a time, so that the logits of all windows are
    never held at once.
    """

    def __init__(self, run: Measurement, n_ctx: int, chunks: int) -> None:
        from mlx_turbokv.evaluate.first_piece import FirstPiece
        from mlx_turbokv.model.text_windows import cut_windows

        self.run, self.n_ctx = run, n_ctx
        windows = cut_windows(run.loaded.tokenizer, run.text.text, n_ctx, chunks)
        size = run.batch_size()
        self.batches = [windows[i : i + size] for i in range(0, len(windows), size)]
        self.n = len(windows)
        self._first_pieces = [FirstPiece(run.loaded.model) for _ in self.batches]
        self._folder = TemporaryDirectory()
        self._held: list[Reference | Path] = []
        config = run.prepared(REFERENCE, None)[0]
        self.stats = self._by_window(self._keep(*step) for step in self._steps(config))

    def _keep(self, logits: mx.array, targets: mx.array) -> PositionStats:
        """Keep a step's reference: on a CPU in a file, since memory is small there."""
        import mlx.core as mx

        from mlx_turbokv.evaluate.divergence import Reference

        reference = Reference(logits, targets)
        if mx.default_device().type == mx.DeviceType.gpu:
            self._held.append(reference)
        else:
            self._held.append(Path(self._folder.name) / f"{len(self._held):05}.npy")
            mx.save(str(self._held[-1]), logits)
        return reference.own_stats()

    def _compared(self, config: Any) -> Iterator[PositionStats]:
        """Statistics of a configuration, step by step."""
        import mlx.core as mx

        from mlx_turbokv.evaluate.divergence import Reference

        for held, (logits, targets) in zip(self._held, self._steps(config), strict=True):
            if isinstance(held, Path):
                held = Reference(mx.load(str(held)), targets)
            yield held.compare(logits)

    def _steps(self, config: Any) -> Iterator[tuple[mx.array, mx.array]]:
        """Logits and targets of each batch's scored positions, PROTECTED_STEP of each window.

        Shapes: yields [B * n, vocabulary] and [B * n].
        """
        from mlx_turbokv.evaluate.windows import PROTECTED_STEP, logits_in_pieces, targets_of

        for windows, first in zip(self.batches, self._first_pieces):
            targets, done, model = targets_of(windows), 0, self.run.loaded.model
            for piece in logits_in_pieces(model, windows, config.make_caches(), first, PIECE):
                for i in range(0, piece.shape[1], PROTECTED_STEP):
                    logits = piece[:, i : i + PROTECTED_STEP]
                    here = slice(done, done + logits.shape[1])
                    yield logits.reshape(-1, logits.shape[-1]), targets[:, here].reshape(-1)
                    done = here.stop

    def _by_window(self, steps: Iterable[PositionStats]) -> list[PositionStats]:
        """Statistics of each window, from those of steps."""
        import numpy as np

        left, found = iter(steps), []
        n_scored = self.n_ctx - self.n_ctx // 2 - 1
        for windows in self.batches:
            parts: list[PositionStats] = []
            while sum(x.nll.size for x in parts) < n_scored * len(windows):
                parts.append(next(left))
            joined = {
                name: np.concatenate(
                    [getattr(x, name).reshape(len(windows), -1) for x in parts], axis=1
                )
                for name in vars(parts[0])
            }
            found += [type(parts[0])(**{k: x[i] for k, x in joined.items()})
                      for i in range(len(windows))]  # fmt: skip
        return found

    def row(self, config: Any, keys: str) -> dict:
        """Measure a configuration; the reference is known already.

        Raises: InputError where predictions are not numbers.
        """
        import numpy as np

        from mlx_turbokv.evaluate import statistics
        from mlx_turbokv.evaluate.divergence import check_finite

        found = self.stats
        if config.name != REFERENCE:
            found = self._by_window(self._compared(config))
        nll, kld = [x.nll for x in found], [x.kld for x in found]
        delta = [a - x.nll for a, x in zip(nll, self.stats)]
        for values in nll:
            check_finite(values, f"configuration {config.name}")
        p999 = statistics.percentiles(np.concatenate(kld))["p99.9"]
        bits, at_32k = config.bits_at(self.n_ctx), config.bits_at(BYTES_AT)[2]
        return rounded({
            "config": config.name, "keys": keys,
            "protected": str(config.protection) if config.protection else None,
            "bits": bits[2], "k_bits": bits[0], "v_bits": bits[1], "bits_32k": at_32k,
            "kv_bytes_32k": at_32k and round(at_32k * BYTES_AT * self.run.n_values / 8),
            "backend": config.backend, "centred": config.centred,
            "ppl": statistics.perplexity(nll),
            "delta_nll": statistics.block_summary(delta),
            "kld": statistics.block_summary(kld) | {"p99.9": p999},
            "same_top": statistics.block_summary([x.same_top.astype(float) for x in found]),
            "kld_by_window": [float(x.mean()) for x in kld],
            "delta_nll_by_window": [float(x.mean()) for x in delta],
        })  # fmt: skip


def rounded(value: Any) -> Any:
    """A record with its numbers in seven digits."""
    if isinstance(value, dict):
        return {k: rounded(x) for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(x) for x in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
