"""Errors that a client is answered with, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

TYPES = {500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """A request that is not done.

    Args:
        status: of HTTP.
        message: one sentence that names the value and what is accepted.
        param: the field of the request that is meant.
        code: OpenAI's short name of the error, such as ``model_not_found``.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, str(self), self.param, self.code)

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class SpeculationError(RequestError):
    """A draft model that a model cannot be used with."""
