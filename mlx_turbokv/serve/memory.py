"""Whether a request fits in memory: asked before anything of it is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..loading.memory import Footprint, default_limit, gigabytes
from .errors import RequestError
from .prompt_cache import PromptCache

# A sequence's caches in its batch, those of its prompt that the prompt cache keeps meanwhile, and
# those that leave the batch for the prompt cache.
COPIES = 3
LEAST_TOKENS = 512  # of the context that there must be room for at the start
WRITE_SECONDS = 30
logger = logging.getLogger(__name__)


class Length(NamedTuple):
    """A sequence that is generated or waits for it.

    n_prompt: tokens of its prompt.
    n_most: tokens that it has at its end at most.
    is_read: whether its prompt has been read.
    """

    n_prompt: int
    n_most: int
    is_read: bool = False


class MemoryBudget:
    """Keeps what the server holds below a limit.

    Args:
        limit: in bytes; None takes the GPU's recommended working set, or the machine's memory.
        prompt_cache: whose entries go before a request is refused.
        step: prompt tokens at a time.
    """

    def __init__(self, limit: int | None, prompt_cache: PromptCache, step: int) -> None:
        self.limit = default_limit() if limit is None else limit
        self.prompt_cache = prompt_cache
        prompt_cache.has_room = self.make_room
        self._step = step
        self._footprint: Footprint | None = None
        self._held = 0
        self._max_context: int | None = None

    def loaded(self, models: Sequence[nn.Module], max_context: int | None = None) -> None:
        """Take the sizes of a model that has just been loaded.

        Args:
            models: the model, and its draft model.
            max_context: the positions that it was made for: no request has more tokens.

        Raises:
            InputError: it leaves no room for a request.
        """
        self._footprint = Footprint(models, self._step)
        self._max_context = max_context
        self._held = self._footprint.weights
        if self.limit:
            mx.set_memory_limit(self.limit)
        mx.reset_peak_memory()  # loading may have taken more
        if not self._footprint.is_known:
            logger.warning("The sizes of this model's caches are not known: no request is refused.")
        needed = self._needed([Length(LEAST_TOKENS, LEAST_TOKENS)])
        if self.limit and needed > self.limit:
            raise InputError(
                f"The model takes {gigabytes(self._held)}, and with {LEAST_TOKENS} tokens of "
                f"context {gigabytes(needed)}, more than the memory limit of "
                f"{gigabytes(self.limit)}: give a smaller model, or a larger --memory-limit."
            )
        logger.info(
            "Memory: %s of weights, %s of KV cache for 1,000 tokens, a limit of %s.",
            gigabytes(self._held),
            gigabytes(self._footprint.caches(1 << 14) * 1000 // (1 << 14)),
            gigabytes(self.limit) if self.limit else "none that is known",
        )

    def joins(self, job: Any, running: Sequence[Any]) -> bool:
        """Whether a job fits beside those that run; one that never fits may join to be refused."""
        if not self._is_on:
            return True
        new = self._sequence(job)
        if self._needed([new]) > self.limit:
            return True
        return self._needed([new, *map(self._sequence, running)]) <= self.limit

    def admit(self, job: Any, running: Sequence[Any] = ()) -> None:
        """Make room for a job: entries of the prompt cache go first.

        Args:
            job: with its prompt's tokens, and how many more it may get.
            running: jobs beside it.

        Raises:
            RequestError: 413; it does not fit.
        """
        if not self._is_on:
            return
        new = self._sequence(job)
        needed = self._needed([new])
        if needed > self.limit:
            raise RequestError(413, self._refusal(new, needed), "max_tokens", "out_of_memory")
        wanted = self._needed([new, *map(self._sequence, running)])
        # what is neither weights nor a running job's: entries, and what waits to be written
        others = max(0, mx.get_active_memory() - self._held - self._batch_bytes(running))
        excess = wanted + others - self.limit
        if excess <= 0:
            return
        self.prompt_cache.trim_to(n_bytes=max(0, self.prompt_cache.nbytes - excess))
        disk = self.prompt_cache.disk
        if disk is not None and disk.waiting_bytes > self.limit - wanted:
            disk.wait(WRITE_SECONDS)
        mx.clear_cache()

    def make_room(self, nbytes: int) -> bool:
        """Evict entries of the prompt cache until as many bytes fit; whether they do."""
        if not self._is_on:
            return True
        excess = mx.get_active_memory() + nbytes - self.limit
        if excess > 0:
            self.prompt_cache.trim_to(n_bytes=max(0, self.prompt_cache.nbytes - excess))
            mx.clear_cache()
        return mx.get_active_memory() + nbytes <= self.limit

    @property
    def _is_on(self) -> bool:
        return bool(self.limit) and self._footprint is not None and self._footprint.is_known

    def _sequence(self, job: Any) -> Length:
        n_prompt = len(job.prompt)
        n = n_prompt + job.args.max_tokens
        if self._max_context is not None:
            n = min(n, max(self._max_context, n_prompt + 1))
        return Length(n_prompt, n, bool(job.tokens))

    def _needed(self, sequences: Sequence[Length]) -> int:
        """Bytes at the peak of a batch: its sequences are padded to the longest."""
        assert self._footprint is not None
        n = len(sequences)
        caches = n * self._footprint.caches(max(s.n_most for s in sequences))
        reading = [s.n_prompt for s in sequences if not s.is_read] or [1]
        scratch = self._footprint.scratch(max(reading), len(reading))
        return self._held + COPIES * caches + scratch

    def _batch_bytes(self, running: Sequence[Any]) -> int:
        assert self._footprint is not None
        return sum(self._footprint.caches(len(job.prompt) + len(job.tokens)) for job in running)

    def _refusal(self, new: Length, needed: int) -> str:
        assert self._footprint is not None
        caches = COPIES * self._footprint.caches(new.n_most)
        scratch = self._footprint.scratch(new.n_prompt)
        return (
            f"The request's {new.n_prompt:,} prompt tokens and up to {new.n_most - new.n_prompt:,} "
            f"new ones need {gigabytes(needed)} (weights {gigabytes(self._held)}, KV cache "
            f"{gigabytes(caches)}, reading the prompt {gigabytes(scratch)}), and the limit is "
            f"{gigabytes(self.limit)}: shorten the prompt, or ask for fewer tokens."
        )
