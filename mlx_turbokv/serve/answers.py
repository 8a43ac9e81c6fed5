"""What a client is sent: completions and their chunks, as OpenAI's API gives them."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, ToolCallFormatter, get_system_fingerprint

from .jobs import Token
from .requests import Asked

logger = logging.getLogger(__name__)


class ChoiceText:
    """The text of one choice as it grows: reasoning, calls of tools and what is said are apart.

    Attributes:
        n_tokens: how many there are.
        finish_reason: None until the last one.

    Args:
        context: of the choice.
        tools: that the model may use.
        stream: whether parts are taken as they come.
    """

    def __init__(self, context: GenerationContext, tools: Any, stream: bool) -> None:
        self.n_tokens = 0
        self.finish_reason: str | None = None
        self.n_prompt = len(context.prompt)
        self.n_cached = max(0, context.prompt_cache_count)
        self._machine = context.text_sm.make_state(context.initial_state)
        self._state = context.initial_state
        self._formatter = ToolCallFormatter(_parser(context), tools, stream)
        self._call = ""
        self._made_call = False
        self._clear()

    def _clear(self) -> None:
        self.text = self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[tuple[Token, int]] = []
        self._length = getattr(self, "_length", 0)

    def add(self, token: Token) -> None:
        """Take a token."""
        self.n_tokens += 1
        self.logprobs.append((token, self._length))
        for state, text in self._split(token):
            if state == "reasoning":
                self.reasoning += text
            elif state == "tool":
                self._call += text
            elif state == "normal":
                if self._state == "tool":
                    self._end_call()
                self.text += text
                self._length += len(text)
            self._state = state
        if token.finish_reason is not None:
            if self._state == "tool" and self._call:
                self._end_call()
            made_call = token.finish_reason == "stop" and self._made_call
            self.finish_reason = "tool_calls" if made_call else token.finish_reason

    def _split(self, token: Token) -> list[tuple[Any, str]]:
        """(state, text) of a token, control sequences taken out."""
        if token.finish_reason == "stop":
            self._machine, state = TextStateMachine.discard(self._machine)
            return [(state, "")]
        self._machine, segments = TextStateMachine.split(self._machine, token.text)
        if token.finish_reason == "length":
            self._machine, rest, state = TextStateMachine.flush(self._machine)
            segments.append((state, rest))
        return segments

    def _end_call(self) -> None:
        calls = self._formatter([self._call])
        if calls:
            self.calls += calls
            self._made_call = True
        else:
            self.text += self._call  # what is no call is not lost
        self._call = ""

    def take(self) -> tuple[str, str, list[dict[str, Any]], list[tuple[Token, int]]]:
        """What has come since the last time: text, reasoning, calls, tokens with their places."""
        taken = self.text, self.reasoning, self.calls, self.logprobs
        self._clear()
        return taken

    @property
    def has_part(self) -> bool:
        """Whether there is something to send; never half of a tool's call."""
        return bool(self.text or self.reasoning or self.calls)


def _parser(context: GenerationContext) -> Any:
    """The parser of calls, whose errors are all of one kind."""

    def parse(text: str, tools: Any) -> Any:
        try:
            return context.tool_parser(text, tools)
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    return parse


class Completion:
    """A completion, in chunks or whole.

    Args:
        asked: the request.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.is_chat, self.stream = asked.is_chat, asked.stream
        kind = "chat.completion" if self.is_chat else "text_completion"
        if self.is_chat and self.stream:
            kind = "chat.completion.chunk"
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4()}",
            "system_fingerprint": get_system_fingerprint(),
            "object": kind,
            "model": asked.model,
            "created": int(time.time()),
        }
        self._echoed: dict[int, str] = {}
        self._begun: set[int] = set()

    def echo(self, index: int, prompt: str) -> None:
        """Put the prompt in front of a choice's text."""
        self._echoed[index] = prompt

    def part(self, index: int, choice: ChoiceText) -> dict[str, Any]:
        """What of a choice has not been sent, as a chunk's or a completion's choice."""
        text, reasoning, calls, tokens = choice.take()
        text = self._echoed.pop(index, "") + text
        part: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason}
        part["logprobs"] = self._logprobs(tokens) if self.asked.arguments[0].logprobs else None
        if not self.is_chat:
            return {**part, "text": text}
        message: dict[str, Any] = {}
        if not self.stream or index not in self._begun:
            message["role"] = "assistant"
        self._begun.add(index)
        if text or not self.stream:
            message["content"] = text or None
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {**part, "delta" if self.stream else "message": message}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        chunk = {**self._head, "choices": choices}
        return {**chunk, "usage": None} if self.asked.include_usage else chunk

    def whole(self, choices: list[ChoiceText]) -> dict[str, Any]:
        """The completion."""
        parts = [self.part(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "choices": parts, "usage": self._usage(choices)}

    def usage_chunk(self, choices: list[ChoiceText]) -> dict[str, Any]:
        """The last chunk, for clients that ask for usage."""
        return {**self._head, "choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: list[ChoiceText]) -> dict[str, Any]:
        """Numbers of tokens; a prompt counts once, however many choices it has."""
        firsts = choices[:: len(self.asked.arguments)]
        n_prompt, n_new = sum(c.n_prompt for c in firsts), sum(c.n_tokens for c in choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(c.n_cached for c in firsts)},
        }

    def _logprobs(self, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        content = [{**(token.own or {}), "top_logprobs": list(token.top)} for token, _ in tokens]
        if self.is_chat:
            return {"content": content}
        tops = [{top["token"]: top["logprob"] for top in token.top} for token, _ in tokens]
        return {
            "content": content,
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": tops if self.asked.arguments[0].top_logprobs else None,
            "text_offset": [place for _, place in tokens],
        }
