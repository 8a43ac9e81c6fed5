"""Requests given to a server's generating thread, without HTTP."""

from __future__ import annotations

from mlx_turbokv.serve import requests
from mlx_turbokv.serve.generation import Generator
from mlx_turbokv.serve.jobs import Answer, Token
from mlx_turbokv.serve.schema import TextBody


def submit(generator: Generator, **fields) -> Answer:
    """Start a text completion with these fields."""
    body = TextBody(**{"prompt": "the", "max_tokens": 12, **fields})
    raw = body.model_dump_json(exclude_unset=True).encode()
    return generator.submit(requests.read(raw, TextBody, generator.cli_args))


def result(generator: Generator, answer: Answer) -> list:
    """Tokens of one choice, and the exception that ended it."""
    found = []
    while True:
        received = generator.receive(answer, 60)
        assert received is not None
        item = received[1]
        if item is None:
            return found
        if isinstance(item, Token):
            found.append(item.token)
        elif isinstance(item, Exception):
            return [*found, item]


def alone(generator: Generator, **fields) -> list:
    """Submit a request, and its result."""
    return result(generator, submit(generator, **fields))
