"""Requests that are served one at a time: seeds, images, draft models, caches without batches."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..cache.summary import leaves
from .errors import RequestError
from .random_state import kept_if_it_fails


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


@kept_if_it_fails()
def serve(owner: Any, job: Any) -> None:
    """Generate one job to its end.

    Args:
        owner: the ``Generator``, whose provider has the model loaded.
        job: a ``Job`` that is prepared.

    Raises:
        RequestError: it is not admitted, or cannot be done with a draft model.
        CancelledError: nobody waits for it any more, and its prompt is not read yet.
    """
    provider: Any = owner.model_provider
    args = job.args
    tokens = job.prompt if job.vision is None else job.vision.cache_key
    caches, n_cached = owner.fetch(job, tokens)
    if args.seed is not None:
        mx.random.seed(args.seed)
    if caches is None:
        caches = make_prompt_cache(provider.model)
        if provider.draft_model is not None:
            caches = caches + make_prompt_cache(provider.draft_model)
    steps = _steps(owner, job, caches, n_cached)
    job.begin(n_cached)
    matcher = owner.state_machines(job)[0].matcher()
    finish_reason = None
    for token, logprobs, *_ in steps:
        token = int(token)
        finish_reason = "length" if job.n_left <= 1 else None
        if matcher.advance(token):
            finish_reason = "stop"
        job.advance(token, logprobs, finish_reason)
        owner.services.generated(job)
        if finish_reason is not None or owner.is_over(job):
            break
    steps.close()  # a draft's tokens are taken back
    if finish_reason is not None:
        job.end()
    owner.keep(*_held(owner, tokens + job.tokens, caches))


def _steps(owner: Any, job: Any, caches: list[Any], n_cached: int) -> Any:
    """Steps of generation: (token, log-probabilities), and with a draft model more."""
    provider, args = owner.model_provider, job.args
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "sampler": server._make_sampler(args, provider.tokenizer),
        "logits_processors": server._make_logits_processors(args),
        "prompt_cache": caches,
        "prefill_step_size": owner.cli_args.prefill_step_size,
    }
    prompt: Any = mx.array(job.prompt[n_cached:])
    model: Any = provider.model
    if provider.draft_model is not None:
        if job.vision is not None:
            raise RequestError(400, "A draft model cannot be used with images.", "messages")
        options["num_draft_tokens"] = args.num_draft_tokens
        draft: Any = provider.draft_model
        return speculative_generate_step(prompt, model, draft, owner.stream, **options)
    if job.vision is not None:
        n = sum(start < n_cached for start in job.vision.starts)
        if pixel_values := job.vision.pixel_values[n:]:
            embeddings = model.embed_inputs(prompt, pixel_values=pixel_values)
            mx.eval(embeddings)  # the prompt is read in another stream
            options["input_embeddings"] = embeddings

    def progress(n_read: int, n_prompt: int) -> None:
        job.choice.put((n_read, n_prompt))
        if 0 < n_read < n_prompt and owner.services.keeps_marks:
            key = job.prompt if job.vision is None else job.vision.cache_key
            owner.keep(key[: n_cached + n_read], copy.deepcopy(caches), "user")
        if owner.is_over(job):
            raise CancelledError

    return generate_step(prompt, model, owner.stream, prompt_progress_callback=progress, **options)


def _held(owner: Any, tokens: list[int], caches: list[Any]) -> tuple[list[int], list[Any]]:
    """The tokens that caches hold: after speculation, all but the last of them or the last two.

    The draft model's may lack one that the model's have: it is taken back there.
    """
    if owner.model_provider.draft_model is None:
        return tokens, caches
    n_layers = len(owner.model_provider.model.layers)
    parts = [caches[:n_layers], caches[n_layers:]]
    counts = [max(int(cache.offset) for cache in leaves(part)) for part in parts]
    for part, count in zip(parts, counts):
        for cache in part if count > min(counts) else []:
            cache.trim(count - min(counts))
    return tokens[: min(counts)], caches
