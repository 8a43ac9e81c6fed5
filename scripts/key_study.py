"""What the scripts on centred keys share: a model with its references, configurations, parts.

A part is a set of configurations over the same windows; the record of a file keeps each part with
the command, versions and device that it was measured with, and a finished part is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from record import record

from mlx_turbokv.cache import CacheFactory, TurboKVCache
from mlx_turbokv.centring import centre as centre_module
from mlx_turbokv.centring.calibration import SINK_TOKENS, calibrate_keys
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.evaluate.configuration import Prepared, parse_policy
from mlx_turbokv.evaluate.perplexity import evaluate_windows
from mlx_turbokv.evaluate.record import model_record
from mlx_turbokv.evaluate.text import load_text
from mlx_turbokv.evaluate.windows import cut_windows
from mlx_turbokv.kernels.backend import select_backend
from mlx_turbokv.loading.models import load  # finds OpenBLAS before MLX is imported
from mlx_turbokv.policy import Uniform

Read = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


class SimulatedCache(KVCache):
    """mlx-lm's own cache over rows that were quantised and read back.

    Args:
        read: new keys, without their anchors, and values to what they read back as.
        centre: taken out of the keys before, and put back.
        exact: first tokens whose keys, and whose values, stay exact.
    """

    def __init__(self, read: Read, centre: Centre | None = None, exact=(0, 0)) -> None:
        super().__init__()
        self.read, self.centre, self.exact = read, centre, exact

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        first, n = self.offset, keys.shape[2]
        anchors = 0 if self.centre is None else self.centre.rows(first, n)
        k, v = self.read(keys.astype(mx.float32) - anchors, values)
        read = (k + anchors).astype(keys.dtype), v.astype(values.dtype)
        k, v = (
            mx.where(mx.arange(first, first + n)[:, None] < count, given, back)
            for count, given, back in zip(self.exact, (keys, values), read)
        )
        return super().update_and_fetch(k, v)


def packed_rows(k: str, v: str, backend: str) -> Read:
    """Rows through a packed cache of the package, not centred."""
    packed = TurboKVCache(k, v, backend)

    def read(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        first = packed.offset
        held = packed.update_and_fetch(keys, values)
        return held[0][:, :, first:], held[1][:, :, first:]

    return read


class Study:
    """A model, its references, and configurations made from them."""

    def __init__(self, model: str | None, text: str, calibration: str, n_windows: int, backend: str | None) -> None:  # fmt: skip
        loaded = load(model)
        self.backend = select_backend(backend).name
        self.block = centre_module.BLOCK
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        source = load_text(text)
        self.tokens = list(self.tokenizer.encode(source.text, add_special_tokens=False))
        self.calibration = cut_windows(self.tokenizer, load_text(calibration).text, 512, n_windows)
        started = time.perf_counter()
        self.references = calibrate_keys(self.model, self.calibration)
        self.about = {
            "model": model_record(loaded),
            "text_sha256": source.sha256,
            "calibration": calibration,
            "calibration_windows": len(self.calibration),
            "calibration_seconds": round(time.perf_counter() - started, 1),
            "block": centre_module.BLOCK,
            "backend": self.backend,
        }
        print(self.about, flush=True)

    def factory(self, policy, centred: bool) -> CacheFactory:
        return CacheFactory(
            self.model, policy, self.backend, centre=self.references if centred else False
        )

    def centres(self) -> dict[int, Centre]:
        """The centre of every KV layer."""
        return self.factory(Uniform("turbo4", "f16"), True).centring.centres

    def config(self, name, centred=False, block=None, label=None) -> Prepared:
        """A configuration by name (K/V or a policy), centred or not, with blocks of some size."""
        policy = parse_policy(name) if isinstance(name, str) else name
        label = label or str(name) + (" centred" if centred else "")
        return self.with_block(self.factory(policy, centred), label, block)

    def with_block(self, make: Callable, name: str, block: int | None = None) -> Prepared:
        size = block or self.block

        def caches():
            if centre_module.BLOCK != size:
                centre_module.BLOCK = size
                centre_module._table.cache_clear()
            return make()

        return Prepared(name, caches, backend=self.backend)

    def simulated(
        self, label: str, read_of: Callable[[int], Read], exact=(0, 0), bare=True, centred=True
    ) -> Prepared:
        """SimulatedCaches; ``read_of`` makes what a layer's rows go through.

        bare: whether the first key is left whole, as the package does.
        """
        centres = self.centres()
        n = len(centres)
        if not bare:
            centres = {i: Centre(c.mu, c.rope, c.source, c.n_sharing) for i, c in centres.items()}  # fmt: skip
        if not centred:
            centres = {}

        def caches():
            return [SimulatedCache(read_of(i), centres.get(i), exact) for i in range(n)]

        return self.with_block(caches, label)

    def windows(self, n_ctx: int, chunks: int) -> np.ndarray:
        """Of the text that is not calibrated on."""
        return cut_windows(self.tokenizer, self.tokens, n_ctx, chunks)

    def measured(self, part: str, windows: np.ndarray, configs: list[Prepared]) -> dict:
        """The entry of a part: how each configuration diverges from the first."""
        started = time.perf_counter()

        def progress(done: int, total: int, name: str) -> None:
            if done % len(configs) == 0:
                print(f"{part}: {done}/{total}, {time.perf_counter() - started:.0f} s", flush=True)

        found = evaluate_windows(self.model, windows, configs, progress=progress)
        rows = [_short(row) for row in found.summary()]
        for row in rows:
            print(f"  {row['config']:44} KLD {row['kld']['mean']:.5f}", flush=True)
        seconds = round(found.seconds, 1)
        return {"n_ctx": windows.shape[1], "windows": len(windows), "rows": rows, "seconds": seconds}  # fmt: skip


def _short(row: dict) -> dict:
    """Of a configuration's summary what is drawn: windows as they pair with others'."""
    kld = {name: row["kld"][name] for name in ("mean", "se", "se_over", "interval")}
    windows = [float(f"{x:.6g}") for x in row["kld_by_window"]]
    return {"config": row["config"], "ppl": row["ppl"]["ppl"], "kld": kld, "kld_by_window": windows}


def query_energies(study: Study) -> list[np.ndarray]:
    """Mean energy of the queries that read each KV head, in each pair, by layer: [H, pairs]."""
    plain = mx.fast.scaled_dot_product_attention
    seen: list = []

    def note(q, k, v, **options):
        seen.append((q, k.shape[1]))
        return plain(q, k, v, **options)

    centres, total = study.centres(), {}
    mx.fast.scaled_dot_product_attention = note
    try:
        for window in study.calibration:
            seen.clear()
            study.model(mx.array(window)[None])
            for i, (q, n_kv_heads) in enumerate(seen):
                pairs = _pair_energy(q, centres[i])
                pairs = pairs.reshape(n_kv_heads, -1, pairs.shape[-1]).sum(axis=1)
                total[i] = total.get(i, 0) + pairs / len(study.calibration)
    finally:
        mx.fast.scaled_dot_product_attention = plain
    return [total[i] for i in range(len(total))]


def key_energies(study: Study, centred: bool = True) -> list[np.ndarray]:
    """Mean energy of keys in each pair, by layer: [H, pairs]."""
    centres, total = study.centres(), {}
    for window in study.calibration:
        for i, keys in enumerate(keys_of(study, window)):
            rest = keys - centres[i].rows(0, len(window)) if centred else keys
            total[i] = total.get(i, 0) + _pair_energy(rest, centres[i]) / len(study.calibration)
    return [total[i] for i in range(len(total))]


def keys_of(study: Study, window: np.ndarray) -> list[mx.array]:
    """Keys of every layer, [1, H, n, head_dim] float32."""
    caches = [KVCache() for _ in study.centres()]
    study.model(mx.array(window)[None], cache=caches)
    return [c.keys[:, :, : len(window)].astype(mx.float32) for c in caches]


def _pair_energy(x: mx.array, centre: Centre) -> np.ndarray:
    """Mean over tokens, the first left out: they are attention sinks. [heads, pairs]."""
    first, second = centre.rope.pairs()
    squares = np.array(mx.square(x[0, :, SINK_TOKENS:].astype(mx.float32)).mean(axis=1), np.float64)
    return squares[:, first] + squares[:, second]


def run_parts(study: Study, parts: list[str], measure: Callable[[str], dict], path: Path) -> None:
    """Measure parts that the file does not have, each with its own record."""
    results = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for part in parts:
        if part in results["parts"]:
            continue
        results["parts"][part] = record(**study.about, **measure(part))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
