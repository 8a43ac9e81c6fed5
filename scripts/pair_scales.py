#!/usr/bin/env python3
"""What scales of pairs of dims gain where the first and the newest tokens are protected.

KLD against the same model with exact rows, over the second half of windows. The scored half goes in
at once, and each of its tokens sees what it would in steps of 32 through the cache: exact rows of
the first tokens, of the tail and of its own step, and all others as the layer's formats store them.

python scripts/pair_scales.py --text wiki.test.raw -c 2048 --chunks 8 --json scales.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import mlx_turbokv  # noqa: F401  loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import record

from mlx_turbokv.centring.calibration import calibrate_keys
from mlx_turbokv.centring.choose import Choice
from mlx_turbokv.centring.scales import EXPONENT, PairScales
from mlx_turbokv.evaluate import statistics
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.evaluate.text import load_text
from mlx_turbokv.evaluate.windows import PROTECTED_STEP, cut_windows, first_scored, targets_of
from mlx_turbokv.loading import models
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.model.kv_layers import kv_layers
from mlx_turbokv.policy.protection import LEAVE_TOGETHER, STEP
from mlx_turbokv.quant import quantize
from mlx_turbokv.quant.formats import KVFormat, as_format
from mlx_turbokv.quant.rotate import rotate

attention = mx.fast.scaled_dot_product_attention
newest: list[SimulatedCache] = []  # that has returned K and V which attention has not read


def stored(x: mx.array, fmt: KVFormat) -> mx.array:
    """Rows as a format reads them back."""
    units, scales = quantize.quantize(x, fmt)
    y = quantize.values(units, scales, fmt, x.shape[-1], mx.float32)
    return rotate(y, x.shape[-1], inverse=True)


class SimulatedCache:
    """A layer's cache after a prompt, which takes the scored half at once."""

    def __init__(self, prompt: tuple[mx.array, mx.array], formats: Any, centre: Any, args: Any):
        self.prompt, self.formats, self.centre, self.args = prompt, formats, centre, args
        self.offset = self.n_prompt = prompt[0].shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        newest[:] = [self]
        k, v = (mx.concatenate(list(pair), axis=2) for pair in zip(self.prompt, (keys, values)))
        return k, v

    def make_mask(self, *_: Any, **__: Any) -> str:
        return "causal"

    def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        n, sink, centre = k.shape[2], self.args.sink, self.centre
        scaled = k if centre.scales is None else centre.scales.scaled(k)
        anchors = centre.rows(0, n)
        coarse = stored(scaled - anchors, self.formats[0]) + anchors
        coarse = coarse if centre.scales is None else centre.scales.unscaled(coarse)
        coarse = coarse, stored(v, self.formats[1])
        parts = []
        for first, end, tail_start in self._segments(n):
            tail = max(tail_start, sink)
            rows = [
                mx.concatenate([x[:, :, :sink], y[:, :, sink:tail_start], x[:, :, tail:end]], 2)
                for x, y in zip((k, v), coarse)
            ]
            queries = q[:, :, first - self.n_prompt : end - self.n_prompt]
            parts.append(attention(queries, *rows, scale=scale, mask="causal"))
        return mx.concatenate(parts, axis=2)

    def _segments(self, n: int) -> list[tuple[int, int, int]]:
        """(first query, last, first row of the tail) of steps that see the same tail."""
        recent, start, found = self.args.recent, 0, []
        for first in range(self.n_prompt, n, PROTECTED_STEP):
            if first - start >= recent + LEAVE_TOGETHER:
                start = (first - recent) // STEP * STEP
            end = min(first + PROTECTED_STEP, n)
            if found and found[-1][2] == start:
                first = found.pop()[0]
            found.append((first, end, start))
        return found


def simulated_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, **options: Any):
    """Attention of a simulated cache, or MLX's."""
    if newest:
        return newest.pop().attend(q, k, v, scale)
    return attention(q, k, v, scale=scale, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--text", required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--calibration-chunks", type=int, default=6)
    parser.add_argument("--sink", type=int, default=32)
    parser.add_argument("--recent", type=int, default=128)
    parser.add_argument("--pairs", default="turbo4/turbo3,turbo3/turbo3,turbo2/turbo2")
    parser.add_argument("--exponents", default="0,0.125")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    loaded = models.load(args.model)
    model, text = loaded.model, load_text(args.text)
    sample = load_text("sample")
    windows = cut_windows(loaded.tokenizer, sample.text, 512, args.calibration_chunks)
    references = calibrate_keys(model, windows, sample.sha256, scale=True)
    layers, found = kv_layers(model).layers, kv_layers(model)
    turbo = [(as_format("turbo4"), as_format("turbo3"))] * len(layers)
    centres = Choice(model, found, references, None).of(turbo).centres
    mx.fast.scaled_dot_product_attention = simulated_attention
    exponents, klds = [float(x) for x in args.exponents.split(",")], {}
    windows = cut_windows(loaded.tokenizer, text.text, args.ctx_size, args.chunks)
    for i, window in enumerate(windows):
        caches, first = own_caches(model), first_scored(len(window))
        model(mx.array(window[None, :first]), cache=caches)
        prompts = [(c.keys[:, :, :first], c.values[:, :, :first]) for c in caches]
        mx.eval(prompts)
        logits = model(mx.array(window[None, first:-1]), cache=caches)[0]
        reference = Reference(logits, targets_of(window))
        del caches, logits
        for name in args.pairs.split(","):
            formats = [as_format(x) for x in name.split("/")]
            for exponent in exponents:
                started = time.perf_counter()
                of_layers = [raised(centres[n], references, n, exponent) for n in centres]
                held = [
                    SimulatedCache(prompt, formats, centre, args)
                    for prompt, centre in zip(prompts, of_layers)
                ]
                kld = reference.kld(model(mx.array(window[None, first:-1]), cache=held)[0])
                mean = float(kld.mean(dtype=np.float64))
                klds.setdefault(name, {}).setdefault(f"{exponent:g}", []).append(mean)
                seconds = time.perf_counter() - started
                print(f"{i} {name} {exponent:g}: {mean:.5f} ({seconds:.0f} s)", flush=True)
        record.write(args.json, summary(args, loaded, text, klds))


def raised(centre: Any, references: Any, ordinal: int, exponent: float) -> Any:
    """A centre with scales of another exponent; without them for 0."""
    mean = references.means[ordinal]
    scales = None
    if exponent:
        scales = PairScales(references.scales[ordinal] ** (exponent / EXPONENT), centre.rope)
        mean = mean * scales.of_dims
    return type(centre)(mean, centre.rope, "", 1, centre.first_key_uncentred, scales)


def summary(args: argparse.Namespace, loaded: Any, text: Any, klds: dict) -> dict:
    """The record after some windows."""
    rows = [
        {
            "pair": name, "exponent": float(exponent), "kld_by_window": x,
            "kld": statistics.mean_with_interval(np.array(x)),
            "ratio": statistics.ratio(np.array(x), np.array(by_exponent["0"])),
        }
        for name, by_exponent in klds.items() for exponent, x in by_exponent.items()
    ]  # fmt: skip
    return record.record(
        what="scales of pairs of dims with protected tokens",
        model=loaded.name,
        text={"name": text.name, "sha256": text.sha256},
        n_ctx=args.ctx_size,
        protected=f"{args.sink},{args.recent}",
        rows=rows,
    )


if __name__ == "__main__":
    main()
