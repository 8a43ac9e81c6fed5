"""docs/upstream.md: mlx-lm's attention asks a cache that has ``attention``.

The proposal is patched in, MLX's own attention is put back, and what it would delete raises.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import base as mlx_lm_base
from tiny_models import run_session, shared_model

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.attention import arrays, dispatch, hook
from mlx_turbokv.cache import base
from mlx_turbokv.cache.base import PackedCache
from mlx_turbokv.cache.summary import leaves

PAGE = (Path(__file__).parents[2] / "docs" / "upstream.md").read_text()
NAME = "scaled_dot_product_attention"
DELETED = {
    "attention/arrays.py": ["TurboArray", "Handle", "as_array"],
    "attention/hook.py": [NAME, "AttentionFunctions", "install"],
}
REACHED = ["llama", "qwen3_next", "gemma3", "gpt_oss", "mimo_v2_flash", "gemma3n", "falcon_h1"]
# the hook sees their packed rows, this does not
LOST = ["plamo2", "gemma4", "gemma4_text", "afm7", "iquestloopcoder"]
# they change K or V, or attend themselves: dequantised rows either way
OWN_MATHS = ["gear", "gemma2", "phi3small", "plamo", "stablelm"]


def proposed() -> str:
    """The lines of the page that are added to mlx-lm."""
    added = re.findall(r"^\+( .*)$", PAGE, re.MULTILINE)
    assert len(added) == 3
    return "\n".join(added)


def patched_attention():
    """mlx-lm's function with the page's lines at its beginning."""
    signature = f"def {NAME}(queries, keys, values, cache, scale, mask, sinks=None):\n"
    rest = "\n    return original(queries, keys, values, cache, scale, mask, sinks)\n"
    names = {"original": getattr(mlx_lm_base, NAME)}
    exec(signature + proposed() + rest, names)
    return names[NAME]


class Upstream:
    """Packed caches as they would be: plain arrays, and a method that is asked.

    asked: calls of ``attention`` by cache.
    n_dequantised: calls of MLX's attention with K of a packed cache.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: Counter[int] = Counter()
        self.n_dequantised = 0
        self._given: list[mx.array] = []
        self._source = None

        def noted(method):
            @functools.wraps(method)
            def call(cache, *args):
                cache.given = method(cache, *args)
                cache.newest_source = self._source
                return cache.given

            return call

        def attention(cache, queries, keys, values, *, scale, mask, sinks):
            if keys is not cache.given[0] or values is not cache.given[1]:  # the model changed them
                return mlx_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
            self.asked[id(cache)] += 1
            source = cache.newest_source
            if source.hidden.count:
                return hook._attention_past_hidden_rows(queries, source, scale, mask, sinks)
            rows, backend = source.packed, source.backend
            return dispatch.attention(queries, rows, scale, mask, sinks, backend=backend)

        def mlx_attention(q, k, v, **options):
            self.n_dequantised += any(k is x for x in self._given)
            return hook._mlx_attention(q, k, v, **options)

        def deleted(*_, **__):
            raise AssertionError("the proposal deletes this")

        function, ours = patched_attention(), getattr(mlx_lm_base, NAME)
        for name, module in list(sys.modules.items()):
            if name.startswith("mlx_lm.models.") and getattr(module, NAME, None) is ours:
                monkeypatch.setattr(module, NAME, function)
        monkeypatch.setattr(mx.fast, NAME, mlx_attention)
        for name in ("update_and_fetch", "keys_and_values"):
            monkeypatch.setattr(PackedCache, name, noted(getattr(PackedCache, name)))
        monkeypatch.setattr(PackedCache, "attention", attention, raising=False)
        monkeypatch.setattr(base, "lazy_keys_and_values", self._plain)
        for file, names in DELETED.items():
            for name in names:
                monkeypatch.setattr(_module(file), name, deleted)
        monkeypatch.setattr(base, "Handle", deleted)

    def _plain(self, source, k_dtype, v_dtype):
        """``lazy_keys_and_values`` without a class of its own."""
        self._source, (packed, backend, hidden, _) = source, source
        keys = backend.dequantize(packed, k_dtype)[0]
        values = backend.dequantize(packed, v_dtype)[1]
        if hidden.count:
            keys, values = arrays._without(keys, hidden), arrays._without(values, hidden)
        self._given += [keys, values]
        return keys, values


def _module(file: str):
    return importlib.import_module("mlx_turbokv." + file.removesuffix(".py").replace("/", "."))


def session(name: str) -> tuple[mx.array, list[PackedCache]]:
    """Logits of a small session, and the packed caches that it filled."""
    model = shared_model(name)
    caches = make_prompt_cache(model, "q8_0", "q8_0", backend="reference", handles=False)
    logits = run_session(model, caches, [11, 5], 2)
    return logits, [cache for cache in leaves(caches) if isinstance(cache, PackedCache)]


@pytest.mark.parametrize("name", REACHED)
def test_models_need_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as through the hook, and no K or V of a packed cache is dequantised."""
    expected, _ = session(name)
    upstream = Upstream(monkeypatch)
    logits, packed = session(name)
    assert packed and all(upstream.asked[id(cache)] for cache in packed)
    assert not upstream.n_dequantised
    assert mx.array_equal(logits, expected)


@pytest.mark.parametrize("name", LOST + OWN_MATHS)
def test_other_models_read_dequantised_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits here too: the reference attends to dequantised rows itself."""
    expected, _ = session(name)
    upstream = Upstream(monkeypatch)
    logits, packed = session(name)
    assert mx.array_equal(logits, expected)
    assert (upstream.n_dequantised > 0) == (name in LOST)
    assert name in LOST or not all(upstream.asked[id(cache)] for cache in packed)


def test_the_page_names_what_is_deleted() -> None:
    rows = re.findall(r"^\| `(\w+/\w+\.py)` \| (.*?) \|", PAGE, re.MULTILINE)
    assert {file: re.findall(r"`(\w+)`", names) for file, names in rows} == DELETED
    assert re.findall(r"^- `(\w+)`", PAGE, re.MULTILINE) == LOST
    assert all(hasattr(_module(file), name) for file, names in DELETED.items() for name in names)
