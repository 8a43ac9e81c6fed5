"""The names that a request may give a model: only these are loaded."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError, short
from ..files import parse_json, read_text
from ..loading import default_model
from .errors import RequestError
from .requests import DEFAULT_MODEL

logger = logging.getLogger(__name__)
_PATH_STARTS = ("/", "./", "../", "~")


def base_name(source: str) -> str:
    """The last part of a hub id or path."""
    return os.path.basename(os.path.normpath(source))


class ModelNames:
    """Which names are served, and what is loaded for them.

    Attributes:
        served: the name of the model that was given at the start, as it is printed.

    Args:
        options: mlx_lm.server's.
        allowed: what ``--allow-model`` gave: hub ids, folders and .gguf files.

    Raises:
        InputError: an allowed model that cannot be one.
    """

    def __init__(self, options: argparse.Namespace, allowed: Sequence[str] = ()) -> None:
        self.own: str | None = options.model
        self.own_adapter: str | None = options.adapter_path
        self.own_draft: str | None = options.draft_model
        self.served = base_name(self.own) if self.own else default_model.NAME
        for source in allowed:
            _check_allowed(source)
        self.allowed = list(dict.fromkeys(allowed))

    def source(self, name: str) -> str | None:
        """What ``models.load`` takes for a name; None for the default model.

        Raises:
            RequestError: 404; the name is not served.
        """
        own = {DEFAULT_MODEL, self.served}
        if self.own:
            own |= {self.own, str(Path(self.own).resolve())}
        if name in own:
            return self.own
        if name in self.allowed:
            return name
        for source in self.allowed:
            if name == base_name(source):
                return source
        if hub_folder(name) is not None:
            return name
        raise RequestError(
            404,
            f"The model {short(name)} is not served: /v1/models lists the models that are.",
            "model",
            "model_not_found",
        )

    def draft(self, name: str, with_own_model: bool) -> str | None:
        """The draft model of a name; the server's own one is for its own model.

        Raises:
            RequestError: 404; the name is not served.
        """
        if name == DEFAULT_MODEL:
            return self.own_draft if with_own_model else None
        if name == self.own_draft:
            return name
        return self.source(name)

    def adapter(self, name: str | None, with_own_model: bool) -> str | None:
        """The adapters of a name, likewise.

        Raises:
            RequestError: 404; the name is not served.
        """
        if name is None:
            return self.own_adapter if with_own_model else None
        if name == self.own_adapter or name in self.allowed:
            return name
        raise RequestError(
            404,
            f"The adapters {short(name)} are not served: give those of --adapter-path, or what "
            "--allow-model lists.",
            "adapters",
            "model_not_found",
        )

    def folder(self, source: str) -> str:
        """Where to load from: what clients found in the hub cache is not fetched anew."""
        if source in (self.own, self.own_draft, *self.allowed):
            return source
        return str(hub_folder(source) or source)

    def listed(self) -> list[str]:
        """The names that /v1/models lists, the served one first."""
        names = [self.served, *(base_name(source) for source in self.allowed), *hub_models()]
        return list(dict.fromkeys(names))


def hub_folder(name: str) -> Path | None:
    """The folder of a model that is complete in the local hub cache, by its hub id."""
    try:
        config = try_to_load_from_cache(name, "config.json")
    except (HFValidationError, OSError, ValueError):
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = set(parse_json(read_text(index))["weight_map"].values())
        else:
            files = {path.name for path in folder.glob("*.safetensors")}
        complete = bool(files) and all((folder / file).is_file() for file in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return folder if complete else None


def hub_models() -> list[str]:
    """The hub ids of complete models in the local hub cache, which need not exist."""
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    except (OSError, ValueError) as error:
        logger.warning(f"The hub cache cannot be read ({error}).")
        return []
    ids = sorted(repo.repo_id for repo in repos if repo.repo_type == "model")
    return [name for name in ids if hub_folder(name) is not None]


def _check_allowed(source: str) -> None:
    if os.path.exists(source):
        return
    try:
        if source.lower().endswith(".gguf") or source.startswith(_PATH_STARTS):
            raise HFValidationError
        validate_repo_id(source)
    except HFValidationError as error:
        raise InputError(
            f"--allow-model {source!r} is neither a hub id nor a folder or .gguf file that exists."
        ) from error
