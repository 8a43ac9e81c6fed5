"""Requests that are generated together."""

from __future__ import annotations

import logging
from typing import Any

from mlx_lm import server
from mlx_lm.generate import BatchGenerator

from .jobs import Job
from .random_state import kept_if_it_fails

logger = logging.getLogger(__name__)


class Batch:
    """A continuous batch of jobs for one model.

    Args:
        owner: the ``Generator``, whose provider has the model loaded.
        alone: whether it is for one job only.
    """

    def __init__(self, owner: Any, alone: bool = False) -> None:
        self.owner, self.alone = owner, alone
        self.key = owner.model_provider.model_key
        self.jobs: dict[int, Job] = {}
        self._types: dict[int, list[str]] = {}
        options = owner.cli_args
        self._generator = BatchGenerator(
            owner.model_provider.model,
            completion_batch_size=options.decode_concurrency,
            prefill_batch_size=options.prompt_concurrency,
            prefill_step_size=options.prefill_step_size,
            stream=owner.stream,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self._generator.prompt_cache_nbytes

    def add(self, job: Job) -> None:
        """Start a job.

        Raises:
            RequestError: it is not admitted.
        """
        owner, args = self.owner, job.args
        tokens = job.prompt + job.tokens
        owner._log_cache_stats()
        caches, n_cached = owner.fetch(job, tokens)
        segments, types = zip(*job.rest(n_cached))
        tokenizer = owner.model_provider.tokenizer
        stop_sequences, _ = owner.state_machines(job)
        (uid,) = self._generator.insert_segments(
            segments=[list(segments)],
            max_tokens=[job.n_left],
            caches=[caches],  # type: ignore[list-item]
            all_tokens=[tokens[:n_cached]],
            samplers=[server._make_sampler(args, tokenizer)],
            logits_processors=[server._make_logits_processors(args)],
            stop_sequences=[stop_sequences],
        )
        del caches
        self.jobs[uid], self._types[uid] = job, list(types)
        job.begin(n_cached)
        most = owner.cli_args.prompt_cache_bytes
        if most is not None:
            owner.prompt_cache.trim_to(n_bytes=most - self.nbytes)

    def step(self) -> bool:
        """Read some of the prompts and generate a token of each other job; whether anything was."""
        with kept_if_it_fails():
            reading, generated = self._generator.next()
        for response in reading:
            self.jobs[response.uid].choice.put(response.progress)
        self._keep_segments(reading)
        for response in generated:
            self._advance(response)
        return bool(reading or generated)

    def _keep_segments(self, responses: list[Any]) -> None:
        """Put the caches at the ends of prompts' segments in the prompt cache."""
        ended = [
            r.uid
            for r in responses
            if r.end_of_segment and not r.end_of_prompt and self._types[r.uid]
        ]
        for uid, (caches, tokens) in self._generator.extract_cache(ended).items():
            self.owner.keep(tokens[:], caches, self._types[uid].pop(0))

    def _advance(self, response: Any) -> None:
        uid, job = response.uid, self.jobs[response.uid]
        try:
            job.advance(response.token, response.logprobs, response.finish_reason)
            self.owner.services.generated(job)
        except Exception as error:
            logger.exception("A request failed.")
            job.fail(error)
            self._forget(uid)
            if response.finish_reason is None:
                self._generator.remove([uid])
            return
        if response.finish_reason is not None:
            job.end()
            self._forget(uid)
            self.owner.keep(response.all_tokens[:], response.prompt_cache)

    def cancelled(self) -> list[int]:
        """The jobs that nobody waits for."""
        return [uid for uid, job in self.jobs.items() if job.cancelled]

    def remove(self, uids: list[int]) -> None:
        """Stop jobs."""
        if uids:
            self._generator.remove(uids)
            for uid in uids:
                self._forget(uid)

    def _forget(self, uid: int) -> None:
        self.jobs.pop(uid, None)
        self._types.pop(uid, None)

    def fail(self, error: Exception) -> None:
        """Fail all jobs."""
        for job in self.jobs.values():
            job.fail(error)

    def close(self) -> None:
        """Give back what the batch holds."""
        self._generator.close()
        self.jobs.clear()
