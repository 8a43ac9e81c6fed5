"""The listening socket, and connections that are slow, half open or too many."""

from __future__ import annotations

import contextlib
import io
import logging
import resource
import select
import socket
import socketserver
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from ..errors import InputError

MOST_CONNECTIONS = 512
OPEN_FILES = 4096
PROBE_SECONDS = 0.5
WAKE_SECONDS = 0.2
BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\r\n"
    b'{"error": {"message": "Too many connections are open.", "type": "server_error", '
    b'"param": null, "code": null}}'
)
logger = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Listens from the start; a connection has a thread.

    Args:
        host, port: where to listen; port 0 chooses one.
        handler: makes the handler of a connection.

    Raises:
        InputError: the address cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self._open = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._active = threading.Condition()
        self.n_active = 0
        self.host = f"[{host}]" if ":" in host else host
        _raise_file_limit()
        try:
            found = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family, address = found[0], found[4]
            _check_unused(self.address_family, address)
            super().__init__(address, handler)  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:
            what = getattr(error, "strerror", None) or error
            raise InputError(f"{self.host}:{port} cannot be listened on ({what}).") from error

    def say_address(self) -> None:
        """Log where clients find the API."""
        logger.info(f"Listening on http://{self.host}:{self.server_port}/v1")

    def server_bind(self) -> None:
        """Bind without asking for the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def serve_until_interrupted(self) -> None:
        """Accept connections, in a thread that KeyboardInterrupt does not reach: it would close
        the connection that is being accepted.

        Raises:
            Exception: what ended the thread.
        """
        failures: list[Exception] = []

        def accept() -> None:
            try:
                self.serve_forever()
            except Exception as error:
                failures.append(error)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            while accepting.is_alive():
                accepting.join(WAKE_SECONDS)  # interrupt_main does not end a wait
        finally:
            self.shutdown()
        if failures:
            raise failures[0]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread, or refuse it."""
        if not self._open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.sendall(BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._open.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    @contextlib.contextmanager
    def answering(self):
        """Counts requests that are being answered."""
        with self._active:
            self.n_active += 1
        try:
            yield
        finally:
            with self._active:
                self.n_active -= 1
                self._active.notify_all()

    def wait_for_answers(self, seconds: float) -> None:
        """Return when nothing is being answered, or after so long."""
        with self._active:
            self._active.wait_for(lambda: self.n_active == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that has gone without a traceback."""
        if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            logger.info("A client disconnected.")
        else:
            logger.exception("A connection failed.")


class DeadlineReader(io.RawIOBase):
    """Reads a socket until a point in time: slow senders hold a thread no longer than others.

    Args:
        connection: the socket.
        seconds: until reading raises TimeoutError.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is, and wait for it until the deadline."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def has_gone(connection: socket.socket) -> bool:
    """Whether the client has closed the connection."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def _check_unused(family: int, address: Any) -> None:
    """Look for a server at the address: some systems let two bind where one binds to all."""
    if address[1] == 0:
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(address)
        except OSError:
            return
    raise OSError("another server answers there")


def _raise_file_limit() -> None:
    """Allow as many open files as there may be connections; macOS starts at 256."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
