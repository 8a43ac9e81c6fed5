"""A request's prompt as tokens, and what of a request depends on the model: its vocabulary."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, cast
from urllib.request import urlopen

from mlx_lm import server

from ..errors import short
from ..loading.config import first_line
from .errors import RequestError
from .models import TurboModelProvider

IMAGE_SECONDS = 30
IMAGE_BYTES = 32 << 20


def check_vocabulary(request: server.CompletionRequest, args: Any, n_tokens: int) -> None:
    """Check what a request says about tokens; the server's own ``top_k`` is made to fit.

    Args:
        args: a ``GenerationArguments``, its sampling a ``requests.Sampling``.
        n_tokens: the size of the vocabulary.

    Raises:
        RequestError: 400; a token that there is not, or more tokens than there are.
    """
    accepted = f"the vocabulary has {n_tokens} tokens"
    for token in args.logits.logit_bias or {}:
        if not 0 <= token < n_tokens:
            raise RequestError(
                400, f"logit_bias for token {short(token)} is not accepted: {accepted}.",
                "logit_bias",
            )  # fmt: skip
    if args.sampling.is_own_top_k:
        args.sampling.top_k = min(args.sampling.top_k, n_tokens - 1)
    for name, value in (("top_k", args.sampling.top_k), ("top_logprobs", args.top_logprobs)):
        if value >= n_tokens:
            raise RequestError(400, f"{name} {short(value)} is not accepted: {accepted}.", name)
    if not isinstance(request.prompt, str):
        for token in cast(list[int], request.prompt):
            if not 0 <= token < n_tokens:
                message = f"The token {short(token)} of the prompt is not accepted: {accepted}."
                raise RequestError(400, message, "prompt")


def prompt_of(
    request: server.CompletionRequest,
    args: Any,
    provider: TurboModelProvider,
    tokenize: Callable[..., Any],
) -> tuple[list[int], list[list[int]], list[str], str, Any]:
    """A request's tokens.

    Args:
        args: a ``GenerationArguments``.
        provider: with the model loaded.
        tokenize: mlx_lm.server's function, which splits the tokens into segments.

    Returns:
        (tokens, segments, their types, initial state, images), as ``tokenize``.

    Raises:
        RequestError: 400; the prompt is empty or does not fit the model.
    """
    check_vocabulary(request, args, provider.n_tokens)
    if provider.draft_model is not None and args.num_draft_tokens > provider.most_draft_tokens:
        raise RequestError(
            400,
            f"num_draft_tokens {args.num_draft_tokens} is not accepted: give at most "
            f"{provider.most_draft_tokens} with this model.",
            "num_draft_tokens",
        )
    param = "messages" if request.request_type == "chat" else "prompt"
    if not isinstance(request.prompt, str):
        tokens = list(cast(list[int], request.prompt))
        return tokens, [tokens], ["assistant"], "normal", None
    _rename_developer(request.messages, provider.tokenizer)
    try:
        found = tokenize(provider.tokenizer, request, args)
    except Exception as error:
        what = first_line(error) if str(error) else type(error).__name__
        raise RequestError(
            400, f"The {param} cannot be used with this model ({what}).", param
        ) from error
    if not found[0]:
        raise RequestError(400, f"The {param} has no tokens: give some text.", param)
    return found


def _rename_developer(messages: list[Any], tokenizer: Any) -> None:
    """Take developer messages as system ones, where the template knows no such role."""
    if "developer" in str(getattr(tokenizer, "chat_template", None)):
        return
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"


def fetch_images(messages: list[dict[str, Any]]) -> None:
    """Replace images' addresses with their content: all machines read the same bytes.

    Raises:
        RequestError: 400; an image cannot be fetched.
    """
    for part in server._image_parts(messages):
        url = str(server._image_url(part))
        if not url.startswith(("http://", "https://")):
            continue
        try:
            with urlopen(url, timeout=IMAGE_SECONDS) as response:
                kind = response.headers.get_content_type()
                content = response.read(IMAGE_BYTES + 1)
        except (OSError, ValueError) as error:
            what = f"The image {short(url)} cannot be fetched ({first_line(error)})."
            raise RequestError(400, what, "messages") from error
        if len(content) > IMAGE_BYTES:
            what = f"The image {short(url)} is larger than {IMAGE_BYTES >> 20} MiB."
            raise RequestError(400, what, "messages")
        data = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        part.clear()
        part.update(type="image_url", image_url={"url": data})
