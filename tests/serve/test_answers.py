"""What clients are sent, against the openai package's types, however text is cut into tokens."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlx_turbokv.serve import requests
from mlx_turbokv.serve.answers import ChoiceText, Completion
from mlx_turbokv.serve.jobs import Token
from mlx_turbokv.serve.schema import ChatBody, TextBody

CALL = '{"name": "f", "arguments": {"x": "é"}}'
SAID = (
    f"so <think>it is</think>here<tool_call>{CALL}</tool_call> done <tool_call>no call</tool_call>."
)
DEFAULTS = Namespace(temp=0, top_p=1, top_k=0, min_p=0, max_tokens=512, num_draft_tokens=3)
MACHINE = TextStateMachine(
    {
        "normal": [("<think>", "reasoning"), ("<tool_call>", "tool")],
        "reasoning": [("</think>", "normal")],
        "tool": [("</tool_call>", "normal")],
    }
)


def context() -> GenerationContext:
    return GenerationContext(
        has_tool_calling=True, has_thinking=True, tool_parser=lambda text, _: json.loads(text),
        text_sm=MACHINE, initial_state="normal", prompt=[1, 2, 3], prompt_cache_count=2,
    )  # fmt: skip


def tokens(text: str, cuts: list[int], finish_reason: str, logprobs: bool) -> list[Token]:
    edges = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(edges, edges[1:])]
    if finish_reason == "stop":
        pieces.append("")
    found = []
    for i, piece in enumerate(pieces):
        entry = {"id": i, "token": piece, "logprob": -0.5, "bytes": list(piece.encode())}
        last = finish_reason if i == len(pieces) - 1 else None
        found.append(
            Token(piece, i, last, entry if logprobs else None, (entry,) if logprobs else ())
        )
    return found


def completion(kind, **fields) -> Completion:
    body = {"prompt": "a"} if kind is TextBody else {"messages": [{"role": "user", "content": "a"}]}
    return Completion(requests.read(json.dumps({**body, **fields}).encode(), kind, DEFAULTS))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 200), max_size=30), st.sampled_from(["stop", "length"]), st.booleans()
)
def test_chat_is_the_same_whole_and_in_chunks(cuts, finish_reason, logprobs) -> None:
    sent = tokens(SAID, cuts, finish_reason, logprobs)
    asked = {"logprobs": logprobs, **({"top_logprobs": 1} if logprobs else {})}
    whole, choice = completion(ChatBody, **asked), ChoiceText(context(), [], False)
    for token in sent:
        choice.add(token)
    answer = ChatCompletion.model_validate(whole.whole([choice]), strict=False)
    message = answer.choices[0].message
    assert message.content == "so here done no call."
    assert message.reasoning == "it is"
    assert [call.function.arguments for call in message.tool_calls] == ['{"x": "é"}']
    assert answer.choices[0].finish_reason == (
        "tool_calls" if finish_reason == "stop" else "length"
    )
    assert answer.usage.total_tokens == 3 + len(sent)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    stream, choice = completion(ChatBody, stream=True, **asked), ChoiceText(context(), [], True)
    chunks = []
    for token in sent:
        choice.add(token)
        if choice.has_part or choice.finish_reason:
            chunk = stream.chunk([stream.part(0, choice)])
            chunks.append(ChatCompletionChunk.model_validate(chunk))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == message.reasoning
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "f")]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    if logprobs:
        content = [e for c in chunks for e in c.choices[0].logprobs.content]
        assert content == answer.choices[0].logprobs.content and len(content) == len(sent)
        assert content[0].top_logprobs[0].token == content[0].token


def test_a_text_completion_with_echo_and_log_probabilities() -> None:
    answer = completion(TextBody, prompt=["a", "b"], n=2, logprobs=1)
    choices = []
    for _ in range(4):
        plain = context()
        plain.text_sm = TextStateMachine(None)
        choices.append(ChoiceText(plain, None, False))
        for token in tokens("<think>x", [3], "length", True):
            choices[-1].add(token)
    answer.echo(1, "the prompt: ")
    found = OpenAICompletion.model_validate(answer.whole(choices))
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[:2]] == ["<think>x", "the prompt: <think>x"]
    assert found.choices[0].logprobs.text_offset == [0, 3]
    assert found.choices[0].logprobs.top_logprobs == [{"<th": -0.5}, {"ink>x": -0.5}]
    assert found.usage.prompt_tokens == 6 and found.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("fields", "attribute", "expected"),
    [
        ({"temperature": 1e-300}, "sampling.temperature", 0.001),
        ({"temperature": 0}, "sampling.temperature", 0.0),
        ({"temperature": None}, "sampling.temperature", 0.0),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"stop": "x"}, "stop_words", ["x"]),
        ({"stop": ""}, "stop_words", []),
        ({"max_tokens": None}, "max_tokens", 512),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", 4),
        ({"logprobs": 3}, "top_logprobs", 3),
        ({"logit_bias": {"5": 1}}, "logits.logit_bias", {5: 1.0}),
        ({"model": "m"}, "model.model", "m"),
    ],
)
def test_fields_become_arguments(fields: dict, attribute: str, expected: object) -> None:
    value = completion(TextBody, **fields).asked.arguments[0]
    for name in attribute.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_choices_of_a_seed_have_seeds_of_their_own() -> None:
    asked = completion(TextBody, seed=2**64 - 1, n=3).asked
    assert [arguments.seed for arguments in asked.arguments] == [2**64 - 1, 0, 1]
