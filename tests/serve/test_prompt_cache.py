"""The prompt cache: answers as without it, from memory and from disk."""

from __future__ import annotations

import copy
import random
from functools import cache as memoised

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from varied_models import varied_model

from mlx_turbokv import attach
from mlx_turbokv.serve import checkpoints
from mlx_turbokv.serve.disk import DiskCache
from mlx_turbokv.serve.identity import CacheKind
from mlx_turbokv.serve.prompt_cache import LEAST_GAIN, LEAST_PROMPT, PromptCache

pytestmark = pytest.mark.slow

EVERY = 64
HYBRIDS = ["qwen3_5", "lfm2", "gemma3_text"]
KEY = ("model", None, None)


@memoised
def model_of(name: str, sliding: bool = False):
    model = varied_model(name, max_position_embeddings=4096)
    options = {"backend": "reference", "compress_sliding": sliding}
    # with newest tokens protected an answer depends on where the prompt was cut
    return attach(model, "q8_0", "turbo3", **options, sink=32, recent=0)


def prompt_of(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, 90), k=n)


class Service:
    """Answers prompts as the server does: segments, and what is kept at their ends."""

    def __init__(self, model, disk: DiskCache | None = None, size: int = 10) -> None:
        self.model = model
        self.cache = PromptCache(size, disk=disk)
        self.cache.serve_models(lambda: [model])

    def answer(self, prompt: list[int], n: int = 12) -> tuple[list[int], int]:
        """(tokens, how many of the prompt's came from the cache)."""
        caches, rest = self.cache.fetch_nearest_cache(KEY, prompt)
        assert rest and prompt[len(prompt) - len(rest) :] == list(rest)
        caches = caches or make_prompt_cache(self.model)
        held = prompt[: len(prompt) - len(rest)]
        cut, _ = checkpoints.split_at_multiples([prompt[:-1]], ["user"], EVERY)
        ends = [sum(map(len, cut[: i + 1])) for i in range(len(cut))]
        for end in ends:
            if end <= len(held):
                continue
            self.model(mx.array([prompt[len(held) : end]]), cache=caches)
            held = prompt[:end]
            self.cache.insert_cache(KEY, held, copy.deepcopy(caches), cache_type="user")
        token, tokens = prompt[-1], []
        for _ in range(n):
            logits = self.model(mx.array([[token]]), cache=caches)
            held = [*held, token]
            token = int(mx.argmax(logits[0, -1]))
            tokens.append(token)
        self.cache.insert_cache(KEY, held, caches)
        return tokens, len(prompt) - len(rest)


@memoised
def fresh_answer(name: str, sliding: bool, prompt: tuple[int, ...]) -> list[int]:
    return Service(model_of(name, sliding)).answer(list(prompt))[0]


@pytest.mark.parametrize(
    ("name", "sliding"),
    [("llama", False), *((name, False) for name in HYBRIDS), ("gemma3_text", True)],
)
def test_edited_last_turn_reuses_its_prefix(name: str, sliding: bool) -> None:
    service = Service(model_of(name, sliding))
    first = prompt_of(200)
    tokens, n = service.answer(first)
    assert n == 0 and tokens == fresh_answer(name, sliding, tuple(first))
    longer = [*first, *tokens[:-1], *prompt_of(70, 1)]
    assert service.answer(longer)[1] >= len(first) + len(tokens) - 1
    edited = [*longer[:-30], *prompt_of(40, 2)]
    tokens, n = service.answer(edited)
    assert tokens == fresh_answer(name, sliding, tuple(edited))
    assert n >= len(longer) - 30 - EVERY
    assert len(service.cache) == 2


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_the_same_prompt_leaves_a_token_to_read(name: str) -> None:
    service = Service(model_of(name))
    prompt = prompt_of(130)
    tokens, _ = service.answer(prompt)
    again, n = service.answer(prompt)
    assert (again, n) == (tokens, len(prompt) - 1)
    whole = [*prompt, *tokens[:-1]]
    more, n = service.answer(whole)  # exactly what an entry holds
    assert more[0] == tokens[-1]
    assert len(prompt) - 1 <= n < len(whole)


@settings(deadline=None, max_examples=5)
@given(
    name=st.sampled_from(["llama", *HYBRIDS]),
    sliding=st.booleans(),
    turns=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 150), st.integers(1, 60)),
        min_size=2,
        max_size=4,
    ),
    size=st.integers(0, 3),
)
def test_any_requests_are_answered_as_without_a_cache(name, sliding, turns, size) -> None:
    service = Service(model_of(name, sliding), size=size)
    for seed, n_shared, n_new in turns:
        prompt = [*prompt_of(150, seed)[:n_shared], *prompt_of(n_new, 7 + seed)]
        assert service.answer(prompt)[0] == fresh_answer(name, sliding, tuple(prompt))
        assert len(service.cache) <= size
        held = [entry for _, entry in service.cache._entries]
        assert service.cache.nbytes == sum(entry.nbytes for entry in held)


