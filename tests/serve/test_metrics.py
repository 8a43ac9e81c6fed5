"""/metrics is read by Prometheus' own parser and says what happened."""

from __future__ import annotations

import logging
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_turbokv.serve.disk import DiskCache
from mlx_turbokv.serve.memory import MemoryBudget
from mlx_turbokv.serve.metrics import Metrics
from mlx_turbokv.serve.prompt_cache import PromptCache


def values(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        "".join([s.name.removeprefix("turbokv_"), *(f"/{x}" for x in s.labels.values())]): s.value
        for family in families
        for s in family.samples
        if "bucket" not in s.name
    }


def test_metrics_say_what_happened(tmp_path) -> None:
    cache = PromptCache(3, disk=DiskCache(tmp_path))
    metrics = Metrics(cache, MemoryBudget(5_000_000, cache, 64), lambda: (2, 1))
    metrics.served("a model", "la-v7")
    for status in (200, 200, 413):
        metrics.answered(status)
    metrics.begun(1000)
    metrics.generated(7, since=time.perf_counter() - 2)
    metrics.generated(3)
    cache.counts.disk_hits, cache.counts.disk_tokens, cache.counts.evictions = 1, 900, 4
    found = values(metrics)
    expected = {
        "requests_total/200": 2, "requests_total/413": 1, "prompt_tokens_total": 1000,
        "generated_tokens_total": 10, "queue_requests": 2, "running_requests": 1,
        "prompt_cache_hits_total/disk": 1, "prompt_cache_hits_total/memory": 0,
        "prefix_tokens_reused_total/disk": 900, "prompt_cache_evictions_total/memory": 4,
        "prompt_cache_entries": 0, "prompt_cache_bytes": 0, "prompt_cache_f16_bytes": 0,
        "disk_entries": 0, "disk_bytes": 0, "memory_limit_bytes": 5_000_000,
        "model_info/a model/la-v7": 1, "time_to_first_token_seconds_count": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert 2 <= found["time_to_first_token_seconds_sum"] < 10
    line = metrics.line()
    assert "3 requests, 1 running, 2 waiting" in line and "900 from disk" in line
    assert "10 generated" in line and "4 evicted" in line
    cache.close()


def test_a_line_is_logged_when_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(PromptCache(1))
    with caplog.at_level(logging.INFO):
        metrics.log_regularly(0.02)
        time.sleep(0.1)
        assert not caplog.records
        metrics.answered(200)
        end = time.monotonic() + 5
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        assert [r.message[:10] for r in caplog.records] == ["1 requests"]
    metrics.close()
