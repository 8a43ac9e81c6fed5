"""What fails while MLX traces a function of the random state fails its own request alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import pytest
from generated_jobs import alone, result, submit
from gguf_files import write_small_gguf
from mlx_lm import server as mlx_lm_server
from mlx_lm.sample_utils import apply_xtc

from mlx_turbokv import load_policy
from mlx_turbokv.serve import prompt_cache
from mlx_turbokv.serve.generation import Generator
from mlx_turbokv.serve.models import TurboModelProvider
from mlx_turbokv.serve.options import parse
from mlx_turbokv.serve.random_state import kept_if_it_fails

pytestmark = pytest.mark.slow

BAD = 0.7  # the temperature of requests that fail


def is_answered(found: list) -> bool:
    """Tokens, of which sampling may choose the end early, and no exception."""
    return bool(found) and all(isinstance(token, int) for token in found)


@partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
def noise(logits: mx.array) -> mx.array:
    return logits + mx.random.uniform(shape=logits.shape) + apply_xtc(logits, 0.5, 0.9, [])


def bad_sampler(logprobs: mx.array) -> mx.array:
    return mx.argmax(apply_xtc(logprobs, 0.5, 0.9, []), axis=-1)


@pytest.fixture(scope="module", params=[None, 64], ids=["batched", "one at a time"])
def generator(request, tmp_path_factory) -> Iterator[Generator]:
    model = write_small_gguf(tmp_path_factory.mktemp("random"))
    options = parse(["--model", str(model)])
    policy = load_policy("la-v7")
    made = Generator(
        TurboModelProvider(options, policy=policy, max_kv_size=request.param),
        prompt_cache.make(options),
    )
    yield made
    made.stop_and_join()


@pytest.fixture(params=["sampler", "processor"])
def failing(request, monkeypatch) -> None:
    """The sampler, or the logits processor, of requests at BAD raises within what is compiled."""
    name = "_make_sampler" if request.param == "sampler" else "_make_logits_processors"
    original = getattr(mlx_lm_server, name)

    def make(args, *more):
        if args.sampling.temperature != BAD:
            return original(args, *more)
        return bad_sampler if request.param == "sampler" else [lambda _, logits: noise(logits)]

    monkeypatch.setattr(mlx_lm_server, name, make)


@pytest.mark.parametrize("seed", [None, 3])
def test_requests_after_one_that_failed_are_sampled(generator, failing, seed) -> None:
    failed = alone(generator, temperature=BAD, seed=seed)
    assert isinstance(failed[-1], ValueError)
    sampled = [alone(generator, temperature=1) for _ in range(2)]
    assert all(map(is_answered, sampled))
    assert alone(generator, temperature=1, seed=5) == alone(generator, temperature=1, seed=5)


def test_requests_beside_one_that_fails_are_sampled(generator, failing) -> None:
    answers = [submit(generator, prompt=prompt, temperature=1) for prompt in ("the", "a big")]
    bad = submit(generator, prompt="bad", temperature=BAD)
    answers.append(submit(generator, prompt="x y", temperature=1))
    assert isinstance(result(generator, bad)[-1], ValueError)
    found = [result(generator, answer) for answer in answers]
    assert all(map(is_answered, found))


def test_the_state_is_that_from_before() -> None:
    mx.random.seed((1 << 64) - 3)
    mx.random.uniform()
    before = mx.random.state[0].tolist()
    with pytest.raises(ValueError, match="threshold"), kept_if_it_fails():
        mx.random.uniform()
        apply_xtc(mx.zeros((1, 50)), 0.5, 0.9, [])
    assert mx.random.state[0].tolist() == before


def test_a_state_that_is_sound_goes_on() -> None:
    mx.random.seed(1)
    before = mx.random.state[0].tolist()
    with kept_if_it_fails():
        mx.random.uniform()
    assert mx.random.state[0].tolist() != before
