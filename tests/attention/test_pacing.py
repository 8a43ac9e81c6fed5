"""Attention calls of long prompts wait for the call before them."""

from __future__ import annotations

import gc
import weakref

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from paced import paced

from mlx_turbokv import TurboKVCache
from mlx_turbokv.attention import dispatch
from mlx_turbokv.attention.pacing import InFlightLimit

# of a prefill with protected tokens over one without: 1.03, and 1.27 where body and first tokens
# are not started with the attention
PEAK_RATIO = 1.1


@pytest.fixture
def evaluated(monkeypatch):
    """What is started and what is waited for, in order."""
    calls = []
    monkeypatch.setattr(mx, "async_eval", lambda *x: calls.append(("started", x[:-1])))
    monkeypatch.setattr(mx, "eval", lambda x: calls.append(("waited for", x)))
    return calls


def test_a_call_is_started_and_the_one_before_is_waited_for(evaluated) -> None:
    limit = InFlightLimit(10)
    outputs, held = [mx.zeros(1) for _ in range(3)], [mx.zeros(1) for _ in range(3)]
    for output, tail in zip(outputs, held):
        limit(output, (mx.zeros(1), tail), 10)
    assert [what for what, _ in evaluated] == [
        "started",
        "started",
        "waited for",
        "started",
        "waited for",
    ]
    started = [x for what, x in evaluated if what == "started"]
    assert all(x is output and len(more) == 1 for (x, *more), output in zip(started, outputs))
    waited = [x for what, x in evaluated if what == "waited for"]
    assert all(x is tail for x, tail in zip(waited, held))


def test_calls_of_few_bytes_and_rows_that_are_gone_are_left(evaluated) -> None:
    limit = InFlightLimit(10)
    limit(mx.zeros(1), (mx.zeros(1),), 9)
    assert evaluated == []
    limit(mx.zeros(1), (mx.zeros(1),), 10)
    limit(mx.zeros(1), (mx.zeros(1),), 10)
    assert [what for what, _ in evaluated] == ["started", "started"]


def test_within_a_transformation_nothing_is_started() -> None:
    limit = InFlightLimit(0)

    def doubled(x: mx.array) -> mx.array:
        limit(2 * x, (x,), 1)
        return 2 * x

    assert mx.compile(doubled)(mx.array(3.0)).item() == 6


@pytest.mark.parametrize("protection", [(0, 0), (32, 0), (32, 128)])
@paced()
def test_chunks_of_a_prompt_wait_for_what_lives_on_in_the_cache(protection, monkeypatch) -> None:
    calls: list[tuple[list[weakref.ref], int]] = []
    monkeypatch.setattr(
        dispatch, "limit_in_flight",
        lambda output, held, n_bytes: calls.append(([weakref.ref(x) for x in held], n_bytes)),
    )  # fmt: skip
    cache = TurboKVCache("turbo4", "turbo3", None, None, *protection)
    n_chunk, n_heads, dim = 300, 2, 64
    for i in range(3):
        new = [mx.random.normal((1, n_heads, n_chunk, dim), key=mx.random.key(i)) for _ in "kv"]
        keys, values = cache.update_and_fetch(*new)
        output = mx.fast.scaled_dot_product_attention(
            new[0], keys, values, scale=dim**-0.5, mask="causal"
        )
        assert output.shape == new[0].shape
        del new, keys, values, output
        gc.collect()
        held, n_bytes = calls[i]
        alive = [x() for x in held]
        assert alive and alive[-1] is cache.newest  # the next call waits for the last of them
        if protection[1]:  # nothing of the cache is left to wait for, with the new rows
            own = cache.body, cache.segments.sink, cache.tail
            assert {id(x) for x in alive} == {id(x) for x in own if x.size}
        assert n_bytes >= 4 * n_heads * dim * n_chunk * 3
    assert len(calls) == 3


@paced()
def test_protected_tokens_take_no_more_memory_in_a_prefill() -> None:
    """Of eight layers the dequantised rows of one or two exist at a time."""
    n_layers, n_tokens, n_chunk = 8, 2048, 512
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=256, num_hidden_layers=n_layers,
            intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
            rms_norm_eps=1e-5, vocab_size=64,
        )
    )  # fmt: skip
    mx.eval(model.parameters())
    tokens = mx.zeros((1, n_tokens), mx.int32)
    peaks = []
    for protection in (0, 0), (32, 128):
        caches = [
            TurboKVCache("turbo4", "turbo3", None, None, *protection) for _ in range(n_layers)
        ]
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for i in range(0, n_tokens, n_chunk):
            model(tokens[:, i : i + n_chunk], cache=caches)
            mx.eval([cache.state for cache in caches])
        peaks.append((mx.get_peak_memory() - before) / 1e6)
    assert peaks[1] <= PEAK_RATIO * peaks[0], peaks
