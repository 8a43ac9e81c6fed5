"""mlx_lm.server with packed caches: its models are loaded here and get packed caches attached."""

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
from mlx_lm.generate import maybe_set_recommended_wired_limit
from mlx_lm.models.cache import LRUPromptCache

from ..cache.factory import attach
from ..errors import InputError
from ..kernels.backend import select_backend
from ..loading import distributed, models
from ..policy import Policy

NO_LIMIT = 1 << 63
logger = logging.getLogger(__name__)


class _Parser(Exception):
    """Carries mlx_lm.server's parser out of its main function."""


def server_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.server's own options; its errors are InputErrors."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Parser(parser)

    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop
    try:
        server.main()
    except _Parser as found:
        parser = found.args[0]
    finally:
        argparse.ArgumentParser.parse_args = parse_args

    def error(message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; see mlx_turbokv serve --help.")

    parser.error = error
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of mlx_lm.server.

    Raises:
        InputError: an unknown option or a value that is not accepted.
    """
    options = server_parser().parse_args(list(arguments))
    if options.kv_bits is not None:
        raise InputError(
            f"--kv-bits {options.kv_bits} is mlx-lm's own quantised cache; the packed cache's "
            "formats are given with -ctk and -ctv."
        )
    if not 0 <= options.port < 1 << 16:
        raise InputError(f"--port {options.port} is not accepted: give 0 to 65535.")
    return options


class TurboModelProvider(server.ModelProvider):
    """mlx_lm.server's model provider, for every model that ``models.load`` knows.

    Args:
        options: mlx_lm.server's.
        policy: which KV layer gets which formats.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: as ``attach`` takes it.
        compress_sliding: whether sliding windows are packed too.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        policy: Policy,
        backend: str | None,
        centre: bool | str = True,
        compress_sliding: bool = False,
    ) -> None:
        super().__init__(options)
        self.policy = policy
        self.backend = backend
        self.centre = centre
        self.compress_sliding = compress_sliding
        self.failure: Exception | None = None

    def load_default(self) -> None:
        """Load the command line's model or the default one; where that fails, the server ends."""
        try:
            self.load("default_model", None, "default_model")
        except Exception as error:
            self.failure = error
            _thread.interrupt_main()
            raise SystemExit from error  # ends this thread, which has nothing to generate with

    def _load(self, *paths: str | None) -> None:
        with _loading_through(self._load_plain, self._load_sharded):
            super()._load(*paths)

    def _load_plain(self, path: str | None, **options: Any) -> tuple[Any, ...]:
        """What mlx_lm.load does; a draft model keeps its own cache."""
        is_draft = not options.pop("return_config", False)
        loaded = models.load(path, **options)
        if is_draft:
            return loaded.model, loaded.tokenizer
        self._attach(loaded.model, loaded.name)
        return loaded.model, loaded.tokenizer, loaded.config

    def _load_sharded(self, path: str, **options: Any) -> tuple[Any, ...]:
        distributed.check_source(path)
        model, tokenizer, config = _sharded_load(path, **options)
        self._attach(model, path)
        return model, tokenizer, config

    def _attach(self, model: Any, name: str) -> None:
        attach(
            model,
            policy=self.policy,
            backend=self.backend,
            centre=self.centre,
            compress_sliding=self.compress_sliding,
        )
        if not distributed.is_first():
            return
        factory = model.make_cache
        turbo_keys = any(k.is_turbo for k, _ in factory.formats)
        centred = f"{factory.centring.summary()}, " if turbo_keys else ""
        backend = select_backend(self.backend).name
        print(
            f"Serving {name}: KV cache {self.policy.name}, {centred}{backend} back-end",
            file=sys.stderr,
        )


_sharded_load = server.sharded_load


@contextlib.contextmanager
def _loading_through(load: Any, sharded_load: Any) -> Iterator[None]:
    held = server.load, server.sharded_load
    server.load, server.sharded_load = load, sharded_load
    try:
        yield
    finally:
        server.load, server.sharded_load = held


class _Generator(server.ResponseGenerator):
    """Gives its thread's streams back: MLX aborts a process that ends while they are there."""

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            mx.clear_streams()


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that went away; ends without waiting for those that stay."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            logger.info("A client disconnected.")
        else:
            super().handle_error(request, client_address)


def serve(
    options: argparse.Namespace,
    policy: Policy,
    backend: str | None = None,
    centre: bool | str = True,
    compress_sliding: bool = False,
) -> None:
    """Run the server until it is interrupted or terminated.

    Args:
        options: what ``parse`` read.
        policy: which KV layer gets which formats.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        compress_sliding: whether sliding windows are packed too.

    Raises:
        InputError: the model cannot be loaded, the policy does not fit it, or the address cannot
            be listened on.
    """
    maybe_set_recommended_wired_limit()
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )
    provider = TurboModelProvider(options, policy, backend, centre, compress_sliding)
    max_bytes = NO_LIMIT if options.prompt_cache_bytes is None else options.prompt_cache_bytes
    prompt_cache = LRUPromptCache(options.prompt_cache_size, max_bytes)
    generator = _Generator(provider, prompt_cache)
    # A shell's background job inherits an ignored SIGINT, and the main thread is woken by one.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    try:
        if mx.distributed.init().rank() == 0:
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
