"""What requests are refused for: the field, its value and what is accepted."""

from __future__ import annotations

import json
import math
from argparse import Namespace

import mlx.core as mx
import pytest
from mlx_lm import server as mlx_lm_server

from mlx_turbokv.serve import prompts, requests
from mlx_turbokv.serve.errors import RequestError
from mlx_turbokv.serve.schema import MOST_PROMPTS, ChatBody, TextBody

DEFAULTS = Namespace(temp=0, top_p=1, top_k=0, min_p=0, max_tokens=512, num_draft_tokens=3)
N_TOKENS = 50


def read(kind: type, **fields) -> requests.Asked:
    needed = {"prompt": "a"} if kind is TextBody else {"messages": [{"role": "u", "content": "a"}]}
    return requests.read(json.dumps({**needed, **fields}).encode(), kind, DEFAULTS)


def refused(kind: type, **fields) -> RequestError:
    with pytest.raises(RequestError) as found:
        read(kind, **fields)
    assert found.value.status == 400
    return found.value


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a"] * (MOST_PROMPTS + 1), [f"at most {MOST_PROMPTS} items", str(MOST_PROMPTS + 1)]),
        ([[1]] * (MOST_PROMPTS + 1), [f"at most {MOST_PROMPTS} items", str(MOST_PROMPTS + 1)]),
        ([-1], ["prompt[0] -1 ", "greater than or equal to 0"]),
        ([[1], [2, -1]], ["prompt[1][1] -1 ", "greater than or equal to 0"]),
        ([[]], ["prompt[0] [] ", "at least 1 item"]),
        ([], ["prompt [] ", "at least 1 item"]),
        (["a", 1], ["prompt[1] 1 ", "string"]),
        ([1, "a"], ["prompt[1] 'a' ", "integer"]),
        ([1.5], ["prompt[0] 1.5 ", "integer"]),
        ([[1], "a"], ["prompt[1] 'a' "]),
        ([None], ["prompt[0] None "]),
        (5, ["prompt 5 "]),
        ({"a": 1}, ["prompt {'a': 1} "]),
    ],
)
def test_a_prompt_is_refused_for_what_is_wrong_with_it(prompt, words) -> None:
    error = refused(TextBody, prompt=prompt)
    assert error.param == "prompt"
    assert all(word in str(error) for word in [*words, "give a text"]), str(error)


@pytest.mark.parametrize("prompt", ["", "a", ["a"] * MOST_PROMPTS, [1] * 3000, [[1], [2, 3]]])
def test_prompts_of_every_kind_are_read(prompt) -> None:
    n = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert len(read(TextBody, prompt=prompt).prompts) == n


FUNCTION = {"type": "function", "function": {"name": "unknown"}}


@pytest.mark.parametrize(
    ("kind", "fields", "param", "words"),
    [
        (TextBody, {"repetition_penalty": 1e-30}, "repetition_penalty", "1e-30"),
        (TextBody, {"best_of": 3}, "best_of", "best_of 3"),
        (TextBody, {"n": 100, "prompt": ["a"] * 100}, "n", "n = 100"),
        (TextBody, {"echo": True, "logprobs": 1}, "echo", "echo"),
        (TextBody, {"stop": "a" * 1001}, "stop", "1000 characters"),
        (ChatBody, {"stream_options": {}}, "stream_options", "stream: true"),
        (ChatBody, {"tool_choice": FUNCTION}, "tool_choice", "'unknown'"),
        (ChatBody, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "'messages'"),
        (
            ChatBody, {"chat_template_kwargs": {"conversations": 1}}, "chat_template_kwargs",
            "'conversations'",
        ),
        (ChatBody, {"logprobs": False, "top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        (TextBody, {"logprobs": False, "top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        (ChatBody, {"top_logprobs": -2}, "top_logprobs", "-1 for none"),
        (ChatBody, {"xtc_threshold": 0.51}, "xtc_threshold", "0.51"),
    ],
)  # fmt: skip
def test_the_error_names_the_field(kind, fields, param, words) -> None:
    error = refused(kind, **fields)
    assert error.param == param
    assert words in str(error) and str(error).count(".") - str(fields).count(".") <= 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_logprobs": 3}, (True, 3)),
        ({"top_logprobs": -1}, (False, 0)),
        ({"logprobs": False, "top_logprobs": 0}, (False, 0)),
        ({"logprobs": True, "top_logprobs": -1}, (True, 0)),
    ],
)
def test_log_probabilities_are_what_is_asked_for(fields, expected) -> None:
    arguments = read(ChatBody, **fields).arguments[0]
    assert (arguments.logprobs, arguments.top_logprobs) == expected


class Tokenizer:
    eos_token_ids = (3,)

    def encode(self, text: str) -> list[int]:
        return [1]


SAMPLING = {
    "temperature": [1e-300, 0.001, 1000], "top_p": [0, 1e-300, 1e-9, 1],
    "top_k": [0, 1, N_TOKENS - 1], "min_p": [0, 1e-300, 1],
    "xtc_probability": [0, 1e-9, 1], "xtc_threshold": [0, 0.5],
    "repetition_penalty": [0, 0.01, 100], "repetition_context_size": [0, 1 << 24],
    "presence_penalty": [-100, 100], "presence_context_size": [0, 1 << 24],
    "frequency_penalty": [-100, 100], "frequency_context_size": [0, 1 << 24],
    "logit_bias": [{"4": 10_000}, {"4": -10_000}],
}  # fmt: skip
ALL = {"temperature": 1, "xtc_probability": 0.5, "presence_penalty": 1, "repetition_penalty": 2}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SAMPLING.items() for value in values]
)
def test_mlx_lm_accepts_the_ends_of_every_range(name, value) -> None:
    asked = read(TextBody, **{**ALL, name: value})
    args = asked.arguments[0]
    prompts.check_vocabulary(asked.prompts[0], args, N_TOKENS)
    logits = mx.random.normal((1, N_TOKENS)).astype(mx.float16)
    for process in mlx_lm_server._make_logits_processors(args):
        logits = process(mx.array([1, 2, 3]), logits)
    token = mlx_lm_server._make_sampler(args, Tokenizer())(logits - mx.logsumexp(logits))
    assert 0 <= token.item() < N_TOKENS


@pytest.mark.parametrize("name", [name for name in SAMPLING if name != "logit_bias"])
def test_numbers_beyond_a_range_are_refused(name) -> None:
    values = SAMPLING[name]
    most = [] if name == "top_k" else [values[-1] * 1.01, values[-1] * 2]  # as the vocabulary is
    for value in [*most, values[0] - 1, math.inf, math.nan]:
        assert refused(TextBody, **{name: value}).param == name


@pytest.mark.parametrize(
    ("own", "asked", "expected"), [(1000, None, 49), (7, None, 7), (9, 20, 20)]
)
def test_the_servers_own_top_k_fits_every_vocabulary(monkeypatch, own, asked, expected) -> None:
    monkeypatch.setattr(DEFAULTS, "top_k", own)
    found = read(TextBody, top_k=asked)
    prompts.check_vocabulary(found.prompts[0], found.arguments[0], N_TOKENS)
    assert found.arguments[0].sampling.top_k == expected


def test_a_top_k_that_is_asked_for_is_checked(monkeypatch) -> None:
    monkeypatch.setattr(DEFAULTS, "top_k", N_TOKENS)
    found = read(TextBody, top_k=N_TOKENS)
    with pytest.raises(RequestError, match=f"top_k {N_TOKENS}"):
        prompts.check_vocabulary(found.prompts[0], found.arguments[0], N_TOKENS)
