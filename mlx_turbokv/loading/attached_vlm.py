"""mlx-vlm's commands with packed caches: they are attached to every model that a command loads."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..cache.factory import attach
from ..errors import InputError
from ..model.caches import language_model
from .attached import Attaching
from .models import load_errors

# mlx-vlm's prefix cache: whether it is used, and whether it stores prefixes on disk
PREFIXES, ON_DISK = "APC_ENABLED", "APC_DISK_ENABLED"


class AttachingVLM(Attaching):
    """What stands in for mlx-vlm's loading function while one of its commands runs.

    Takes what ``Attaching`` takes.

    Raises:
        InputError: mlx-vlm is not installed, or keeps prefixes on disk.
    """

    package = "mlx_vlm"

    def __init__(self, *args: Any, **cache_options: Any) -> None:
        super().__init__(*args, **cache_options)
        try:
            self._load = importlib.import_module("mlx_vlm.utils").load
        except ImportError as error:
            raise InputError(f"mlx-vlm cannot be loaded ({error}): pip install mlx-vlm.") from error
        if _is_on(ON_DISK):
            raise InputError(
                f"{ON_DISK}={os.environ[ON_DISK]} is not accepted: mlx-vlm stores no packed caches "
                "on disk. Without it prefixes are kept in memory."
            )

    def run(self, name: str, args: list[str]) -> None:
        """Run a command of mlx-vlm to its end; its prefix cache keeps packed caches in memory.

        Raises:
            InputError: as ``Attaching.run``.
        """
        if name == "server" and _is_on(PREFIXES):
            self.say("The prefix cache keeps packed caches in memory, and nothing on disk.")
        with _environment(ON_DISK, "0"):
            super().run(name, args)

    def load(self, path_or_hf_repo: str, *args: Any, **options: Any) -> tuple[Any, ...]:
        """As ``mlx_vlm.load``.

        Raises:
            InputError: the model is missing or cannot be loaded.
        """
        with load_errors(path_or_hf_repo, gguf=False):
            loaded = self._load(path_or_hf_repo, *args, **options)
        name, model = Path(path_or_hf_repo).name, loaded[0]
        if not hasattr(language_model(model), "layers"):
            self.say(f"{name} has no language model with a KV cache.")
            return loaded
        tokenizer = getattr(loaded[1], "tokenizer", loaded[1])
        self.models.append(attach(model, **self._options_for(tokenizer, name)))
        factory: Any = language_model(model).make_cache
        self._say_formats(factory, name)
        self.n_caches = 0
        return loaded

    def _replaced(self) -> list[tuple[str, Any, Any]]:
        return [("load", self._load, self.load)]


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").strip().lower() not in ("", "0", "false", "no", "off")


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    """Set an environment variable for the duration of the block."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
