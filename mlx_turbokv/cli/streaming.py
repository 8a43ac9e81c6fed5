"""Text that is generated and printed as it comes, in one turn of a conversation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .conversation import Conversation
from .output import print_status

_DELAY = 1.0  # seconds that a prompt is read before its progress is shown
_SECONDS = 0.1, 10.0  # between two lines of it, on a terminal and elsewhere


class StoppedError(Exception):
    """A turn that was stopped while its prompt was read; the caches hold a part of it.

    Args:
        n_read: tokens of that part.
    """

    def __init__(self, n_read: int) -> None:
        super().__init__(n_read)
        self.n_read = n_read


@dataclass
class Answer:
    """What one turn read and generated.

    Args:
        tokens: of the whole sequence, the generated ones included.
        text: the generated text.
        generated: the generated tokens.
        prompt_tokens: tokens that were read.
        prompt_tps, generation_tps: tokens per second.
        peak_memory: in GB.
        finish_reason: "stop", "length", or "interrupted".
    """

    tokens: list[int]
    text: str = ""
    generated: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    peak_memory: float = 0.0
    finish_reason: str = "interrupted"


class Reading:
    """A progress line on stderr while a long prompt is read.

    Args:
        total: tokens to read.
        stopped: asked after every part; True raises ``StoppedError``.
    """

    def __init__(self, total: int, stopped: Callable[[], bool] = lambda: False) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.before = 0  # tokens of parts that were read before
        self.stopped = stopped
        self.bar = tqdm(
            total=total, unit=" tokens", desc="Reading the prompt", file=sys.stderr, delay=_DELAY,
            mininterval=_SECONDS[not terminal], miniters=0, dynamic_ncols=terminal, leave=False,
        )  # fmt: skip

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.before + done - self.bar.n)
        if self.bar.n >= self.bar.total:
            self.bar.close()
        if self.stopped():
            raise StoppedError(self.before + done)


def print_part(text: str) -> None:
    """Print a part of a text as it comes."""
    print(text, end="", flush=True)


def read(model: Any, tokens: list[int], caches: list[Any], step: int, progress: Reading) -> None:
    """Read tokens into caches, and generate nothing.

    Raises: StoppedError.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    steps = generate_step(
        mx.array(tokens), model, max_tokens=0, prompt_cache=caches, prefill_step_size=step,
        prompt_progress_callback=progress,
    )  # fmt: skip
    for _ in steps:
        pass
    mx.eval([cache.state for cache in caches])


def turn(
    conversation: Conversation,
    tokens: list[int],
    args: dict[str, Any],
    draft: tuple[Any, list[Any]] | None = None,
    show: Callable[[str], None] = print_part,
    stopped: Callable[[], bool] = lambda: False,
    goes_on: bool = True,
) -> Answer:
    """Read a prompt and generate its answer.

    Args:
        tokens: of the whole sequence; what the caches hold of it is not read again.
        args: options of the command: sampling, max_tokens, prefill_step_size.
        draft: a draft model and its caches.
        show: called with each part of the text.
        stopped: asked at every token; True ends the answer.
        goes_on: whether a later turn may follow, which a checkpoint is kept for.

    Raises: StoppedError, where the prompt was not read to its end.
    """
    from mlx_lm import stream_generate

    loaded, step = conversation.loaded, args["prefill_step_size"]
    tokens, n = conversation.go_back(tokens)
    _warn_of_memory(conversation, len(tokens), args, draft)
    answer, started = Answer(tokens, prompt_tokens=len(tokens) - n), time.perf_counter()
    seconds = 0.0
    with _noting(conversation, tokens, n), Reading(answer.prompt_tokens, stopped) as progress:
        needs_checkpoint = goes_on and conversation.needs_checkpoint
        n_stable = conversation.n_stable(tokens) if needs_checkpoint else 0
        if n < n_stable:
            read(loaded.model, tokens[n:n_stable], conversation.caches, step, progress)
            conversation.keep_checkpoint(n_stable)
            progress.before, n = n_stable - n, n_stable
            seconds = time.perf_counter() - started
        prompt, response = tokens[n:], None
        for response in stream_generate(
            loaded.model,
            loaded.tokenizer,
            prompt,
            max_tokens=args["max_tokens"],
            draft_model=draft[0] if draft else None,
            num_draft_tokens=args.get("num_draft_tokens"),
            sampler=make_sampler(loaded.tokenizer, args),
            prompt_cache=[*conversation.caches, *(draft[1] if draft else [])],
            prefill_step_size=step,
            prompt_progress_callback=progress,
        ):
            progress.bar.close()
            show(response.text)
            answer.generated.append(int(response.token))
            answer.text += response.text
            if stopped():
                break
    if response is not None:
        seconds += len(prompt) / response.prompt_tps
        answer.prompt_tps = answer.prompt_tokens / seconds
        answer.generation_tps, answer.peak_memory = response.generation_tps, response.peak_memory
        answer.finish_reason = response.finish_reason or "interrupted"
    answer.tokens = tokens + answer.generated
    return answer


def _warn_of_memory(
    conversation: Conversation, n_tokens: int, args: dict[str, Any], draft: Any
) -> None:
    """Say before a prompt is read that it and its answer are not expected to fit in memory."""
    from ..loading.memory import Footprint, warning

    loaded = conversation.loaded
    most = n_tokens + max(0, args["max_tokens"])
    if loaded.max_context is not None:
        most = max(n_tokens, min(most, loaded.max_context))
    models = [loaded.model, *([draft[0]] if draft else [])]
    footprint = Footprint(models, args["prefill_step_size"], conversation.make_caches())
    if text := warning(footprint, most):
        print_status(f"Warning: {text}")


@contextlib.contextmanager
def _noting(conversation: Conversation, tokens: list[int], n: int) -> Iterator[None]:
    """Notes what the caches hold where a prompt is not read to its end."""
    try:
        yield
    except StoppedError as stop:
        conversation.held = tokens[: n + stop.n_read]
        raise


def make_sampler(tokenizer: Any, args: dict[str, Any]) -> Any:
    """The sampler of the command's options."""
    from mlx_lm.sample_utils import make_sampler

    names = ("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability",
             "xtc_threshold")  # fmt: skip
    return make_sampler(
        **{name: args[name] for name in names if name in args},
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
