"""What operators look at: /metrics in Prometheus' text format, and a log line when it changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .memory import MemoryBudget
from .prompt_cache import PromptCache

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOG_SECONDS = 60.0
PREFIX = "turbokv"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
logger = logging.getLogger(__name__)


class Metrics:
    """Counters of requests and tokens, and what the prompt cache and memory come to.

    Args:
        prompt_cache: whose counts are shown.
        budget: whose limit and peak are shown.
        queue: how many requests wait, and how many are generated.
    """

    def __init__(
        self,
        prompt_cache: PromptCache,
        budget: MemoryBudget | None = None,
        queue: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.prompt_cache, self.budget, self.queue = prompt_cache, budget, queue
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "Requests by the status of their answer.", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            f"{PREFIX}_prompt_tokens", "Tokens of prompts, those from the prompt cache included.",
            registry=self.registry,
        )  # fmt: skip
        self.generated_tokens = Counter(
            f"{PREFIX}_generated_tokens", "Generated tokens.", registry=self.registry
        )
        self.first_token = Histogram(
            f"{PREFIX}_time_to_first_token_seconds", "From a request to its first token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.info = Gauge(
            f"{PREFIX}_model_info", "The model that is served.", ["model", "policy"],
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)
        self._ends = threading.Event()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def served(self, model: str, policy: str) -> None:
        """Say which model is served."""
        self.info.clear()
        self.info.labels(model, policy).set(1)

    def answered(self, status: int) -> None:
        """Count a request."""
        self.requests.labels(str(status)).inc()

    def begun(self, n_prompt: int) -> None:
        """Count the tokens of a prompt whose generation begins."""
        self.prompt_tokens.inc(n_prompt)

    def generated(self, n: int, since: float | None = None) -> None:
        """Count generated tokens.

        Args:
            since: ``time.perf_counter()`` at the start of a request whose first tokens these are.
        """
        self.generated_tokens.inc(n)
        if since is not None:
            self.first_token.observe(time.perf_counter() - since)

    def collect(self) -> Iterator[Any]:
        """What is known elsewhere, at the time it is asked for."""
        cache = self.prompt_cache
        counts, disk = cache.counts, cache.disk
        waiting, running = self.queue()
        yield _gauge("queue_requests", "Requests that wait.", waiting)
        yield _gauge("running_requests", "Requests that are generated.", running)
        hits = CounterMetricFamily(
            f"{PREFIX}_prompt_cache_hits",
            "Prompts that began in the prompt cache.",
            labels=["from"],
        )
        hits.add_metric(["memory"], counts.memory_hits)
        hits.add_metric(["disk"], counts.disk_hits)
        yield hits
        yield _counter("prompt_cache_misses", "Prompts that did not.", counts.misses)
        reused = CounterMetricFamily(
            f"{PREFIX}_prefix_tokens_reused", "Tokens of prompts from the prompt cache.",
            labels=["from"],
        )  # fmt: skip
        reused.add_metric(["memory"], counts.memory_tokens)
        reused.add_metric(["disk"], counts.disk_tokens)
        yield reused
        evicted = CounterMetricFamily(
            f"{PREFIX}_prompt_cache_evictions", "Entries that others took the place of.",
            labels=["from"],
        )  # fmt: skip
        evicted.add_metric(["memory"], counts.evictions)
        evicted.add_metric(["disk"], disk.counts.evictions if disk else 0)
        yield evicted
        yield _gauge("prompt_cache_entries", "Entries in memory.", len(cache))
        yield _gauge("prompt_cache_bytes", "Bytes of their caches, packed.", cache.nbytes)
        yield _gauge("prompt_cache_f16_bytes", "What their K and V would take in 16 bits.",
                     cache.f16_bytes)  # fmt: skip
        if disk is not None:
            n, nbytes = disk.totals
            yield _gauge("disk_entries", "Entries on disk.", n)
            yield _gauge("disk_bytes", "Bytes of their files.", nbytes)
            yield _counter("disk_writes", "Entries written.", disk.counts.written)
            yield _counter("disk_written_bytes", "Bytes written.", disk.counts.written_bytes)
            yield _counter("disk_damaged", "Entries that could not be used.", disk.counts.damaged)
        yield _gauge("memory_active_bytes", "Memory of arrays.", mx.get_active_memory())
        yield _gauge("memory_peak_bytes", "The most since the model was loaded.",
                     mx.get_peak_memory())  # fmt: skip
        if self.budget is not None:
            yield _gauge("memory_limit_bytes", "The limit; 0: none.", self.budget.limit)

    def line(self) -> str:
        """The same in a line of a log."""
        cache = self.prompt_cache
        counts = cache.counts
        waiting, running = self.queue()
        n_requests = int(sum(s.value for s in _samples(self.requests)))
        n_prompt, n_generated = (
            int(_samples(counter)[0].value)
            for counter in (self.prompt_tokens, self.generated_tokens)
        )
        disk = ""
        if cache.disk is not None:
            n, nbytes = cache.disk.totals
            disk = f"; on disk {n:,} entries, {nbytes / 1e9:.2f} GB"
        return (
            f"{n_requests:,} requests, {running} running, {waiting} waiting; {n_prompt:,} prompt "
            f"tokens, {counts.memory_tokens:,} from memory, {counts.disk_tokens:,} from disk; "
            f"{n_generated:,} generated; prompt cache {len(cache)} entries, "
            f"{cache.nbytes / 1e9:.2f} GB, {cache.f16_bytes / 1e9:.2f} GB in f16, "
            f"{counts.evictions:,} evicted{disk}; {mx.get_active_memory() / 1e9:.2f} GB in use"
        )

    def log_regularly(self, seconds: float = LOG_SECONDS) -> None:
        """Log the line at most once in ``seconds``, when requests or tokens have changed."""
        threading.Thread(target=self._log, args=(seconds,), name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop logging."""
        self._ends.set()

    def _log(self, seconds: float) -> None:
        last = self._state()
        while not self._ends.wait(seconds):
            if (state := self._state()) != last:
                last = state
                logger.info(self.line())

    def _state(self) -> tuple[Any, ...]:
        counters = (self.requests, self.prompt_tokens, self.generated_tokens)
        values = tuple(sample.value for counter in counters for sample in _samples(counter))
        return *values, *vars(self.prompt_cache.counts).values()


def _samples(counter: Counter) -> list[Any]:
    return [s for family in counter.collect() for s in family.samples if s.name.endswith("_total")]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value)
