"""HTTP: what a client asks for, and how it is answered."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from . import requests
from .answers import ChoiceText, Completion
from .connections import DeadlineReader, has_gone
from .errors import RequestError
from .generation import Generator
from .jobs import Answer, Token
from .prompts import fetch_images
from .schema import ChatBody, TextBody

BODY_BYTES = 64 << 20
REQUEST_SECONDS = 60.0
WRITE_SECONDS = 60.0
WAIT_SECONDS = 1.0
DRAIN_SECONDS = 5.0
HEALTH = ("/health", "/v1/health")
MODELS = ("/v1/models", "/models")
COMPLETIONS: dict[str, type[ChatBody] | type[TextBody]] = {
    "/v1/completions": TextBody,
    "/v1/chat/completions": ChatBody,
    "/chat/completions": ChatBody,
}
_MODEL_PATHS = tuple(f"{path}/" for path in MODELS)
logger = logging.getLogger(__name__)


class Handler(BaseHTTPRequestHandler):
    """One connection.

    Args:
        generator: what generates.
        created: when the server was started, in seconds.
        args: as BaseHTTPRequestHandler takes them.
    """

    server: Any

    def __init__(self, generator: Generator, created: int, *args: Any) -> None:
        self.generator, self.created = generator, created
        self.is_read = self.headers_sent = False
        # more pages, by path: each gives (content type, text)
        self.pages: dict[str, Callable[[], tuple[str, str]]] = generator.pages
        super().__init__(*args)

    def setup(self) -> None:
        """Read with a deadline for the whole request."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, REQUEST_SECONDS))

    def handle_one_request(self) -> None:
        """Read and answer a request; a client that is too slow to send one is told so."""
        self.close_connection = True
        self.requestline, self.request_version, self.command = "", "", ""
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 65536:
                raise RequestError(414, "The request's first line is too long.")
            if self.parse_request():
                self.close_connection = True
                with self.server.answering():
                    self._answer()
            elif not self.headers_sent:
                raise RequestError(400, "The request has no first line.")
        except TimeoutError as error:
            if self.is_read:
                raise ConnectionResetError("The client does not read its answer.") from error
            self._refuse(RequestError(408, "The request did not come in time."))
        except RequestError as error:
            self._refuse(error)

    def _answer(self) -> None:
        """Answer a request whatever happens, unless the client has gone."""
        path = unquote(urlsplit(self.path).path)
        methods = {"GET": self._get, "POST": self._post, "OPTIONS": self._options}
        try:
            # an unread body would have the answer thrown away
            body = self._body()
            self.is_read = True
            if self.command not in methods:
                raise RequestError(405, f"{self.command} is not accepted: use GET or POST.")
            self.connection.settimeout(WRITE_SECONDS)
            methods[self.command](path, body)
            self.wfile.flush()
        except RequestError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            logger.exception("A request failed.")
            self._refuse(RequestError(500, f"The request failed ({type(error).__name__})."))

    def _body(self) -> bytes:
        """The request's body.

        Raises:
            RequestError: it has no length, or is too large.
        """
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") or (length is None and self.command == "POST"):
            raise RequestError(411, "The request has no Content-Length.")
        if length is None:
            return b""
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, f"The Content-Length {length[:40]!r} is not accepted.")
        if int(length[:20]) > BODY_BYTES:
            raise RequestError(
                413, f"The request has {length[:20]} bytes: at most {BODY_BYTES} are accepted."
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("The client left within its request.")
        return body

    def _options(self, path: str, body: bytes) -> None:
        self._send_head(204, "application/json")

    def _get(self, path: str, body: bytes) -> None:
        if path in HEALTH:
            status = self.generator.status
            self._send(200 if status == "ok" else 503, {"status": status})
        elif path.rstrip("/") in MODELS:
            names = self.generator.model_provider.names.listed()
            self._send(200, {"object": "list", "data": [self._model(name) for name in names]})
        elif path.startswith(_MODEL_PATHS):
            name = path.split("/models/", 1)[1]
            self.generator.model_provider.names.source(name)
            self._send(200, self._model(name))
        elif path in self.pages:
            kind, text = self.pages[path]()
            self._send_head(200, kind, len(text.encode()))
            self.wfile.write(text.encode())
        elif path in COMPLETIONS:
            raise RequestError(405, f"GET is not accepted for {path}: use POST.")
        else:
            raise RequestError(404, f"There is no {path[:200]!r}: see /v1/models.")

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_turbokv"}

    def _post(self, path: str, body: bytes) -> None:
        if path in (*HEALTH, *MODELS, *self.pages) or path.startswith(_MODEL_PATHS):
            raise RequestError(405, f"POST is not accepted for {path[:200]}: use GET.")
        if path not in COMPLETIONS:
            raise RequestError(404, f"There is no {path[:200]!r}: see /v1/chat/completions.")
        provider = self.generator.model_provider
        asked = requests.read(body, COMPLETIONS[path], provider.cli_args)
        model = asked.arguments[0].model
        provider.key(model.model, model.adapter, model.draft)
        for prompt in asked.prompts:
            if provider.processor is not None:
                fetch_images(prompt.messages)
        answer = self.generator.submit(asked)
        try:
            self._complete(Completion(asked), answer)
        except OSError:
            logger.info("A client disconnected.")
            raise
        finally:
            answer.cancel()

    def _complete(self, completion: Completion, answer: Answer) -> None:
        """Send a completion as it comes, or at its end."""
        asked = completion.asked
        choices: dict[int, ChoiceText] = {}
        n_choices, n_ended = len(asked.prompts) * len(asked.arguments), 0
        looked, provider = time.monotonic(), self.generator.model_provider
        while n_ended < n_choices:
            received = self.generator.receive(answer, WAIT_SECONDS)
            if time.monotonic() - looked > WAIT_SECONDS or received is None:
                looked = time.monotonic()
                if has_gone(self.connection):
                    raise ConnectionResetError
            if received is None:
                continue
            index, item = received
            if item is None:
                n_ended += 1
            elif isinstance(item, RequestError):
                raise item
            elif isinstance(item, Exception):
                raise RequestError(500, f"Generation failed ({type(item).__name__}: {item}).")
            elif isinstance(item, Token):
                choice = choices[index]
                choice.add(item)
                if asked.stream and (choice.has_part or choice.finish_reason):
                    self._send_event(completion.chunk([completion.part(index, choice)]))
            elif isinstance(item, tuple):
                if asked.stream and self.headers_sent:
                    self._send_line(f": keepalive {item[0]}/{item[1]}")
            else:
                prompt = asked.prompts[index // len(asked.arguments)]
                choices[index] = ChoiceText(item, prompt.tools, asked.stream)
                if getattr(asked.body, "echo", None):
                    completion.echo(index, provider.text_of(prompt.prompt))
                if asked.stream and not self.headers_sent:
                    self._send_head(200, "text/event-stream")
        ordered = [choices[index] for index in sorted(choices)]
        if not asked.stream:
            self._send(200, completion.whole(ordered))
            return
        if asked.include_usage:
            self._send_event(completion.usage_chunk(ordered))
        self._send_line("data: [DONE]")

    def _send_event(self, chunk: dict[str, Any]) -> None:
        self._send_line(f"data: {json.dumps(chunk)}")

    def _send_line(self, line: str) -> None:
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def _send_head(self, status: int, kind: str, length: int | None = None) -> None:
        if self.command == "POST":
            self.generator.answered(status)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if kind == "text/event-stream":
            self.send_header("Cache-Control", "no-cache")
        allowed = self.generator.cli_args.allowed_origins
        origin = self.headers.get("Origin") if getattr(self, "headers", None) else None
        if "*" in allowed:
            self.send_header("Access-Control-Allow-Origin", "*")
        elif origin is not None and origin in allowed:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.headers_sent = True
        self.end_headers()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._send_head(status, "application/json", len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, error: RequestError) -> None:
        """Send an error; within a stream it is the last event."""
        logger.info(f"{error.status}: {error}")
        with contextlib.suppress(OSError):
            if self.headers_sent:
                self._send_event(error.body)
                return
            self.connection.settimeout(WRITE_SECONDS)
            self.request_version = "HTTP/1.0"  # what cannot be read is answered with a status too
            self._send(error.status, error.body)
            self.wfile.flush()
            if not self.is_read:
                self._drain()

    def _drain(self) -> None:
        """Read the rest of a request that was not read, or its sender never sees the answer."""
        end = time.monotonic() + DRAIN_SECONDS
        self.connection.settimeout(0.2)
        while time.monotonic() < end and self.connection.recv(1 << 16):
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in the form of the others."""
        status = int(code) if code < 500 else 400
        self._refuse(RequestError(status, f"{message or 'The request is not accepted'}."))
