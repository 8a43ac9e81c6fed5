"""Admission: what fits is served, entries go before it, and what never fits gets the numbers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_turbokv import attach
from mlx_turbokv.errors import InputError
from mlx_turbokv.serve.errors import RequestError
from mlx_turbokv.serve.memory import COPIES, MemoryBudget
from mlx_turbokv.serve.prompt_cache import PromptCache

STEP = 64
KEY = "model"


@pytest.fixture(scope="module")
def model():
    return attach(tiny_model("llama", max_position_embeddings=1 << 20), "q8_0", "turbo3")


def job(n_prompt: int, n_more: int = 1) -> SimpleNamespace:
    args = SimpleNamespace(max_tokens=n_more)
    return SimpleNamespace(prompt=[1] * n_prompt, tokens=[], args=args)


def budget_for(model, n: int, cache: PromptCache | None = None) -> MemoryBudget:
    """A budget in which a prompt of n tokens just fits."""
    free = MemoryBudget(1 << 50, PromptCache(10), STEP)
    free.loaded([model])
    budget = MemoryBudget(None, cache or PromptCache(10), STEP)
    budget.limit = free._needed([free._sequence(job(n))])
    budget.loaded([model])
    return budget


def test_what_does_not_fit_is_refused_with_the_numbers(model) -> None:
    budget = budget_for(model, 2000)
    budget.admit(job(2000))
    with pytest.raises(RequestError) as refused:
        budget.admit(job(9000, 100))
    assert refused.value.status == 413 and refused.value.code == "out_of_memory"
    text = str(refused.value)
    assert "9,000 prompt tokens and up to 100 new ones" in text
    assert f"the limit is {budget.limit / 1e6:.2f} MB" in text
    budget.admit(job(100))


def test_max_tokens_count_up_to_the_models_context(model) -> None:
    budget = budget_for(model, 2000)
    with pytest.raises(RequestError):
        budget.admit(job(100, 1 << 40))
    budget.loaded([model], max_context=1500)
    budget.admit(job(100, 1 << 40))


def test_entries_go_before_a_request_is_refused(model) -> None:
    cache = PromptCache(10)
    for i in range(3):
        caches = make_prompt_cache(model)
        model(mx.full((1, 900), i), cache=caches)
        mx.eval([c.state for c in caches])
        cache.insert_cache(KEY, [i] * 900, caches)
        del caches
    budget = budget_for(model, 1000, cache)
    budget.limit = max(budget.limit, mx.get_active_memory())
    held = cache.nbytes
    budget.admit(job(300))
    n_small = len(cache)
    budget.admit(job(1000))
    assert len(cache) <= n_small and cache.nbytes < held
    assert cache.counts.evictions == 3 - len(cache)


def test_a_job_waits_for_those_that_run(model) -> None:
    budget = budget_for(model, 2000)
    assert budget.joins(job(2000), [])
    assert not budget.joins(job(2000), [job(100)])
    assert budget.joins(job(200), [job(200)])
    assert budget.joins(job(50_000), [job(100)])  # never fits: it is refused at once


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=5), n_more=st.integers(1, 1000))
def test_more_or_longer_requests_never_need_less(model, lengths: list[int], n_more: int) -> None:
    budget = MemoryBudget(1 << 50, PromptCache(1), STEP)
    budget.loaded([model])
    sequences = [budget._sequence(job(n, n_more)) for n in lengths]
    needed = budget._needed(sequences)
    assert needed >= max(budget._needed([s]) for s in sequences)
    longer = [s._replace(n_most=s.n_most + 500) for s in sequences]
    assert budget._needed(longer) > needed
    assert needed >= budget._held + COPIES * sum(
        budget._footprint.caches(s.n_most) for s in sequences
    )


def test_a_model_without_room_for_a_request_is_refused(model) -> None:
    budget = MemoryBudget(1000, PromptCache(1), STEP)
    with pytest.raises(InputError, match="memory limit of 0.00 MB.*--memory-limit"):
        budget.loaded([copy.copy(model)])


@pytest.fixture(autouse=True)
def limit_of_mlx():
    before = mx.set_memory_limit(1 << 40)
    yield
    mx.set_memory_limit(before)
