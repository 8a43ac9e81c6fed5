"""Speed and memory of whole models through several caches, one trial of each in turn.

Two kinds of points. A *prompt* point is mlx_lm.benchmark's: a random prompt through an empty
cache, then generation. A *context* point times generation alone: the cache is filled with random
rows of K and V, packed by the cache's own ``update_and_fetch``, without running the model; that
makes 131,072 tokens affordable, and what decoding reads is as large and as packed as after a real
prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..model.caches import own_caches
from ..model.kv_layers import KVLayers, kv_layers
from .prepared import Prepared
from .timed_generation import build_times, caches_for, generate

FILL_STEP = 8192  # rows written at a time into a cache that is filled without the model
Tick = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How points are measured.

    generation_tokens: tokens timed after the prompt.
    num_trials: timed repeats, after one that is not timed.
    prefill_step_size: prompt tokens at a time.
    vocab_size: tokens of random prompts are below this.
    batch_size: sequences at once, each of a point's length.
    """

    generation_tokens: int = 128
    num_trials: int = 5
    prefill_step_size: int = 2048
    vocab_size: int = 32000
    batch_size: int = 1


@dataclass(frozen=True)
class Point:
    """A point to measure: ``kind`` is "prompt" or "context", ``tokens`` the tokens in the cache."""

    kind: str
    tokens: int


@dataclass
class Trials:
    """Results of one configuration at one point, trial by trial; seconds and bytes."""

    config: Prepared
    prompt_s: list[float] = field(default_factory=list)
    generation_s: list[float] = field(default_factory=list)
    build_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    kv_bytes: int = 0
    error: str | None = None


def measure_point(
    model: nn.Module,
    point: Point,
    configs: Sequence[Prepared],
    settings: Settings,
    deadline: float | None = None,
    tick: Tick | None = None,
) -> list[dict]:
    """Rows of one point, one a configuration; ratios are to the first configuration's.

    Trials are the outer loop and configurations the inner one, so a drift of the machine meets all
    of them. A configuration that fails has its error in its row, and the others go on.

    Args:
        deadline: a ``time.perf_counter`` value after which no further trial starts, once each
            configuration has one.
    """
    trials = [Trials(c) for c in configs]
    runner = (_Contexts if point.kind == "context" else _Prompts)(model, point.tokens, settings)
    total = (settings.num_trials + 1) * len(trials)

    def say(done: int, trial: Trials) -> Callable[[str], None]:
        return lambda what: tick(done, total, f"{trial.config.name}: {what}") if tick else None

    for i in range(settings.num_trials + 1):
        if i > 1 and deadline is not None and time.perf_counter() > deadline:
            break
        for j, trial in enumerate(trials, 1):
            if trial.error is None:
                try:
                    if i > 0:
                        runner.run(trial)
                    else:
                        runner.warm_up(trial, say(j - 1, trial))
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    trial.error = (str(error).splitlines() or [type(error).__name__])[0]
            if tick:
                tick(i * len(trials) + j, total, trial.config.name)
    runner.close()
    return [_row(point, trial, trials[0], settings.batch_size) for trial in trials]


class _Prompts:
    """Random prompts through an empty cache, then generation."""

    def __init__(self, model: nn.Module, tokens: int, settings: Settings):
        self.model, self.settings = model, settings
        self.prompt = mx.random.randint(0, settings.vocab_size, (settings.batch_size, tokens))
        mx.eval(self.prompt)

    def warm_up(self, trial: Trials, say: Say) -> None:
        say("first trial, not timed")
        caches, *_ = self._generate(trial)
        trial.build_s = build_times(self.model, caches, self.settings.batch_size)

    def run(self, trial: Trials) -> None:
        _, prompt_s, generation_s = self._generate(trial)
        trial.prompt_s.append(prompt_s)
        trial.generation_s.append(generation_s)

    def _generate(self, trial: Trials) -> tuple[list, float, float]:
        before = _start_of_peak()
        settings = self.settings
        caches = caches_for(trial.config.make_caches, settings.batch_size)
        seconds = generate(
            self.model, self.prompt, caches, settings.generation_tokens,
            settings.prefill_step_size,
        )  # fmt: skip
        trial.peak_bytes = max(trial.peak_bytes, mx.get_peak_memory() - before)
        trial.kv_bytes = sum(c.nbytes for c in caches)
        return caches, *seconds

    def close(self) -> None:
        mx.clear_cache()


