"""A request's bytes, checked and turned into what is generated: fields are read here alone.

What depends on the model, its vocabulary and its chat template, is checked by ``prompts.py``.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from typing import Any

from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import short
from ..log import warn_once
from .errors import RequestError
from .messages import ToolChoice
from .schema import Body, ChatBody, TextBody

DEFAULT_MODEL = "default_model"
# Colder ones, whose inverse is not finite in 16 bits, are taken as this one.
COLDEST = 0.001
# Arguments of the functions that apply a template, which are the server's to set.
TEMPLATE_ARGUMENTS = {"messages"}.union(
    *(
        inspect.signature(function).parameters
        for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    )
)


@dataclass
class Sampling(SamplingArguments):
    """Adds whether ``top_k`` is the server's own, which fits any vocabulary."""

    is_own_top_k: bool = False


@dataclass
class Asked:
    """A request that is well formed.

    Args:
        body: its fields.
        prompts: what to complete; each gives ``body.n`` choices.
        arguments: how, for each choice of a prompt.
        model: the model's name, as the client gave it.
    """

    body: ChatBody | TextBody
    prompts: list[CompletionRequest]
    arguments: list[GenerationArguments]
    model: str

    @property
    def is_chat(self) -> bool:
        """Whether messages are answered, in place of a text continued."""
        return isinstance(self.body, ChatBody)

    @property
    def stream(self) -> bool:
        """Whether tokens are sent as they come."""
        return bool(self.body.stream)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)


def read(raw: bytes, kind: type[Body], defaults: argparse.Namespace) -> Asked:
    """Check a request.

    Args:
        raw: its body, JSON.
        kind: ``ChatBody`` or ``TextBody``.
        defaults: the options of serve.

    Raises:
        RequestError: 400, with the first field that is not accepted.
    """
    try:
        body: Any = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _error(error, kind) from None
    if isinstance(body, ChatBody):
        prompts = [_chat(body)]
    else:
        prompts = [CompletionRequest("text", text, [], None, None) for text in body.prompts()]
    arguments = [_arguments(body, i, defaults) for i in range(body.n or 1)]
    return Asked(body, prompts, arguments, body.model or DEFAULT_MODEL)


def description(body: Body) -> Any:
    """The models that a request names; those that it leaves open are the server's own."""
    model, draft, adapter = body.model, body.draft_model, body.adapters
    return ModelDescription(model or DEFAULT_MODEL, draft or DEFAULT_MODEL, adapter)  # type: ignore[arg-type]


def _error(error: ValidationError, kind: type[Body]) -> RequestError:
    """One sentence about the first field that is not accepted."""
    errors = error.errors(include_url=False)
    # of a field's kinds of values, the one that fits best fails furthest within
    first = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=_depth)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(400, f"The request is no JSON ({message[14:]}).")
    if first["type"] == "fields":
        return RequestError(400, f"{message}.", first.get("ctx", {})["param"])
    param = str(first["loc"][0]) if first["loc"] else None
    field = kind.model_fields.get(param or "")
    if param is None or field is None:
        if first["type"] == "model_type":
            message = f"The request {short(first['input'])} is not accepted: give a JSON object"
        return RequestError(400, f"{message}.")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(400, f"The request has no {param}: give {field.description}.", param)
    places = [part for part in first["loc"][1:] if isinstance(part, int) or part in _FIELDS]
    where = param + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in places)
    value = "" if first["type"] == "missing" else f" {short(first['input'])}"
    message = message.replace(" after validation", "")
    is_told = bool(places) or first["type"] in ("too_long", "too_short")
    inner = f" ({message[:1].lower()}{message[1:]})" if is_told else ""
    return RequestError(
        400, f"{where}{value} is not accepted{inner}: give {field.description}.", param
    )


def _depth(error: Any) -> int:
    return len(error["loc"])


# Names within fields; the rest of a place are the names of types.
_FIELDS = {
    "role", "content", "text", "url", "image_url", "image", "tool_calls", "function", "name",
    "arguments", "id", "type", "tool_call_id", "description", "parameters", "include_usage",
}  # fmt: skip


def _chat(body: ChatBody) -> CompletionRequest:
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    for name in body.chat_template_kwargs or {}:
        if name in TEMPLATE_ARGUMENTS:
            raise RequestError(
                400,
                f"chat_template_kwargs {name!r} is not accepted: give variables of the chat "
                "template, such as enable_thinking.",
                "chat_template_kwargs",
            )
    if body.response_format is not None and body.response_format.type != "text":
        warn_once("response_format is not enforced: the model answers as its prompt asks.")
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        tools = []
    elif isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if choice == "required" or isinstance(choice, ToolChoice):
        warn_once("tool_choice is not enforced: the model may answer without the tool.")
    dumped = [tool.model_dump(exclude_unset=True) for tool in tools]
    return CompletionRequest("chat", "", messages, dumped or None, body.role_mapping)


def _arguments(body: ChatBody | TextBody, choice: int, cli: argparse.Namespace) -> Any:
    """How choice number ``choice`` of a prompt is generated."""

    def pick(name: str, default: Any) -> Any:
        value = getattr(body, name)
        return default if value is None else value

    temperature = pick("temperature", cli.temp)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    logprobs, top = body.logprobs, max(0, body.top_logprobs or 0)
    if isinstance(logprobs, int) and not isinstance(logprobs, bool):
        logprobs, top = True, max(top, logprobs)
    max_tokens = body.max_completion_tokens or body.max_tokens or cli.max_tokens
    return GenerationArguments(
        model=description(body),
        sampling=Sampling(
            temperature=max(temperature, COLDEST) if temperature > 0 else 0.0,
            top_p=pick("top_p", cli.top_p),
            top_k=pick("top_k", cli.top_k),
            min_p=pick("min_p", cli.min_p),
            xtc_probability=pick("xtc_probability", 0.0),
            xtc_threshold=pick("xtc_threshold", 0.1),
            is_own_top_k=body.top_k is None,
        ),
        logits=LogitsProcessorArguments(
            logit_bias=body.logit_bias or None,
            repetition_penalty=pick("repetition_penalty", 0.0),
            repetition_context_size=pick("repetition_context_size", 20),
            presence_penalty=pick("presence_penalty", 0.0),
            presence_context_size=pick("presence_context_size", 20),
            frequency_penalty=pick("frequency_penalty", 0.0),
            frequency_context_size=pick("frequency_context_size", 20),
        ),
        stop_words=[word for word in stop if word],
        max_tokens=max_tokens,
        num_draft_tokens=pick("num_draft_tokens", cli.num_draft_tokens),
        logprobs=bool(logprobs) or top > 0,
        top_logprobs=top,
        # MLX takes seeds without a sign
        seed=None if body.seed is None else (body.seed + choice) % (1 << 64),
        chat_template_kwargs=getattr(body, "chat_template_kwargs", None),
    )
