"""What fails while the server runs fails the requests that it belongs to, or the process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import mlx.core as mx
import pytest
from generated_jobs import alone, result, submit
from gguf_files import write_small_gguf
from mlx_lm import server as mlx_lm_server
from model_folder import write_model_folder
from server_process import ask, running

from mlx_turbokv import load_policy
from mlx_turbokv.errors import InputError
from mlx_turbokv.serve import batches, prompt_cache
from mlx_turbokv.serve.errors import RequestError
from mlx_turbokv.serve.generation import Generator
from mlx_turbokv.serve.models import TurboModelProvider
from mlx_turbokv.serve.options import parse

pytestmark = pytest.mark.slow

PATH = "/v1/completions"
BAD = 0.7  # the temperature of requests that fail


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_small_gguf(tmp_path_factory.mktemp("failures")))


@pytest.fixture(scope="module")
def generator(model: str) -> Iterator[Generator]:
    options = parse(["--model", model])
    made = Generator(
        TurboModelProvider(options, policy=load_policy("la-v7")), prompt_cache.make(options)
    )
    yield made
    made.stop_and_join()


def failing_sampler(after: int):
    """Makes mlx-lm's samplers, but for requests at BAD one that fails after some tokens."""
    original = mlx_lm_server._make_sampler

    def make(args, tokenizer):
        if args.sampling.temperature != BAD:
            return original(args, tokenizer)
        calls = []

        def sampler(logprobs: mx.array) -> mx.array:
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("no luck")
            return mx.argmax(logprobs, axis=-1)

        return sampler

    return make


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_exception_fails_the_request_that_it_belongs_to(generator, monkeypatch, after) -> None:
    prompts = ["the", "th a", "a big the", "x y z"]
    expected = [alone(generator, prompt=prompt) for prompt in prompts]
    monkeypatch.setattr(mlx_lm_server, "_make_sampler", failing_sampler(after))
    answers = [submit(generator, prompt=prompt) for prompt in prompts[:2]]
    bad = submit(generator, prompt="bad", temperature=BAD)
    answers += [submit(generator, prompt=prompt) for prompt in prompts[2:]]
    failed = result(generator, bad)
    assert isinstance(failed[-1], RuntimeError)
    assert [result(generator, answer) for answer in answers] == expected
    assert generator.status == "ok"


def test_a_seeded_request_fails_by_itself(generator, monkeypatch) -> None:
    expected = alone(generator)
    monkeypatch.setattr(mlx_lm_server, "_make_sampler", failing_sampler(2))
    assert isinstance(alone(generator, temperature=BAD, seed=1)[-1], RuntimeError)
    assert alone(generator) == expected


def test_a_failing_prompt_cache_costs_no_answer(generator, monkeypatch) -> None:
    expected = alone(generator)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(generator.prompt_cache, "insert_cache", fail)
    assert alone(generator) == expected == alone(generator)


def test_a_failing_prefill_fails_its_batch_alone(generator, monkeypatch) -> None:
    expected = alone(generator, prompt="the th")
    step, calls = batches.BatchGenerator.next, []

    def fail_once(self):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("[malloc] Unable to allocate")
        return step(self)

    monkeypatch.setattr(batches.BatchGenerator, "next", fail_once)
    answers = [submit(generator, prompt="the th") for _ in range(2)]
    found = [result(generator, answer) for answer in answers]
    # nothing says whose fault it was: both go on, one by one
    assert len(calls) > 4 and expected in found
    assert all(tokens == expected or isinstance(tokens[-1], MemoryError) for tokens in found)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_prompt_that_is_cached_to_its_last_token(generator, seed) -> None:
    """A finished answer's tokens are in the prompt cache: asked for again, they all are."""
    prompt = [40, 41, 42]
    tokens = alone(generator, prompt=prompt, seed=seed)
    more = alone(generator, prompt=prompt + tokens, seed=seed)
    assert more == alone(generator, prompt=prompt + tokens, seed=seed)
    assert len(more) == 12


def test_cancelled_requests_are_dropped(generator) -> None:
    answers = [submit(generator, max_tokens=1 << 20, seed=seed) for seed in (None, 1, None, 2)]
    time.sleep(0.3)
    for answer in answers:
        answer.cancel()
    begun = time.monotonic()
    assert len(alone(generator)) == 12
    assert time.monotonic() - begun < 20


