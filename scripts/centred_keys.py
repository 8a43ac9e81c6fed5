"""Centred keys on a model: what they bring, and what was tried around them.

Means are calibrated on one text (default: the package's sample) and measured on another. Parts:
formats (centred and not, at --ctx-size), contexts (512, 2,048 and 8,192 tokens), blocks (sizes of
a block of positions), sinks (first tokens' K and V in f16), scales (keys scaled per pair of dims
before the rotation, queries the other way), layers (one layer's keys quantised at a time).

    python scripts/centred_keys.py --text FILE --parts formats,contexts --json benchmarks/centred_keys.json

A finished part is kept in the JSON file and not run again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402

from mlx_turbokv.models import load  # noqa: E402  (finds OpenBLAS before MLX is imported)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.cache import KVCache  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv import centre as centre_module  # noqa: E402
from mlx_turbokv.api import CacheFactory  # noqa: E402
from mlx_turbokv.cache import TurboKVCache  # noqa: E402
from mlx_turbokv.centre import Centre  # noqa: E402
from mlx_turbokv.centring.calibration import SINK_TOKENS, calibrate_keys  # noqa: E402
from mlx_turbokv.evaluate.configuration import Prepared, parse_policy  # noqa: E402
from mlx_turbokv.evaluate.perplexity import evaluate_windows  # noqa: E402
from mlx_turbokv.evaluate.record import model_record  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402
from mlx_turbokv.evaluate.windows import cut_windows  # noqa: E402
from mlx_turbokv.kernels.backend import select_backend  # noqa: E402
from mlx_turbokv.policy import LayerList, Uniform  # noqa: E402

KEYS = ("turbo3", "turbo4", "turbo5", "turbo6")
PARTS = ("formats", "contexts", "blocks", "sinks", "scales", "layers")
BLOCKS = (16, 32, 64, 128, 256)


class SimulatedCache(KVCache):
    """mlx-lm's own cache over rows that were packed and read back, with what is tried around it.

    Args:
        packed: packs the rows; its own keys are not centred.
        centre: taken out of the keys before, and put back.
        scales: what keys are divided by, [H, 1, head_dim].
        exact: first tokens whose keys, and whose values, stay exact.
    """

    def __init__(self, packed: TurboKVCache, centre=None, scales=None, exact=(0, 0)) -> None:
        super().__init__()
        self.packed, self.centre, self.scales = packed, centre, scales
        self.exact = exact

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        first, n = self.offset, keys.shape[2]
        anchors = 0 if self.centre is None else self.centre.rows(first, n)
        scales = 1 if self.scales is None else self.scales
        k, v = self.packed.update_and_fetch((keys.astype(mx.float32) - anchors) / scales, values)
        k = (k[:, :, first:] * scales + anchors).astype(keys.dtype)
        v = v[:, :, first:].astype(values.dtype)
        k, v = (
            mx.where(mx.arange(first, first + n)[:, None] < count, given, read)
            for count, given, read in zip(self.exact, (keys, values), (k, v))
        )
        return super().update_and_fetch(k, v)


class Study:
    """A model, its references, and configurations made from them."""

    def __init__(self, loaded, calibration: str, n_windows: int, backend: str) -> None:
        self.backend = backend
        self.block = centre_module.BLOCK
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        windows = cut_windows(self.tokenizer, load_text(calibration).text, 512, n_windows)
        started = time.perf_counter()
        self.references = calibrate_keys(self.model, windows)
        self.energies = query_energies(self.model, windows)
        self.spreads = key_spreads(self, windows)
        self.about = {
            "calibration": calibration,
            "calibration_windows": len(windows),
            "calibration_seconds": time.perf_counter() - started,
            "block": centre_module.BLOCK,
            "backend": backend,
        }

    def factory(self, policy, centred: bool) -> CacheFactory:
        return CacheFactory(
            self.model, policy, self.backend, centre=self.references if centred else False
        )

    def centres(self):
        return self.factory(Uniform("turbo4", "f16"), True).centring.centres

    def config(self, name: str, centred=False, block=None, label=None) -> Prepared:
        """A configuration by name (K/V or a policy), centred or not, with blocks of some size."""
        policy = parse_policy(name) if isinstance(name, str) else name
        return self.with_block(
            self.factory(policy, centred), label or name + (" centred" if centred else ""), block
        )

    def with_block(self, make, name: str, block=None) -> Prepared:
        size = block or self.block

        def caches():
            if centre_module.BLOCK != size:
                centre_module.BLOCK = size
                centre_module._table.cache_clear()
            return make()

        return Prepared(name, caches, backend=self.backend)

    def simulated(self, k, v, label, scaled=False, exact=(0, 0), bare=True, centred=True) -> Prepared:
        centres = self.centres() if centred else {}
        if not bare:
            centres = {
                i: Centre(c.mu, c.turning, c.source, c.n_sharing) for i, c in centres.items()
            }

        def caches():
            return [
                SimulatedCache(
                    TurboKVCache(k, v, self.backend),
                    centres.get(i),
                    self.scales(i, centres.get(i)) if scaled else None,
                    exact,
                )
                for i in range(len(self.energies))
            ]

        return self.with_block(caches, label)

    def scales(self, i: int, centre) -> mx.array:
        """Least error of scores: keys over (energy of keys / energy of queries) ** 1/4."""
        first, second = centre.turning.pairs()
        scale = (self.spreads[i] / self.energies[i]) ** 0.25
        scale /= np.exp(np.log(scale).mean(axis=-1, keepdims=True))
        full = np.empty((scale.shape[0], 1, 2 * scale.shape[1]), np.float32)
        full[:, 0, first], full[:, 0, second] = scale, scale
        return mx.array(full)


def query_energies(model, windows: np.ndarray) -> list[np.ndarray]:
    """Mean energy of the queries that read each KV head, in each pair, by layer: [H, pairs]."""
    plain = mx.fast.scaled_dot_product_attention
    seen: list = []

    def note(q, k, v, **options):
        seen.append((q, k.shape[1]))
        return plain(q, k, v, **options)

    centres = CacheFactory(model, Uniform("turbo4", "f16"), "reference", centre=calibrate_keys(model, windows[:1])).centring.centres  # fmt: skip
    total: list = []
    mx.fast.scaled_dot_product_attention = note
    try:
        for window in windows:
            seen.clear()
            model(mx.array(window)[None])
            for i, (q, n_kv_heads) in enumerate(seen):
                first, second = centres[i].turning.pairs()
                squares = np.array(mx.square(q[0, :, SINK_TOKENS:].astype(mx.float32)).mean(axis=1))
                pairs = squares[:, first] + squares[:, second]
                pairs = pairs.reshape(n_kv_heads, -1, pairs.shape[-1]).sum(axis=1)
                total[i : i + 1] = [total[i] + pairs if i < len(total) else pairs]
    finally:
        mx.fast.scaled_dot_product_attention = plain
    return [t / len(windows) for t in total]


def key_spreads(study: Study, windows: np.ndarray) -> list[np.ndarray]:
    """Mean energy of centred keys in each pair, by layer: [H, pairs]."""
    centres = study.centres()
    total: dict = {}
    for window in windows:
        caches, n = [KVCache() for _ in centres], len(window)
        study.model(mx.array(window)[None], cache=caches)
        for i, cache in enumerate(caches):
            rest = cache.keys[:, :, :n].astype(mx.float32) - centres[i].rows(0, n)
            squares = np.array(mx.square(rest[0, :, SINK_TOKENS:]).mean(axis=1))
            first, second = centres[i].turning.pairs()
            total[i] = total.get(i, 0) + squares[:, first] + squares[:, second]
    return [total[i] / len(windows) for i in range(len(centres))]


def configurations(study: Study, part: str) -> list[Prepared]:
    """What a part compares; the first is what the others are measured against."""
    configs = [study.config("f16/f16")]
    both = (False, True)
    if part == "formats":
        pairs = [f"{k}/f16" for k in KEYS] + ["turbo5/turbo3", "turbo4/turbo3"]
        configs += [study.config(pair, c) for pair in pairs for c in both]
    elif part.startswith("context"):
        configs += [study.config(f"{k}/f16", c) for k in KEYS for c in both]
    elif part == "blocks":
        configs += [study.config(f"{k}/f16") for k in ("turbo3", "turbo4")]
        configs += [
            study.config(f"{k}/f16", True, b, f"{k}/f16 centred, blocks of {b}")
            for k in ("turbo3", "turbo4") for b in BLOCKS
        ]  # fmt: skip
    elif part == "sinks":
        for k, v in (("turbo4", "f16"), ("turbo4", "turbo3")):
            for exact in ((0, 0), (1, 0), (0, 1), (1, 1), (4, 4)):
                label = f"{k}/{v} centred, K of {exact[0]} and V of {exact[1]} exact"
                configs.append(study.simulated(k, v, label, exact=exact))
            configs.append(study.simulated(k, v, f"{k}/{v} centred, the first too", bare=False))
            for exact in ((0, 0), (1, 0)):
                label = f"{k}/{v}, K of {exact[0]} exact"
                configs.append(study.simulated(k, v, label, exact=exact, centred=False))
    elif part == "scales":
        for k in ("turbo2", *KEYS):
            for scaled in both:
                for exact in ((0, 0), (1, 0)):
                    label = f"{k}/f16 centred" + ", scaled" * scaled + ", first exact" * exact[0]
                    configs.append(study.simulated(k, "f16", label, scaled, exact))
    elif part == "layers":
        n = len(study.energies)
        for i in range(n):
            pairs = tuple(("turbo3" if i == j else "f16", "f16") for j in range(n))
            for centred in both:
                name = f"layer {i}" + (" centred" if centred else "")
                configs.append(study.config(LayerList(pairs, name), centred, label=name))
    return configs


def windows_of(study: Study, part: str, tokens: list[int], n_ctx: int, chunks: int) -> np.ndarray:
    """Windows of a part; long contexts get fewer, so that all have as many tokens."""
    if part.startswith("context "):
        n_ctx = int(part.split()[1])
        chunks = max(1, chunks * 512 // n_ctx)
    elif part != "formats":
        chunks = max(1, chunks // (16 if part == "layers" else 4))
    return cut_windows(study.tokenizer, tokens, n_ctx, chunks)


@click.command()
@click.option("--model", default=None, help="As the commands take it.")
@click.option("--text", default="wikitext-2", help="A text file, 'sample' or 'wikitext-2'.")
@click.option("--calibration", default="sample", help="The text of the means.")
@click.option("--calibration-windows", default=6, show_default=True)
@click.option("--backend", default=None, help="Which kernels; blocks need the reference's.")
@click.option("-c", "--ctx-size", default=512, show_default=True)
@click.option("--contexts", default="512,2048,8192", show_default=True)
@click.option("--chunks", default=64, show_default=True)
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/centred_keys.json"))
def main(model, text, calibration, calibration_windows, backend, ctx_size, contexts, chunks, parts, json_path):
    loaded, source = load(model), load_text(text)
    path = Path(json_path)
    results = json.loads(path.read_text()) if path.exists() else {}
    backend = select_backend(backend).name
    study = Study(loaded, calibration, calibration_windows, backend)
    print(study.about, flush=True)
    tokens = list(study.tokenizer.encode(source.text, add_special_tokens=False))
    names = []
    for part in parts.split(","):
        names += [f"context {n}" for n in contexts.split(",")] if part == "contexts" else [part]
    for part in names:
        if part in results.get("parts", {}):
            continue
        windows = windows_of(study, part, tokens, ctx_size, chunks)
        configs = configurations(study, part)
        started = time.perf_counter()

        def progress(done: int, total: int, name: str) -> None:
            if done % len(configs) == 0:
                print(f"{part}: {done}/{total}, {time.perf_counter() - started:.0f} s", flush=True)

        found = evaluate_windows(loaded.model, windows, configs, progress=progress)
        rows = [
            {key: row[key] for key in ("config", "ppl", "kld", "delta_nll", "kv_bytes", "same_top")}
            for row in found.summary()
        ]
        entry = {"n_ctx": int(windows.shape[1]), "windows": len(windows), "rows": rows}
        entry["seconds"] = found.seconds
        done = {**results.get("parts", {}), part: entry}
        results = record(
            model=model_record(loaded), text_sha256=source.sha256, **study.about, parts=done
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        for row in rows:
            print(f"  {row['config']:36} KLD {row['kld']['mean']:.5f}", flush=True)


if __name__ == "__main__":
    main()
