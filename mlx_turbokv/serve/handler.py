"""HTTP: connections and requests."""

from __future__ import annotations

import logging
import sys
from http.server import ThreadingHTTPServer
from typing import Any

logger = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Logs clients that disconnect without a traceback; does not wait for others when it ends."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            logger.info("A client disconnected.")
        else:
            super().handle_error(request, client_address)