@pytest.mark.parametrize("name", ["llama", "lfm2", "gemma3_text"])
def test_conversation_goes_on_after_a_restart(name: str, tmp_path) -> None:
    model = model_of(name)
    first = prompt_of(LEAST_PROMPT + 100)
    disk = DiskCache(tmp_path / "cache")
    service = Service(model, disk)
    tokens, _ = service.answer(first)
    longer = [*first, *tokens[:-1], *prompt_of(50, 1)]
    expected, n_memory = service.answer(longer)
    service.cache.close()
    n_files = len(list((tmp_path / "cache").glob("entry-*")))
    assert n_files == 1  # the longer one replaced its own prefix

    service = Service(model, DiskCache(tmp_path / "cache"))
    got, n_disk = service.answer(longer)
    assert got == expected
    assert n_disk >= n_memory > 0.9 * len(longer)
    edited = [*longer[:-20], *prompt_of(30, 2)]
    got, n = service.answer(edited)
    assert got == fresh_answer(name, False, tuple(edited))
    assert n >= len(longer) - 20 - EVERY
    counts = service.cache.counts
    assert (counts.disk_hits, counts.memory_hits, counts.misses) == (1, 1, 0)
    service.cache.close()


def test_short_prompts_are_not_written(tmp_path) -> None:
    service = Service(model_of("llama"), DiskCache(tmp_path))
    service.answer(prompt_of(LEAST_PROMPT - 1), n=5)
    service.cache.close()
    assert not list(tmp_path.glob("entry-*"))


def attached(v: str = "turbo3", seed: int = 0, length: int = 4096, **options):
    model = varied_model("llama", seed, max_position_embeddings=length)
    return attach(model, "q8_0", v, **options)


def test_entries_of_other_models_and_policies_are_not_used(tmp_path) -> None:
    prompt = prompt_of(LEAST_PROMPT)
    service = Service(model_of("llama"), DiskCache(tmp_path))
    service.answer(prompt)
    service.cache.close()
    others = [
        attached("turbo4", sink=32, recent=0),
        attached(sink=32, recent=0, seed=1),
        attached(sink=32, recent=0, length=2048),
        attached(),
    ]
    for other in others:
        service = Service(other, DiskCache(tmp_path))
        assert service.answer(prompt)[1] == 0
        service.cache.close()
    service = Service(attached(sink=32, recent=0), DiskCache(tmp_path))
    assert service.answer(prompt)[1] == len(prompt) - 1
    service.cache.close()


def test_identity_sees_weights_formats_and_windows() -> None:
    def digest(name="llama", seed=0, k="q8_0", v="turbo3", sliding=False) -> str:
        model = varied_model(name, seed)
        return CacheKind.of([attach(model, k, v, compress_sliding=sliding)]).digest

    found = [digest(), digest(seed=1), digest(k="turbo4"), digest(v="turbo2"), digest("qwen2")]
    found += [digest("gemma3_text"), digest("gemma3_text", sliding=True)]
    assert len(set(found)) == len(found)
    assert digest() == found[0]


def test_least_gain_and_prompt_are_those_of_the_documentation() -> None:
    assert (LEAST_GAIN, LEAST_PROMPT) == (128, 512)


@given(segments=st.lists(st.integers(1, 40), min_size=1, max_size=4), every=st.integers(1, 50))
def test_segments_are_cut_at_multiples(segments: list[int], every: int) -> None:
    tokens = list(range(sum(segments)))
    ends = np.cumsum(segments).tolist()
    given = [tokens[a:b] for a, b in zip([0, *ends], ends)]
    cut, kinds = checkpoints.split_at_multiples(given, [str(n) for n in ends], every)
    assert sum(cut, []) == tokens and all(cut) and len(kinds) == len(cut)
    multiples = set(range(every, len(tokens), every))
    assert set(np.cumsum([len(x) for x in cut]).tolist()) == multiples | set(ends)
    assert all(int(kind) > part[-1] for part, kind in zip(cut, kinds))


@given(marks=st.sets(st.integers(1, 999), max_size=40), most=st.integers(0, 10))
def test_marks_are_thinned_towards_the_start(marks: set[int], most: int) -> None:
    kept = sorted(checkpoints.thinned({p: [] for p in marks}, 1000, most))
    assert len(kept) == min(most, len(marks)) and marks >= set(kept)
    every = {p: [] for p in range(50, 1000, 50)}
    kept = sorted(checkpoints.thinned(every, 1000, 8))
    assert kept[-2:] == [900, 950]
