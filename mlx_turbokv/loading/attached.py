"""mlx-lm's commands with packed caches: they are attached to every model that a command loads.

Evaluations call a model without a cache; such calls are given new packed ones, so that they read
what was packed. Where newest tokens are protected, they go in steps of STEP tokens: tokens of one
longer piece would see each other as the model made them. A model that is being trained is called as
it is: packing has no gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.models import cache as mlx_lm_cache

from ..cache import files
from ..cache.factory import CacheFactory, attach
from ..cache.file_options import Asked
from ..cache.importing import dequantized, packed_as
from ..cache.summary import leaves
from ..centring.first_use import for_model
from ..errors import InputError
from ..model.fingerprint import fingerprint
from ..policy.protection import STEP, UNPROTECTED
from ..policy.recommended import label
from . import distributed, models
from .patching import patched

MOST_LAYERS = 1024  # of a prompt cache file, before its model is known
Say = Callable[[str], None]


class Attaching:
    """What stands in for mlx-lm's loading functions while one of its commands runs.

    Args:
        say: called with each line that the user is told.
        check: called with the command's options once they are read.
        cache_options: as ``attach`` takes them.

    ``asked`` says which of them a prompt cache file must agree with.
    """

    package = "mlx_lm"
    asked = Asked(windows=False)

    def __init__(
        self, say: Say, check: Callable[[Attaching, Any, argparse.ArgumentParser], None],
        **cache_options: Any,
    ) -> None:  # fmt: skip
        self.say, self.check = say, check
        self.cache_options = cache_options
        self.options = argparse.Namespace()
        self.models: list[nn.Module] = []
        self.n_caches = 0  # lists of caches that were made for the command
        self._files: list[tuple[Path, list[Any], dict[str, Any]]] = []
        self._is_loading = False
        self._load: Any = utils.load
        self._sharded_load = utils.sharded_load

    def run(self, name: str, args: list[str]) -> None:
        """Run a command of mlx-lm to its end.

        Args:
            name: of its module in mlx_lm.

        Raises:
            InputError: the command, its options or a model cannot be used so.
        """
        command = _command(self.package, name)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched(sys, argv=[f"{self.package}.{name}", *args]))
            for replaced in self._replaced():
                stack.enter_context(self._patched_everywhere(*replaced))
            stack.enter_context(self._checked_options())
            stack.enter_context(self._counted_caches())
            command.main()

    def _replaced(self) -> list[tuple[str, Any, Any]]:
        """Functions of the package: the name of each, itself, and what stands in for it."""
        load_prompt_cache = mlx_lm_cache.load_prompt_cache
        return [
            ("load", self._load, self.load),
            ("sharded_load", self._sharded_load, self.load_sharded),
            ("load_prompt_cache", load_prompt_cache, self.load_prompt_cache),
        ]

    @property
    def has_packed(self) -> bool:
        """Whether the command had packed caches: new ones, or those of a file."""
        return bool(self.n_caches or self._files)

    def load(self, path_or_hf_repo: str, **options: Any) -> tuple[Any, ...]:
        """As ``mlx_lm.load``, for every model that ``models.load`` knows."""
        if self._is_loading:  # models.load calls mlx_lm.load
            return self._load(path_or_hf_repo, **options)
        own = {key: options.pop(key, None) for key in ("model_config", "lazy", "revision")}
        return_config = options.pop("return_config", False)
        if any((own["model_config"] or {}).values()) or own["lazy"] or own["revision"]:
            given = {key: value for key, value in own.items() if value is not None}
            found: Any = self._load(path_or_hf_repo, return_config=True, **given, **options)
            model, tokenizer, config = found
            name = Path(path_or_hf_repo).name
        else:
            self._is_loading = True
            try:
                loaded = models.load(path_or_hf_repo, **options)
            finally:
                self._is_loading = False
            model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
            name = loaded.name
        self._attach(model, name, tokenizer)
        return (model, tokenizer, config) if return_config else (model, tokenizer)

    def load_sharded(self, path: str, *args: Any, **options: Any) -> tuple[Any, ...]:
        """As ``mlx_lm.utils.sharded_load``."""
        distributed.check_source(path)
        loaded = self._sharded_load(path, *args, **options)
        self._attach(loaded[0], Path(path).name, loaded[1])
        return loaded

    def load_prompt_cache(self, file_name: str, return_metadata: bool = False) -> Any:
        """As mlx-lm's; rows that it kept are packed once the model is there."""
        path = Path(file_name)
        caches, metadata = files.read(path, MOST_LAYERS)
        try:
            caches = [dequantized(cache) for cache in caches]
        except ValueError as error:
            raise InputError(f"The prompt cache file {path} cannot be used: {error}.") from error
        if metadata.get("maker") == files.MAKER:
            # mlx-lm compares what --model says with what was said when the file was made
            metadata["model"] = getattr(self.options, "model", None) or metadata.get("model")
        self._files.append((path, caches, metadata))
        return (caches, metadata) if return_metadata else caches

    def _attach(self, model: nn.Module, name: str, tokenizer: Any) -> None:
        is_draft = bool(self.models) and getattr(self.options, "draft_model", None) is not None
        self.models.append(model)
        if is_draft:
            self.say(f"The draft model {name} keeps mlx-lm's own cache.")
            return
        attach(model, **self._options_for(tokenizer, name))
        _cache_every_call(model)
        if distributed.rank() == 0:
            self._say_formats(model.make_cache, name)
        for path, caches, metadata in self._files:
            self._pack(path, caches, metadata, model)
        self.n_caches = 0

    def _options_for(self, tokenizer: Any, name: str) -> dict[str, Any]:
        """What ``attach`` takes for a model."""
        centre = for_model(self.cache_options.get("centre", True), tokenizer, name)
        return self.cache_options | {"centre": centre}

    def _say_formats(self, factory: Any, name: str) -> None:
        pairs = Counter(f"{k}/{v}" for k, v in factory.formats)
        layers = ", ".join(f"{n} x {pair}" for pair, n in pairs.items()) or "no"
        policy = label(self.cache_options["policy"])
        about = factory.about_keys_and_backend()
        self.say(f"{name}: KV cache {policy} ({layers} layers), {about}")

    def _pack(
        self, path: Path, caches: list[Any], metadata: dict[str, Any], model: nn.Module
    ) -> None:
        """Pack what mlx-lm's own caches of a file hold, in place, now that their model is known."""
        expected = metadata.get("fingerprint")
        if expected not in (None, fingerprint(model, adapters=True)):
            raise InputError(f"The prompt cache file {path} belongs to another model.")
        make_cache: Any = model.make_cache
        fresh = make_cache()
        del caches[len(fresh) :]  # a checkpoint
        n_tokens = files.check_fit(path, caches, fresh, model)
        packed = [packed_as(held, new) for held, new in zip(caches, fresh)]
        n_packed = sum(new is not old for new, old in zip(leaves(packed), leaves(caches)))
        self.asked.check(path, packed, fresh)
        caches[:] = packed
        files.work_as(caches, make_cache())
        if n_packed:
            self.say(f"{path}: {n_tokens:,} tokens are packed in {n_packed} layers.")

    @contextlib.contextmanager
    def _patched_everywhere(self, name: str, old: Any, new: Any) -> Iterator[None]:
        """Replace a function in every module of the package that has it by name."""
        with contextlib.ExitStack() as stack:
            for module_name, module in list(sys.modules.items()):
                if module_name.split(".")[0] == self.package and vars(module).get(name) is old:
                    stack.enter_context(patched(module, **{name: new}))
            yield

    @contextlib.contextmanager
    def _checked_options(self) -> Iterator[None]:
        """Look at the command's options when it has read them."""
        parse = argparse.ArgumentParser.parse_args

        def parse_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            self.options = parse(parser, *args, **kwargs)
            self.check(self, self.options, parser)
            return self.options

        with patched(argparse.ArgumentParser, parse_args=parse_args):
            yield

    @contextlib.contextmanager
    def _counted_caches(self) -> Iterator[None]:
        make = CacheFactory.__call__

        def counted(factory: CacheFactory, *args: Any, **kwargs: Any) -> list[Any]:
            self.n_caches += 1
            return make(factory, *args, **kwargs)

        with patched(CacheFactory, __call__=counted):
            yield


