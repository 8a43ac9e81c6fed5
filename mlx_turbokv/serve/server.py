"""Start-up of mlx_lm.server with packed caches, and its end."""

from __future__ import annotations

import argparse
import logging
import signal
from typing import Any

from mlx_lm import server
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..errors import InputError
from ..loading import distributed
from ..policy import Policy
from . import prompt_cache
from .generation import Generator
from .handler import Server
from .models import TurboModelProvider


def serve(options: argparse.Namespace, policy: Policy, **cache_options: Any) -> None:
    """Run the server until it is interrupted or terminated.

    Args:
        options: what ``options.parse`` read.
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
    generator = Generator(provider, prompt_cache.make(options))
    # A shell's background job inherits an ignored SIGINT, and the main thread is woken by one.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    try:
        if distributed.rank() == 0:
            server._run_http_server(options.host, options.port, generator, server_class=Server)
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
