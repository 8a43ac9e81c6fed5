"""mlx-lm's batched generation through packed caches gives what sequences give one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from protected import assert_protects
from varied_models import varied_model

from mlx_turbokv import attach, detach
from mlx_turbokv.cache import TurboKVCache
from mlx_turbokv.cache.batch import BatchTurboKVCache
from mlx_turbokv.loading import models
from mlx_turbokv.quant.layout import protected_layout

pytestmark = pytest.mark.slow

VOCABULARY = 96
# log probabilities move by 1e-5 where no code turns, by up to this where rounding turns some, or
# where a prompt of protected tokens was cut elsewhere
TURNED_CODES = 0.08
# share of the texts that may take another way at such a tie
MOST_TURNED = 0.5
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 31, 32, 33, 40, 64, 65, 100, 150, 290]


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, n).tolist() for n in lengths]


def one_by_one(model: nn.Module, prompt: list[int], n: int, cache: list[Any] | None = None):
    """Greedy tokens of one sequence."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def same_but_for_a_tie(
    model: nn.Module, prompt: list[int], got: list[int], alone: list[int]
) -> bool:
    """Whether a text is the other one. If not, they part where a turned code settles a tie."""
    assert len(got) == len(alone)
    n = next((i for i, pair in enumerate(zip(got, alone)) if pair[0] != pair[1]), None)
    if n is None:
        return True
    ((_, logprobs),) = generate_step(mx.array(prompt + alone[:n]), model, max_tokens=1)
    assert (logprobs[alone[n]] - logprobs[got[n]]).item() < TURNED_CODES
    return False


def assert_alike(model: nn.Module, given: list, got: list, alone: list) -> None:
    """Texts are those of single runs; a few may leave them at a tie."""
    same = [same_but_for_a_tie(model, *texts) for texts in zip(given, got, alone, strict=True)]
    assert same.count(False) <= MOST_TURNED * len(given)


def tokenizer() -> SimpleNamespace:
    """What batch_generate needs of a tokenizer; nothing ends early."""
    return SimpleNamespace(eos_token_ids={VOCABULARY + 1}, decode=lambda tokens: str(tokens))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Its longest sequences leave the protected tail."""
    model = varied_model("llama", num_hidden_layers=6)
    attach(model, policy="la-v7", sink=32, recent=128)
    assert_protects(model.make_cache())
    return model


@pytest.fixture(scope="module")
def finer() -> nn.Module:
    """At finer formats a code that rounding turns is less likely to turn a token."""
    model = attach(varied_model("llama", num_hidden_layers=4), k="q8_0", v="turbo6")
    assert_protects(model.make_cache())
    return model


def test_sixteen_prompts_through_la_v7_equal_sixteen_single_runs(llama: nn.Module) -> None:
    given = prompts(LENGTHS)
    n_tokens = [24 - i for i in range(16)]
    response = batch_generate(llama, tokenizer(), given, max_tokens=n_tokens, return_token_ids=True)
    alone = [one_by_one(llama, prompt, n) for prompt, n in zip(given, n_tokens)]
    assert_alike(llama, given, response.token_ids, alone)
    assert min(len(set(tokens)) for tokens in alone) >= 4
    assert len({tuple(tokens[:4]) for tokens in alone}) >= 12


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "qwen3_next",
        "falcon_h1",
        "granitemoehybrid",
        "gpt_oss",
        "gemma3_text",
        "stablelm",
    ],
)
def test_architectures_give_the_same_in_a_batch(name: str) -> None:
    """Hybrids, sinks, sliding windows and a model that changes keys after the cache.

    Without packed caches as well, mlx-lm 0.32.2 cannot batch gemma2 (its mask does not broadcast)
    and gives other tokens for jamba and olmo_hybrid in a batch than alone.
    """
    model = attach(varied_model(name), k="q8_0", v="turbo6")
    # more than 8 tokens each, so that their tokens see each other as they were made there and here
    given = prompts([13, 30, 11, 12], seed=3)
    generator = BatchGenerator(model, max_tokens=8)
    got: dict[int, list[tuple[int, np.ndarray]]] = {uid: [] for uid in generator.insert(given)}
    while responses := generator.next_generated():
        for response in responses:
            got[response.uid].append((response.token, np.array(response.logprobs)))
    generator.close()
    for prompt, batched in zip(given, got.values()):
        assert len(batched) == 8
        alone = generate_step(mx.array(prompt), model, max_tokens=8)
        for (token, logprobs), (alone_token, alone_logprobs) in zip(batched, alone):
            expected = np.array(alone_logprobs)
            np.testing.assert_allclose(logprobs, expected, atol=TURNED_CODES)
            if token != alone_token:
                assert expected[alone_token] - expected[token] < TURNED_CODES
                break  # a tie: from here on the texts are different ones


def test_layers_in_f16_share_masks_with_packed_ones() -> None:
    """mlx-lm's own batch cache and ours lie in one model, and one mask serves both."""
    model = varied_model("llama", num_hidden_layers=6)
    attach(model, policy="boundary:1,1:f16/f16", k="turbo4", v="turbo3")
    assert {type(c).__name__ for c in model.make_cache()} == {"KVCache", "TurboKVCache"}
    given = prompts([45, 3, 70, 33], seed=2)
    response = batch_generate(
        model, tokenizer(), given, max_tokens=[3, 12, 5, 9], return_token_ids=True
    )
    alone = [one_by_one(model, p, n) for p, n in zip(given, [3, 12, 5, 9])]
    assert_alike(model, given, response.token_ids, alone)