def _command(package: str, name: str) -> Any:
    try:
        return importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        missing = (error.name or "").replace("_", "-") or "what it needs"
        raise InputError(
            f"{package}.{name} cannot be loaded ({error}): pip install {missing}."
        ) from error


def _cache_every_call(model: nn.Module) -> None:
    """Give calls without a cache a new one, unless the model is being trained."""
    base = type(model)
    signature = inspect.signature(base.__call__)
    first = list(signature.parameters)[1]  # the tokens

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("cache") is None and not self.training:
            given["cache"] = self.make_cache()
            given.pop("self", None)
            if set(given) == {first, "cache"} and _protects_newest(given["cache"]):
                return _in_steps(lambda piece: base.__call__(self, piece, cache=given["cache"]),
                                 given[first], given["cache"])  # fmt: skip
            return base.__call__(self, **given)
        return base.__call__(self, *args, **kwargs)

    members = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    object.__setattr__(model, "__class__", type(base.__name__, (base,), members))


def _protects_newest(caches: list[Any]) -> bool:
    return any(getattr(c, "protection", UNPROTECTED).recent for c in leaves(caches))


def _in_steps(call: Callable[[mx.array], mx.array], tokens: mx.array, caches: list) -> mx.array:
    """The logits of tokens that are read STEP at a time.

    Shapes: tokens [B, n]; returns [B, n, vocabulary].
    """
    logits = []
    for start in range(0, tokens.shape[1], STEP):
        logits.append(call(tokens[:, start : start + STEP]))
        mx.eval(logits[-1], [c.state for c in caches])
    return mx.concatenate(logits, axis=1)
