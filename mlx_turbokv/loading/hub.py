"""The model hub: whether it answers, and configurations from it."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .known_shapes import KNOWN, closest

_SECONDS = 3.0  # that the hub has to answer; where no network is, the error comes at once


def fetch_config(source: str) -> Path:
    """The config.json of a hub id, from the hub or from its local cache.

    Raises:
        InputError: the hub does not answer, or does not give it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    shapes = f"one of the built-in shapes ({', '.join(KNOWN)})"
    like = closest(source)
    hint = f"; {like} is the most like it" if like else ""
    try:
        cached = try_to_load_from_cache(source, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if not answers():
            raise InputError(
                f"The config.json of {source} cannot be fetched, since the hub cannot be reached: "
                f"give a folder, a config.json, a GGUF file or {shapes}{hint}."
            )
        return Path(hf_hub_download(source, "config.json"))
    except HFValidationError as error:
        raise InputError(
            f"There is no model at {source}: give a hub id, a folder, a config.json, a GGUF file "
            f"or {shapes}{hint}."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"The hub gives no config.json of {source}: give a folder, a config.json, a GGUF file "
            f"or {shapes}{hint}."
        ) from error


def check_reachable(source: str) -> None:
    """Look for the hub before mlx-lm asks it for a model, which takes half a minute to give up.

    Raises:
        ConnectionError: the model is neither a folder nor in the hub's local cache, and the hub
            does not answer.
        HFValidationError: it is no hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    if not answers():
        raise ConnectionError(source)


def answers() -> bool:
    """Whether the hub can be reached; a refusal counts as an answer."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # the hub's package has had three HTTP clients, each with its own errors
        return False
    return True
