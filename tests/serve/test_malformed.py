"""Requests made from OpenAI's schema and then spoilt: one process answers them all."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator

import openai
import pytest
from gguf_files import write_small_gguf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from server_process import ask, running

pytestmark = pytest.mark.slow

N_MALFORMED = 500
# fails for some requests, as models' templates do
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}<|start|>{{ message.role + ' ' }}"
    "{{ message.content + '\n' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.arguments.x }}{% endfor %}{% endfor %}"
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.parameters.properties | tojson }}"
    "{{ tool_call.name }}</tool_call>{% endfor %}{% if x %}{{ x + 1 }}{% endif %}"
)
N_TOKENS = 4
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FIELDS = {
    CHAT: [*typing.get_type_hints(chat_params.CompletionCreateParamsBase)],
    TEXT: [*typing.get_type_hints(text_params.CompletionCreateParamsBase)],
}
# mlx_lm.server's own
MORE = ["top_k", "min_p", "xtc_probability", "xtc_threshold", "repetition_penalty",
        "repetition_context_size", "presence_context_size", "frequency_context_size", "adapters",
        "draft_model", "num_draft_tokens", "role_mapping", "chat_template_kwargs", "stream",
        "stream_options"]  # fmt: skip
MESSAGE = {"role": "user", "content": "the"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.one_of(
    st.integers(-3, 200),
    st.sampled_from([-1, 2**31, 2**63, 2**64, 2**70, 10**9, 10**300, -(2**63), -(2**70)]),
    st.floats(width=32),
    st.sampled_from([1e308, -1e308, 1e-320, -0.0, 0.5, 1e-7, float("inf"), float("nan")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.just("the"), st.just("auto"))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(texts | st.just("role"), inner, max_size=3)
    ),
    max_leaves=12,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "x"]) | values},
    optional={"text": values, "image_url": values},
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "developer", "assistant", "tool"]) | values,
            "content": st.just("the") | st.lists(parts, max_size=2) | values,
            "tool_calls": values | st.just([{"function": {"name": "f", "arguments": "{}"}}]),
        },
    ),
    max_size=3,
)
likely = {
    "messages": messages,
    "prompt": st.sampled_from(["", "the", ["the", "a"], [[1, 2], [3]], [0, 99], [100], [[]]]),
    "stop": st.lists(texts, max_size=3) | texts,
    "logit_bias": st.dictionaries(st.integers(-2, 120).map(str), numbers, max_size=3),
    "tools": st.lists(st.just(TOOL) | values, max_size=2),
    "tool_choice": st.sampled_from(["none", "required", {"type": "function"}]),
    "response_format": st.fixed_dictionaries({"type": values | st.just("json_object")}),
    "stream_options": st.fixed_dictionaries({"include_usage": values}),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["tokenize", "chat_template", "tools", "messages", "x"]), values, max_size=2
    ),
    "model": st.sampled_from(["default_model", "/etc", "../..", "a/b", "small llama"]),
    "n": st.integers(0, 4),
    "seed": st.integers(-(2**70), 2**70),
}


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """(path, body) of a request of which some fields, or the bytes, are not as they should be."""
    path = draw(st.sampled_from([CHAT, TEXT]))
    body: dict = {"messages": [MESSAGE]} if path == CHAT else {"prompt": "the"}
    for name in draw(st.lists(st.sampled_from([*FIELDS[path], *MORE]), min_size=1, max_size=4)):
        body[name] = draw(likely.get(name, values) | values)
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[name]
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and body[name] > 32:
            body[name] = 2**70  # what is accepted would be generated
    raw = json.dumps(body).encode()
    how = draw(st.integers(0, 19))
    if how == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif how == 1:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    elif how == 2:
        depth = draw(st.sampled_from([50, 200, 5000]))
        raw = b'{"prompt":' + b'{"a":[' * depth + b"1" + b"]}" * depth + b"}"
    return path, raw


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple]:
    model = write_small_gguf(tmp_path_factory.mktemp("malformed"))
    options = ("--model", str(model), "--max-tokens", str(N_TOKENS), "--log-level", "ERROR")
    options += ("--chat-template", TEMPLATE)
    with running(*options) as started:
        yield started


@pytest.fixture(scope="module")
def good(server):
    """Asks the openai client something, and checks the answer."""
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="x", timeout=60, max_retries=0)

    def answers() -> tuple:
        chat = client.chat.completions.create(model="default_model", messages=[MESSAGE])
        stream = client.chat.completions.create(
            model="default_model", messages=[MESSAGE], stream=True
        )
        chunks = [chunk.choices[0].delta.content or "" for chunk in stream]
        text = client.completions.create(model="small llama", prompt=["the", "a"], n=2)
        return (
            chat.choices[0].message.content or "", "".join(chunks),
            [choice.text for choice in text.choices],
        )  # fmt: skip

    first = answers()
    assert first[0] == first[1] and len(first[2]) == 4
    assert first[2][0] == first[2][1] != first[2][2] == first[2][3]

    def check() -> None:
        assert answers() == first

    return check


def test_malformed_requests_are_answered_and_good_ones_in_between(server, good) -> None:
    process, address = server
    sent: list[int] = []

    @settings(
        max_examples=N_MALFORMED, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests())
    @example((TEXT, b'{"prompt": ""}'))
    @example((TEXT, b'{"prompt": "a", "top_k": 1000000000}'))
    @example((TEXT, b'{"prompt": "a", "stop": [5]}'))
    @example((TEXT, b'{"prompt": "a", "logit_bias": {"100": 1}}'))
    @example((TEXT, b'{"prompt": "a", "logit_bias": {"99999999999": 1}}'))
    @example((TEXT, b'{"prompt": "a", "temperature": 1e-300, "seed": -1}'))
    @example((TEXT, b'{"prompt": "\\ud800"}'))
    def send(request: tuple[str, bytes]) -> None:
        path, raw = request
        status, answer = ask(address, path, raw)
        sent.append(status)
        if status == 200:
            assert "choices" in answer or answer.endswith("data: [DONE]\n\n")
        else:
            assert 400 <= status < 500, answer
            assert isinstance(answer["error"]["message"], str) and answer["error"]["message"]
            assert answer["error"]["type"] == "invalid_request_error"
        if len(sent) % 25 == 0:
            good()

    send()
    good()
    assert process.poll() is None
    assert ask(address, "/health") == (200, {"status": "ok"})
    assert sent.count(200) > 25 and sent.count(400) > 250
    assert "Traceback" not in "".join(process.said)