class _Contexts:
    """Generation after a context that was written into the cache without the model."""

    def __init__(self, model: nn.Module, tokens: int, settings: Settings):
        self.model, self.settings, self.tokens = model, settings, tokens
        self.found = kv_layers(model)
        if not self.found.layers:
            raise InputError("This model has no KV layer, so there is no context to fill.")
        self.caches: dict[str, list] = {}

    def warm_up(self, trial: Trials, say: Say) -> None:
        before = _start_of_peak()
        batch_size = self.settings.batch_size
        caches = caches_for(trial.config.make_caches, batch_size)
        self.caches[trial.config.name] = caches
        fill(caches, self.found, self.tokens, _dtype(self.model, self.found), say, batch_size)
        say("first trial, not timed")
        _start_of_peak()
        self._generate(caches)
        trial.peak_bytes = mx.get_peak_memory() - before
        trial.kv_bytes = sum(c.nbytes for c in caches)
        trial.build_s = build_times(self.model, caches, batch_size)
        self._trim(caches)

    def run(self, trial: Trials) -> None:
        mx.synchronize()
        caches = self.caches[trial.config.name]
        trial.generation_s.append(self._generate(caches))
        self._trim(caches)

    def _generate(self, caches: list) -> float:
        settings = self.settings
        last = mx.zeros((settings.batch_size, 1), mx.int32)
        n, step = settings.generation_tokens, settings.prefill_step_size
        return generate(self.model, last, caches, n, step)[1]

    def _trim(self, caches: list) -> None:
        for cache in _kv_caches(caches, self.found):
            cache.trim(_offset(cache) - self.tokens)

    def close(self) -> None:
        self.caches.clear()
        mx.clear_cache()


def _start_of_peak() -> int:
    """Free what is unused and begin a new peak; returns the bytes in use."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def _offset(cache: Any) -> int:
    """Tokens in a cache, of each sequence of a batch."""
    if isinstance(cache.offset, mx.array):
        offsets: Any = cache.offset.tolist()
        return max(offsets)
    return cache.offset


def fill(
    caches: list, found: KVLayers, tokens: int, dtype: mx.Dtype, say: Say = lambda _: None,
    batch_size: int = 1,
) -> None:  # fmt: skip
    """Write ``tokens`` random rows of K and V into each KV layer; recurrent states stay empty.

    Args:
        say: is told how far it is.

    Raises: InputError if the model's shapes cannot be learnt.
    """
    for layer, cache in zip(found.layers, _kv_caches(caches, found)):
        if layer.shape is None:
            raise InputError(
                "The heads of this model's K and V cannot be learnt, so its cache cannot be "
                "filled: give --prompt-tokens in place of --context."
            )
        for start in range(0, tokens, FILL_STEP):
            n = min(FILL_STEP, tokens - start)
            say(f"filling layer {layer.ordinal + 1} of {len(found.layers)}, token {start:,}")
            shape = (batch_size, layer.shape.n_kv_heads, n)
            k = mx.random.normal((*shape, layer.shape.k_head_dim), dtype)
            v = mx.random.normal((*shape, layer.shape.v_head_dim), dtype)
            cache.update_and_fetch(k, v)
            mx.eval(cache.state)
            del k, v
        mx.clear_cache()


def _kv_caches(caches: list, found: KVLayers) -> list:
    """The caches of the KV layers, in order."""
    return [
        caches[x.index] if x.sub is None else caches[x.index].caches[x.sub] for x in found.layers
    ]


def _dtype(model: nn.Module, found: KVLayers) -> mx.Dtype:
    """The type of a model's K and V, from a call that is never computed."""
    caches = own_caches(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return _kv_caches(caches, found)[0].keys.dtype


def _row(point: Point, trial: Trials, first: Trials, batch_size: int = 1) -> dict:
    row = {
        "kind": point.kind,
        "tokens": point.tokens,
        "batch_size": batch_size,
        "config": trial.config.name,
        "bits_per_value": trial.config.bits_at(point.tokens)[2],
        "backend": trial.config.backend,
    }
    if trial.error is not None or not trial.generation_s:
        return row | {"error": trial.error or "no trial was finished"}
    generation = [batch_size / s for s in trial.generation_s]
    row |= {
        "generation_tps": _spread(generation),
        "step_ms": 1e3 * median(trial.generation_s),
        "build_ms": 1e3 * median(trial.build_s),
        "peak_bytes_above_weights": trial.peak_bytes,
        "kv_bytes": trial.kv_bytes,
        "generation_of_first": _ratio(first.generation_s, trial.generation_s),
    }
    if point.kind == "prompt":
        row["prompt_tps"] = _spread([batch_size * point.tokens / s for s in trial.prompt_s])
        row["prompt_of_first"] = _ratio(first.prompt_s, trial.prompt_s)
    return row


def _spread(values: list[float]) -> dict:
    return {"median": median(values), "min": min(values), "max": max(values), "trials": values}


def _ratio(first: list[float], these: list[float]) -> float | None:
    """Median over trials of the first configuration's time to this one's; more is faster."""
    pairs = [a / b for a, b in zip(first, these)]
    return median(pairs) if pairs else None
