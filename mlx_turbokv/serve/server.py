"""Start-up of the server, and its end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..errors import InputError
from ..loading import distributed
from ..policy import Policy
from . import prompt_cache
from .connections import Server
from .generation import Generator
from .handler import Handler
from .models import TurboModelProvider

END_SECONDS = 3.0


def serve(
    options: argparse.Namespace,
    policy: Policy,
    allowed: Sequence[str] = (),
    **cache_options: Any,
) -> None:
    """Run the server until it is interrupted or terminated.

    Args:
        options: what ``options.parse`` read.
        policy: which KV layer gets which formats.
        allowed: models that clients may name besides the one of the options.
        cache_options: the other arguments of ``attach``.

    Raises:
        InputError: the address cannot be listened on, the model cannot be loaded, or the policy
            does not fit it.
        SystemExit: 1; the generating thread has ended.
    """
    maybe_set_recommended_wired_limit()
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )
    provider = TurboModelProvider(options, allowed, policy=policy, **cache_options)
    http = None
    if distributed.rank() == 0:
        http = Server(options.host, options.port, None)
    # A shell's background job inherits an ignored SIGINT, and the main thread is woken by one.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    generator = caches = None
    try:
        caches = prompt_cache.make(options)
        generator = Generator(provider, caches, http.say_address if http else lambda: None)
        generator.services.metrics.log_regularly()
        if http is None:
            generator.join()
        else:
            http.RequestHandlerClass = partial(Handler, generator, int(time.time()))
            http.serve_until_interrupted()
    except KeyboardInterrupt:
        pass
    finally:
        if generator is not None:
            generator.stop_and_join()
        if http is not None:
            http.wait_for_answers(END_SECONDS)
            http.server_close()
        if caches is not None:
            caches.close()
    if generator is not None and generator.generation_available():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)  # it waits for a process that has ended, and would keep this one
    if generator is not None and isinstance(generator.failure, InputError):
        raise generator.failure
    if generator is not None and generator.failure is not None:
        raise SystemExit(1)