def test_admission_refuses_before_anything_is_computed(generator, monkeypatch) -> None:
    def admit(job, n_cached, caches) -> None:
        if len(job.prompt) > 5:
            raise RequestError(413, "too large")

    monkeypatch.setattr(generator, "admit", admit)
    expected = alone(generator)
    running = submit(generator)
    for seed in (None, 1):
        refused = alone(generator, prompt="a b c d e f g h", seed=seed)
        assert [type(item) for item in refused] == [RequestError]
    assert result(generator, running) == expected


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Iterator[Generator]:
    """A model whose embedding has 28 rows more than the tokenizer has tokens."""
    folder = write_model_folder(tmp_path_factory.mktemp("padded"), "llama", vocab_size=128)
    options = parse(["--model", str(folder)])
    made = Generator(
        TurboModelProvider(options, policy=load_policy("la-v7")), prompt_cache.make(options)
    )
    yield made
    made.stop_and_join()


@pytest.mark.parametrize("seed", [None, 7])
def test_tokens_without_a_text_add_none(padded: Generator, seed: int | None) -> None:
    fields = {"temperature": 1000, "max_tokens": 100, "seed": seed, "logprobs": 20}
    tokens = alone(padded, **fields, logit_bias={0: -10_000})
    assert len(tokens) == 100 and max(tokens) >= 100


@pytest.mark.parametrize(
    "fields",
    [{"logit_bias": {100: 1}}, {"logit_bias": {127: 1}}, {"logit_bias": {1 << 40: 1}},
     {"prompt": [5, 100]}, {"top_k": 100}, {"prompt": ""}],
)  # fmt: skip
@pytest.mark.parametrize("seed", [None, 7])
def test_what_the_vocabulary_has_not_is_refused(padded: Generator, fields, seed) -> None:
    (error,) = alone(padded, **fields, seed=seed)
    assert isinstance(error, RequestError) and error.status == 400
    assert error.param == next(iter(fields))
    assert len(alone(padded, logit_bias={99: 1})) == 12


DIES = """
import threading, time
from mlx_turbokv.serve.generation import Generator
original = Generator._next_job
calls = []
def next_job(self):
    job = original(self)
    if job is not None:
        calls.append(job)
        if len(calls) == 3:
            {how}
    return job
Generator._next_job = next_job
from mlx_turbokv.serve.connections import Server
start = Server.process_request
def slow_start(self, *connection):
    start(self, *connection)
    time.sleep(0.5)  # the thread that accepts is behind the one that answers
Server.process_request = slow_start
from mlx_turbokv.cli.serve import main
main()
"""


@pytest.mark.parametrize("how", ["raise KeyError('a bug')", "raise SystemExit(0)"])
def test_a_thread_that_ends_ends_the_process(model: str, how: str) -> None:
    command = [sys.executable, "-c", DIES.format(how=how)]
    with running("--model", model, command=command) as (process, address):
        body = {"prompt": "the", "max_tokens": 3}
        assert ask(address, PATH, body)[0] == ask(address, PATH, body)[0] == 200
        waiting = []
        thread = threading.Thread(target=lambda: waiting.append(ask(address, PATH, body)))
        thread.start()
        assert process.wait(timeout=30) == 1
        thread.join(timeout=30)
    ((status, answer),) = waiting
    assert status == 503 and answer["error"]["type"] == "server_error"


def test_health_tells_whether_the_model_is_loaded(model: str, monkeypatch) -> None:
    options, go_on = parse(["--model", model]), threading.Event()
    load = TurboModelProvider.load_default

    def slow(self) -> None:
        go_on.wait(30)
        load(self)

    monkeypatch.setattr(TurboModelProvider, "load_default", slow)
    provider = TurboModelProvider(options, policy=load_policy("la-v7"))
    made = Generator(provider, prompt_cache.make(options))
    assert made.status == "loading model"
    go_on.set()
    assert len(alone(made)) == 12
    assert made.status == "ok"
    made.stop_and_join()
    assert made.status == "unavailable"


def test_a_model_that_cannot_be_loaded_is_the_failure(monkeypatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(Generator, "_end_process", lambda self: ended.set())
    options = parse(["--model", "/nowhere/at/all"])
    made = Generator(
        TurboModelProvider(options, policy=load_policy("la-v7")), prompt_cache.make(options)
    )
    assert ended.wait(30)
    assert isinstance(made.failure, InputError) and made.status == "unavailable"
    made.join()
