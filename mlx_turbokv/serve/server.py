"""mlx_lm.server with packed caches: they are attached to every model that it loads."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import maybe_set_recommended_wired_limit, sharded_load

from ..cache.factory import attach
from ..errors import InputError
from ..kernels.backend import select_backend
from ..loading import distributed, models
from ..policy import Policy

NO_LIMIT = 1 << 63
MOST_TOKENS = 1 << 24
# What mlx_lm.server's numbers may be.
_RANGES = {
    "port": (0, 65535), "temp": (0, 1000), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, NO_LIMIT),
    "max_tokens": (1, NO_LIMIT), "num_draft_tokens": (1, MOST_TOKENS),
    "decode_concurrency": (1, 4096), "prompt_concurrency": (1, 4096),
    "prefill_step_size": (1, MOST_TOKENS), "prompt_cache_size": (0, NO_LIMIT),
    "prompt_cache_bytes": (0, NO_LIMIT),
}  # fmt: skip
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _patched(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes for the duration of the block."""
    old = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(target, name, value)


class _ParserReadyError(Exception):
    """Ends mlx_lm.server's main function when its parser is complete."""


def server_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.server's own options; its errors are InputErrors."""
    found: list[Any] = []

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found.append(parser)
        raise _ParserReadyError

    def error(message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; see mlx_turbokv serve --help.")

    with _patched(argparse.ArgumentParser, parse_args=parse_args):
        with contextlib.suppress(_ParserReadyError):
            server.main()
    parser = found[0]
    parser.error = error
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of mlx_lm.server.

    Raises:
        InputError: an unknown option or a value that is not accepted.
    """
    try:
        options = server_parser().parse_args(list(arguments))
    except (ArithmeticError, KeyError, RecursionError) as error:
        # what the types of mlx_lm.server's options raise beside what argparse expects
        raise InputError(
            "--prompt-cache-bytes takes a number of bytes, or one with M, MB, G or GB, and "
            f"--chat-template-args a JSON object ({type(error).__name__})."
        ) from error
    if options.kv_bits is not None:
        raise InputError(
            f"--kv-bits {options.kv_bits} is mlx-lm's own quantised cache; the packed cache's "
            "formats are given with -ctk and -ctv."
        )
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            limits = f"{least} to {most}" if most < NO_LIMIT else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value} is not accepted: give {limits}.")
    if not isinstance(options.chat_template_args, dict):
        raise InputError("--chat-template-args is not a JSON object.")
    words = [word.split("=")[0] for word in arguments]
    if options.draft_model is None and "--num-draft-tokens" in words:
        raise InputError("--num-draft-tokens has no effect without --draft-model.")
    if options.chat_template and options.use_default_chat_template:
        raise InputError(
            "--chat-template and --use-default-chat-template cannot be given together."
        )
    return options


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
        with _patched(server, load=self._load_one, sharded_load=self._load_sharded):
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


class _Generator(server.ResponseGenerator):
    """Clears its thread's streams: MLX aborts a process that ends while they exist."""

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            mx.clear_streams()


class _Server(ThreadingHTTPServer):
    """Logs clients that disconnect without a traceback; does not wait for others when it ends."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            logger.info("A client disconnected.")
        else:
            super().handle_error(request, client_address)


def serve(options: argparse.Namespace, policy: Policy, **cache_options: Any) -> None:
    """Run the server until it is interrupted or terminated.

    Args:
        options: what ``parse`` read.
        policy: which KV layer gets which formats.
        cache_options: the other arguments of ``attach``: backend, centre, compress_sliding.

    Raises:
        InputError: the model cannot be loaded, the policy does not fit it, or the address cannot
            be listened on.
    """
    maybe_set_recommended_wired_limit()
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )
    provider = TurboModelProvider(options, policy=policy, **cache_options)
    max_bytes = NO_LIMIT if options.prompt_cache_bytes is None else options.prompt_cache_bytes
    generator = _Generator(provider, LRUPromptCache(options.prompt_cache_size, max_bytes))
    # A shell's background job inherits an ignored SIGINT, and the main thread is woken by one.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    try:
        if distributed.rank() == 0:
            server._run_http_server(options.host, options.port, generator, server_class=_Server)
        else:
            generator.join()
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise InputError(
            f"{options.host}:{options.port} cannot be listened on ({error.strerror or error})."
        ) from error
    finally:
        generator.stop_and_join()
    if provider.failure is not None:
        raise provider.failure
