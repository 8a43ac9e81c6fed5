"""The models that the server loads: packed caches are attached to each."""

from __future__ import annotations

import _thread
import argparse
import sys
from typing import Any

from mlx_lm import server
from mlx_lm.utils import sharded_load

from ..cache.factory import attach
from ..kernels.backend import select_backend
from ..loading import distributed, models
from .patching import patched


class TurboModelProvider(server.ModelProvider):
    """mlx_lm.server's model provider, for every model that ``models.load`` knows.

    Args:
        options: mlx_lm.server's.
        cache_options: as ``attach`` takes them.
    """

    def __init__(self, options: argparse.Namespace, **cache_options: Any) -> None:
        super().__init__(options)
        self.cache_options = cache_options
        self.failure: Exception | None = None

    def load_default(self) -> None:
        """Load the command line's model or the default one; where that fails, the server ends."""
        try:
            self.load("default_model", None, "default_model")
        except Exception as error:
            self.failure = error
            _thread.interrupt_main()
            raise SystemExit from error  # ends this thread, which has nothing to generate with

    def _load(
        self, model_path: Any, adapter_path: Any = None, draft_model_path: Any = None
    ) -> None:
        with patched(server, load=self._load_one, sharded_load=self._load_sharded):
            super()._load(model_path, adapter_path, draft_model_path)

    def _load_one(self, path: str | None, **options: Any) -> tuple[Any, ...]:
        """As mlx_lm.load; a draft model, which is asked for without its config, is left as is."""
        is_draft = not options.pop("return_config", False)
        loaded = models.load(path, **options)
        if is_draft:
            return loaded.model, loaded.tokenizer
        self._attach(loaded.model, loaded.name)
        return loaded.model, loaded.tokenizer, loaded.config

    def _load_sharded(self, path: str, **options: Any) -> tuple[Any, ...]:
        distributed.check_source(path)
        loaded = sharded_load(path, **options)
        self._attach(loaded[0], path)
        return loaded

    def _attach(self, model: Any, name: str) -> None:
        attach(model, **self.cache_options)
        if distributed.rank() != 0:
            return
        factory = model.make_cache
        turbo_keys = any(k.is_turbo for k, _ in factory.formats)
        centred = f"{factory.centring.summary()}, " if turbo_keys else ""
        policy = self.cache_options["policy"].name
        backend = select_backend(self.cache_options.get("backend")).name
        print(f"Serving {name}: KV cache {policy}, {centred}{backend} back-end", file=sys.stderr)
