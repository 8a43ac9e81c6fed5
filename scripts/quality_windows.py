"""Windows of one length through many configurations, side by side, for quality_table.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_turbokv.centring import first_use

REFERENCE = "f16/f16"
BIAS, MEAN, SCALES = "key bias", "mean", "mean and scales"
BYTES_AT = 32768  # tokens
ASKED_WINDOWS = 6  # of the package's sample, where what keys are centred by is asked for
MOST_BYTES = 4 << 30  # of a batch's logits


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

    def batch_size(self, n_ctx: int) -> int:
        """Windows side by side: one on a CPU, else as many as the logits have room for."""
        import mlx.core as mx

        if mx.default_device().type != mx.DeviceType.gpu:
            return 1
        vocabulary = self.loaded.model(mx.array([[0]])).shape[-1]
        return max(1, MOST_BYTES // (4 * vocabulary * (n_ctx // 2)))


class Windows:
    """Windows of one length, with the reference's predictions in them."""

    def __init__(self, run: Measurement, n_ctx: int, chunks: int) -> None:
        from mlx_turbokv.evaluate.divergence import Reference
        from mlx_turbokv.evaluate.first_piece import FirstPiece
        from mlx_turbokv.evaluate.windows import targets_of
        from mlx_turbokv.model.text_windows import cut_windows

        self.run, self.n_ctx = run, n_ctx
        windows = cut_windows(run.loaded.tokenizer, run.text.text, n_ctx, chunks)
        size = run.batch_size(n_ctx)
        self.batches = [windows[i : i + size] for i in range(0, len(windows), size)]
        self.n = len(windows)
        self.pieces = [FirstPiece(run.loaded.model) for _ in self.batches]
        self.config = run.prepared(REFERENCE, None)[0]
        self._folder = TemporaryDirectory()
        self._held: list[Reference] = []
        self.stats = []
        for windows, logits in self._logits(self.config):
            reference = Reference(logits, targets_of(windows).reshape(-1))
            self._keep(reference, logits)
            self.stats += self._by_window(reference.own_stats())

    def _keep(self, reference: Any, logits: Any) -> None:
        """Keep a batch's reference: on a CPU in a file, since memory is small there."""
        import mlx.core as mx

        if mx.default_device().type == mx.DeviceType.gpu:
            self._held.append(reference)
        else:
            n = len(list(Path(self._folder.name).iterdir()))
            mx.save(f"{self._folder.name}/{n:04}.npy", logits)

    def _references(self) -> Iterator[Any]:
        """The references of the batches, in their order."""
        import mlx.core as mx

        from mlx_turbokv.evaluate.divergence import Reference
        from mlx_turbokv.evaluate.windows import targets_of

        yield from self._held
        files = sorted(Path(self._folder.name).iterdir())
        for path, windows in zip(files, self.batches):
            yield Reference(mx.load(str(path)), targets_of(windows).reshape(-1))

    def _logits(self, config: Any):
        """The windows and the scored logits of each batch, [B * scored, vocabulary]."""
        from mlx_turbokv.evaluate.windows import batch_logits

        for windows, piece in zip(self.batches, self.pieces):
            logits = batch_logits(self.run.loaded.model, windows, config.make_caches(), piece)
            yield windows, logits.reshape(-1, logits.shape[-1])

    def _by_window(self, stats: Any) -> list[Any]:
        """Statistics of one batch, window by window."""
        n = self.n_ctx - self.n_ctx // 2 - 1
        parts = {name: values.reshape(-1, n) for name, values in vars(stats).items()}
        count = len(parts["nll"])
        return [type(stats)(**{k: x[i] for k, x in parts.items()}) for i in range(count)]

    def row(self, config: Any, keys: str) -> dict:
        """Measure a configuration; the reference is known already.

        Raises: InputError where predictions are not numbers.
        """
        import numpy as np

        from mlx_turbokv.evaluate import statistics
        from mlx_turbokv.evaluate.divergence import check_finite

        found = self.stats
        if config.name != REFERENCE:
            found = []
            for reference, (_, logits) in zip(self._references(), self._logits(config)):
                found += self._by_window(reference.compare(logits))
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
