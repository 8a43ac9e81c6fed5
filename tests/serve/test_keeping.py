"""The server keeps what it read: of edited conversations, beyond its end, within its memory."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from gguf_files import TOKENS, write_small_gguf
from mlx_lm.server import GenerationContext
from model_folder import write_model_folder
from prometheus_client.parser import text_string_to_metric_families
from server_process import ask, running

from mlx_turbokv import load_policy
from mlx_turbokv.serve import prompt_cache, requests
from mlx_turbokv.serve.errors import RequestError
from mlx_turbokv.serve.generation import Generator
from mlx_turbokv.serve.jobs import Token
from mlx_turbokv.serve.models import TurboModelProvider
from mlx_turbokv.serve.options import parse
from mlx_turbokv.serve.schema import TextBody

pytestmark = pytest.mark.slow

EVERY = 64


@pytest.fixture(autouse=True)
def limit_of_mlx() -> Iterator[None]:
    """A server's limit is MLX's too."""
    before = mx.set_memory_limit(1 << 40)
    yield
    mx.set_memory_limit(before)


PATH = "/v1/completions"


@contextlib.contextmanager
def generating(model: str, *arguments: str, **own) -> Iterator[Generator]:
    options = parse(["--model", model, *arguments])
    vars(options).update(own)
    caches = prompt_cache.make(options)
    made = Generator(TurboModelProvider(options, policy=load_policy("la-v7")), caches)
    try:
        yield made
    finally:
        made.stop_and_join()
        caches.close()


def tokens_of(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, len(TOKENS)), k=n)


def answer(generator: Generator, prompt: list[int], **fields) -> tuple[list[int], int]:
    """(tokens, how many of the prompt's came from a cache)."""
    body = TextBody(**{"prompt": prompt, "max_tokens": 10, **fields})
    raw = body.model_dump_json(exclude_unset=True).encode()
    asked = generator.submit(requests.read(raw, TextBody, generator.cli_args))
    tokens, n_cached = [], 0
    while (item := generator.receive(asked, 60)[1]) is not None:
        if isinstance(item, Exception):
            raise item
        if isinstance(item, GenerationContext):
            n_cached = item.prompt_cache_count
        elif isinstance(item, Token):
            tokens.append(item.token)
    return tokens, n_cached


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "gemma3_text"])
def test_edited_last_turn_of_a_hybrid(name: str, tmp_path: Path) -> None:
    folder = str(write_model_folder(tmp_path / "model", name, max_position_embeddings=4096))
    first = tokens_of(300, 0)
    edited = [*first[:250], *tokens_of(40, 1)]
    alone = {"seed": 1, "temperature": 0}
    with generating(folder, "--prompt-cache-size", "0") as without:
        expected = [answer(without, prompt)[0] for prompt in (first, edited)]
    disk = str(tmp_path / "cache")
    own = {"checkpoint_every_n_tokens": EVERY, "ctx_checkpoints": 20, "prompt_cache_dir": disk}
    with generating(folder, **own) as generator:
        assert answer(generator, first) == (expected[0], 0)
        longer = [*first, *expected[0], *tokens_of(300, 2)]
        assert answer(generator, longer)[1] >= len(first)
        tokens, n_cached = answer(generator, edited)
        assert tokens == expected[1] and 250 - EVERY <= n_cached <= 250
        assert answer(generator, edited, **alone) == (expected[1], len(edited) - 1)
    with generating(folder, **own) as generator:  # from disk
        tokens, n_cached = answer(generator, [*longer[:-30], *tokens_of(50, 3)])
        assert n_cached >= len(longer) - 30 - EVERY
        assert generator.services.prompt_cache.counts.disk_hits == 1


def test_alone_too_a_hybrid_keeps_its_prompt(tmp_path: Path) -> None:
    folder = str(write_model_folder(tmp_path / "model", "lfm2", max_position_embeddings=4096))
    prompt, alone = tokens_of(300, 0), {"seed": 1, "temperature": 0}
    with generating(folder, "--prefill-step-size", "64") as generator:
        expected, n_cached = answer(generator, prompt, **alone)
        assert n_cached == 0
        assert answer(generator, prompt, **alone) == (expected, len(prompt) - 1)
        edited = [*prompt[:200], *tokens_of(20, 1)]
        assert 200 - 64 <= answer(generator, edited, **alone)[1] <= 200


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_small_gguf(tmp_path_factory.mktemp("keeping"), context=8192))


def test_too_large_is_413_and_the_next_small_request_is_answered(model: str) -> None:
    with generating(model, "--prefill-step-size", "128", memory_limit=16_000_000) as generator:
        tokens, _ = answer(generator, tokens_of(50, 0))
        for fields in ({}, {"seed": 1}):
            with pytest.raises(RequestError) as refused:
                answer(generator, tokens_of(8000, 1), **fields)
            assert refused.value.status == 413
            assert "8,000 prompt tokens" in str(refused.value)
            assert "the limit is 16.00 MB" in str(refused.value)
        assert answer(generator, tokens_of(50, 0))[0] == tokens


def test_peak_memory_stays_below_the_limit_in_a_run_that_fills_it(model: str) -> None:
    limit = 20_000_000
    options = ["--model", model, "-ctk", "f16", "-ctv", "f16", "--prefill-step-size", "64"]
    options += ["--memory-limit", f"{limit // 1000}kB", "--prompt-cache-size", "1000"]
    with running(*options) as (_, address):

        def complete(seed: int) -> int:
            n = random.Random(seed).randint(200, 1200)
            body = {"prompt": tokens_of(n, seed), "max_tokens": 8}
            return ask(address, PATH, body)[0]

        with ThreadPoolExecutor(2) as pool:
            statuses = set(pool.map(complete, range(60)))  # some 22 MB of K and V
        found = metrics(address)
    assert statuses == {200}
    assert found["prompt_cache_evictions_total/memory"] > 3
    assert found["prompt_cache_bytes"] > 0.2 * limit
    assert 0.5 * limit < found["memory_peak_bytes"] <= limit == found["memory_limit_bytes"]
    assert found["requests_total/200"] == 60 and found["generated_tokens_total"] > 60


def metrics(address: str) -> dict[str, float]:
    status, text = ask(address, "/metrics")
    assert status == 200
    return {
        "/".join([sample.name.removeprefix("turbokv_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_restart_goes_on_from_disk(model: str, tmp_path: Path) -> None:
    options = ["--model", model, "--prompt-cache-dir", str(tmp_path / "cache")]
    first = tokens_of(1000, 0)
    second = [*first, *tokens_of(40, 1)]
    body = {"prompt": second, "max_tokens": 8}
    with running(*options) as (process, address):
        ask(address, PATH, {"prompt": first, "max_tokens": 8})
        status, expected = ask(address, PATH, body)
        assert status == 200
        end = time.monotonic() + 30
        while metrics(address)["disk_writes_total"] < 1 and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    with running(*options) as (process, address):
        _, got = ask(address, PATH, body)
        assert got["choices"] == expected["choices"]
        assert got["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0.95 * len(second)
        found = metrics(address)
        assert found["prompt_cache_hits_total/disk"] == 1 and found["disk_damaged_total"] == 0
        process.terminate()
        assert process.wait(timeout=60) == 0
