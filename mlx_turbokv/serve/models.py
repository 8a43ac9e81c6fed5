"""The models that the server loads: packed caches are attached to each."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm import server
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import sharded_load

from ..cache import speculation
from ..cache.factory import attach
from ..centring.first_use import for_model
from ..errors import InputError, short
from ..loading import distributed, models
from ..loading.patching import patched
from ..policy.recommended import label
from .errors import RequestError, SpeculationError
from .names import ModelNames, base_name
from .requests import DEFAULT_MODEL

Key = tuple[str | None, str | None, str | None]
logger = logging.getLogger(__name__)


class TurboModelProvider(server.ModelProvider):
    """mlx_lm.server's model provider, for every model that ``models.load`` knows.

    Attributes:
        names: which names are served.
        n_tokens: the size of the vocabulary: tokens that have a text and a score.
        most_draft_tokens: how many tokens a request may ask a draft model for.

    Args:
        options: mlx_lm.server's.
        allowed: what ``--allow-model`` gave.
        cache_options: as ``attach`` takes them.
    """

    def __init__(
        self, options: argparse.Namespace, allowed: Sequence[str] = (), **cache_options: Any
    ) -> None:
        super().__init__(options)
        self.names = ModelNames(options, allowed)
        self.cache_options = cache_options
        self.n_tokens = 0
        self.most_draft_tokens = speculation.ANY_NUMBER
        self._loaded: models.Loaded | None = None
        self._draft: models.Loaded | None = None

    def key(self, model: str, adapter: str | None = None, draft: str = DEFAULT_MODEL) -> Key:
        """What is loaded for the names that a request gives.

        Raises:
            RequestError: 404; one of them is not served.
        """
        source = self.names.source(model)
        own = source == self.names.own
        return source, self.names.adapter(adapter, own), self.names.draft(draft, own)

    def load_default(self) -> None:
        """Load the command line's model or the default one, with the adapters and draft model.

        Raises:
            InputError: it cannot be loaded, or not with the draft model.
        """
        try:
            self._load(*self.key(DEFAULT_MODEL))
        except SpeculationError as error:
            raise InputError(str(error)) from error
        if self._loaded is not None:
            self.names.served = self._loaded.name
            if self.cli_args.top_k >= self.n_tokens:
                raise InputError(
                    f"--top-k {self.cli_args.top_k} is not below the vocabulary of "
                    f"{self._loaded.name}, which has {self.n_tokens} tokens."
                )

    def text_of(self, prompt: str | list[int]) -> str:
        """The text of a prompt that may be tokens."""
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(prompt)  # type: ignore[union-attr]

    def load(
        self, model_path: str, adapter_path: Any = None, draft_model_path: Any = DEFAULT_MODEL
    ) -> tuple[Any, Any]:
        """The model and tokenizer of a request's names, loaded if another model is in place.

        Raises:
            RequestError: they are not served, or cannot be loaded; the model in place stays.
        """
        key = self.key(model_path, adapter_path, draft_model_path)
        if key == self.model_key:
            return self.model, self.tokenizer
        before = self.model_key
        try:
            if not self.is_distributed:
                models.load_config(key[0] and self.names.folder(key[0]))
            self._load(*key)
        except Exception as error:
            if self.model is None and before is not None:
                logger.warning("The model that was in place is loaded again.")
                self._load(*before)
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                404,
                f"The model {short(model_path)} cannot be loaded ({error}).",
                "model",
                "model_not_found",
            ) from error
        return self.model, self.tokenizer

    def say_what_is_served(self) -> None:
        """Print the model in place, and how its caches are packed."""
        if self._loaded is None or distributed.rank() != 0:
            return
        policy, model = label(self.cache_options["policy"]), self._loaded.model
        about = cast(Any, model).make_cache.about_keys_and_backend()
        print(f"Serving {self._loaded.name}: KV cache {policy}, {about}", file=sys.stderr)

    def _load(
        self, model_path: Any, adapter_path: Any = None, draft_model_path: Any = None
    ) -> None:
        self._loaded = self._draft = None
        try:
            with patched(server, load=self._load_one, sharded_load=self._load_sharded):
                super()._load(model_path, adapter_path, draft_model_path)
            self._take_vocabulary()
            self._check_speculation()
        except BaseException:
            self.reset()
            raise
        if self.cache_options.get("max_kv_size") is not None:
            self.is_batchable = False  # a batch would keep no first tokens

    def _load_one(self, path: str | None, **options: Any) -> tuple[Any, ...]:
        """As mlx_lm.load; a draft model, which is asked for without its config, is left as is."""
        is_draft = not options.pop("return_config", False)
        folder = path and self.names.folder(path)
        loaded = models.load(folder, **options)
        if folder != path:
            loaded.name = base_name(str(path))
        if is_draft:
            self._draft = loaded
            return loaded.model, loaded.tokenizer
        self._loaded = loaded
        self._attach(loaded)
        return loaded.model, loaded.tokenizer, loaded.config

    def _load_sharded(self, path: str, **options: Any) -> tuple[Any, ...]:
        distributed.check_source(path)
        loaded: Any = sharded_load(self.names.folder(path), **options)
        model, tokenizer, config = loaded
        self._loaded = models.Loaded(model, tokenizer, path, config, None, path)
        self._attach(self._loaded)
        return loaded

    def _take_vocabulary(self) -> None:
        """Find how many tokens have a text and a score."""
        loaded = self._loaded
        assert loaded is not None
        n_texts = max(loaded.tokenizer.get_vocab().values()) + 1
        if self.is_distributed:
            config = loaded.config
            n_scores = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        else:
            n_scores = loaded.model(mx.array([[0]])).shape[-1]  # nothing is computed for a shape
        self.n_tokens = min(n_texts, n_scores or n_texts)

    def _check_speculation(self) -> None:
        """Raises: SpeculationError for a draft model that the model cannot be used with."""
        self.most_draft_tokens = speculation.ANY_NUMBER
        loaded, draft = self._loaded, self._draft
        if loaded is None or draft is None:
            return
        if draft.tokenizer.vocab_size != loaded.tokenizer.vocab_size:
            raise SpeculationError(
                400,
                f"The draft model {draft.name} has another vocabulary than {loaded.name}.",
                "draft_model",
            )
        caches, draft_caches = make_prompt_cache(loaded.model), make_prompt_cache(draft.model)
        try:
            n_drafted = self.cli_args.num_draft_tokens
            speculation.check(loaded.name, caches, draft_caches, n_drafted, loaded.max_context)
            self.most_draft_tokens = speculation.most_draft_tokens([*caches, *draft_caches])
        except InputError as error:
            raise SpeculationError(400, str(error), "draft_model") from error

    def _attach(self, loaded: models.Loaded) -> None:
        model: Any = loaded.model
        centre = for_model(self.cache_options.get("centre", True), loaded.tokenizer, loaded.name)
        attach(model, **self.cache_options | {"centre": centre})