def test_sequences_join_and_leave(finer: nn.Module) -> None:
    given = prompts([40, 5, 90, 17, 63], seed=3)
    wanted = [one_by_one(finer, prompt, 25) for prompt in given]
    generator = BatchGenerator(finer, max_tokens=25, prefill_batch_size=2, prefill_step_size=16)
    arrivals = {0: [0, 1], 9: [2], 14: [3, 4]}
    uids: dict[int, int] = {}
    got: dict[int, list[int]] = {i: [] for i in range(5)}
    for step in range(120):
        if step in arrivals:
            new = arrivals[step]
            for uid, i in zip(generator.insert([given[i] for i in new]), new):
                uids[uid] = i
        for response in generator.next()[1]:
            got[uids[response.uid]].append(response.token)
        if step == 18:
            gone = next(uid for uid, i in uids.items() if i == 1)
            generator.remove([gone])
    generator.close()
    assert 0 < len(got[1]) < 25
    wanted[1] = wanted[1][: len(got[1])]
    assert_alike(finer, given, [got[i] for i in range(5)], wanted)


def test_batch_runs_on_packed_caches_and_returns_them(finer: nn.Module) -> None:
    given = prompts([12, 50, 33], seed=4)
    response = batch_generate(
        finer, tokenizer(), given, max_tokens=10, return_prompt_caches=True, return_token_ids=True
    )
    texts = []
    for prompt, caches, tokens in zip(given, response.caches, response.token_ids):
        assert {type(c) for c in caches} == {TurboKVCache}
        assert caches[0].offset == len(prompt) + 10
        assert trim_prompt_cache(caches, 1) == 1
        texts.append(tokens + one_by_one(finer, tokens[-1:], 5, cache=caches))
    assert_alike(finer, given, texts, [one_by_one(finer, prompt, 15) for prompt in given])


def test_prompt_caches_are_continued_in_a_batch(finer: nn.Module) -> None:
    first = prompts([33, 4, 80], seed=5)
    rest = prompts([5, 20, 1], seed=6)
    caches = []
    for prompt in first:
        caches.append(make_prompt_cache(finer))
        finer(mx.array([prompt]), cache=caches[-1])
    response = batch_generate(
        finer, tokenizer(), rest, prompt_caches=caches, max_tokens=8, return_token_ids=True
    )
    whole = [a + b for a, b in zip(first, rest)]
    alone = [one_by_one(finer, prompt, 8) for prompt in whole]
    assert_alike(finer, whole, response.token_ids, alone)


def test_no_kv_is_left_in_the_models_own_precision(finer: nn.Module) -> None:
    generator = BatchGenerator(finer, max_tokens=30)
    generator.insert(prompts([600, 610], seed=7))
    while not generator.next()[1]:
        pass
    caches = generator._generation_batch.prompt_cache
    assert {type(c) for c in caches} == {BatchTurboKVCache}
    rows = caches[0].size()
    packed = 0
    for cache in caches:
        kinds = (cache.layout, rows), (protected_layout(cache.layout), 32 + 128 + 127)
        packed += sum(2 * 2 * n * (x.k_row_bytes + x.v_row_bytes) for x, n in kinds)
    assert generator.prompt_cache_nbytes <= packed < 0.75 * 2 * 2 * rows * len(caches) * 2 * 2 * 32
    generator.close()


def test_default_model_gives_the_same_in_a_batch() -> None:
    loaded = models.load()
    attach(loaded.model, policy="la-v7", sink=32, recent=128)
    texts = ["The capital of France is", "Hi", "Count with me: one, two, three, four,"]
    given = [loaded.tokenizer.encode(text) for text in texts]
    response = batch_generate(
        loaded.model, loaded.tokenizer, given, max_tokens=6, return_token_ids=True
    )
    alone = [one_by_one(loaded.model, prompt, 6) for prompt in given]
    assert_alike(loaded.model, given, response.token_ids, alone)
    detach(loaded.model)
