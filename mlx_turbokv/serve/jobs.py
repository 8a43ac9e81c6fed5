"""What the generating thread works on, and what it hands over to the threads that answer."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm.server import CompletionRequest, GenerationArguments, GenerationContext

# What OpenAI's API gives for a probability of 0.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        text: that it adds, with what earlier tokens held back.
        token: its number.
        finish_reason: ``stop`` or ``length`` for the last one.
        own: where log-probabilities are asked for, its own, as OpenAI's API gives it.
        top: the same of the likeliest tokens at its place.
    """

    text: str
    token: int
    finish_reason: str | None
    own: dict[str, Any] | None = None
    top: tuple[dict[str, Any], ...] = ()


class Answer:
    """What comes of a request's choices, as (choice, item) pairs.

    An item is a GenerationContext, progress of the prompt (tokens read, of how many), a Token, an
    exception that ends the request, or None at the end of a choice.
    """

    def __init__(self) -> None:
        self.items: Queue[tuple[int, Any]] = Queue()
        self.cancelled = False
        self.started = time.perf_counter()

    def cancel(self) -> None:
        """Stop generating: nobody waits for it any more."""
        self.cancelled = True


class Choice:
    """One of an answer's choices, as the generating thread sees it."""

    def __init__(self, answer: Answer, index: int) -> None:
        self.answer, self.index = answer, index

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self.answer.cancelled

    def put(self, item: Any) -> None:
        """Hand something over."""
        self.answer.items.put((self.index, item))


class Job:
    """One sequence to generate.

    Args:
        choice: what gets the result; on other machines than the first it goes nowhere.
        request: the prompt.
        args: how to generate.
    """

    def __init__(self, choice: Any, request: CompletionRequest, args: GenerationArguments) -> None:
        self.choice, self.request, self.args = choice, request, args
        self.alone = False  # after a batch failed that it was in
        self.prepared = False
        self.prompt: list[int] = []
        self.segments: list[list[int]] = []
        self.types: list[str] = []
        self.vision: Any = None
        self.tokens: list[int] = []
        self._detokenizer: Any = None
        self._vocabulary: frozenset[int] = frozenset()
        self._tokenizer: Any = None
        self.context: GenerationContext | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return getattr(self.choice, "cancelled", False)

    @property
    def n_left(self) -> int:
        """How many tokens it may still get."""
        return self.args.max_tokens - len(self.tokens)

    def prepare(
        self, found: tuple[Any, ...], tokenizer: Any, text_machine: Any, vocabulary
    ) -> None:
        """Take the prompt's tokens.

        Args:
            found: what ``prompt_of`` gave.
            text_machine: mlx-lm's, which finds reasoning, calls of tools and stop words.
            vocabulary: the tokens that have a text.
        """
        self.prompt, self.segments, self.types, initial_state, self.vision = found
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._detokenizer = tokenizer.detokenizer
        if self.request.request_type == "text" and self.prompt[-1] in vocabulary:
            # within a text the first token's space is not dropped
            self._detokenizer.add_token(self.prompt[-1])
            self._finalize()
            _ = self._detokenizer.last_segment
        self.context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_machine,
            initial_state=initial_state,
            prompt=self.prompt,
        )
        self.prepared = True

    def begin(self, n_cached: int) -> None:
        """Say that it is begun, with so many tokens of its prompt from a cache."""
        assert self.context is not None
        if self.context.prompt_cache_count < 0:
            self.context.prompt_cache_count = n_cached
            self.choice.put(self.context)

    def rest(self, n_cached: int) -> list[tuple[list[int], str]]:
        """The segments, with their types, that are still to be read.

        Args:
            n_cached: how many first tokens are in the caches, fewer than there are.
        """
        if self.tokens:
            return [((self.prompt + self.tokens)[n_cached:], "assistant")]
        found = []
        for segment, kind in zip(self.segments, self.types):
            if n_cached < len(segment):
                found.append((segment[n_cached:], kind))
            n_cached = max(0, n_cached - len(segment))
        return found

    def advance(self, token: int, logprobs: Any, finish_reason: str | None) -> None:
        """Hand over a token."""
        self.tokens.append(token)
        detokenizer = self._detokenizer
        # an embedding may have more rows than there are tokens
        if finish_reason != "stop" and token in self._vocabulary:
            detokenizer.add_token(token)
        if finish_reason is not None:
            self._finalize()
        own, top = None, ()
        if self.args.logprobs:
            own = self._entry(token, logprobs[token].item())
            top = self._top(logprobs, self.args.top_logprobs)
        self.choice.put(Token(detokenizer.last_segment, token, finish_reason, own, top))

    def _finalize(self) -> None:
        # mlx-lm's fails for special tokens after half a character
        with contextlib.suppress(KeyError):
            self._detokenizer.finalize()

    def end(self) -> None:
        """Say that nothing more comes."""
        self.choice.put(None)

    def fail(self, error: Exception) -> None:
        """Say that it failed."""
        self.choice.put(error)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI's API lists it, with mlx_lm.server's ``id``."""
        text = self._tokenizer.decode([token]) if token in self._vocabulary else ""
        finite = max(LEAST_LOGPROB, logprob) if math.isfinite(logprob) else LEAST_LOGPROB
        return {"id": token, "token": text, "logprob": finite, "bytes": list(text.encode())}

    def _top(self, logprobs: Any, n: int) -> tuple[dict[str, Any], ...]:
        if not n:
            return ()
        likeliest: Any = mx.argsort(-logprobs)[:n].tolist()
        return tuple(self._entry(token, logprobs[token].item()) for token in likeliest)
