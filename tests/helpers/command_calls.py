"""Commands run in this process: output, status, and whether they came to load something."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import click

from mlx_turbokv.cli import COMMANDS
from mlx_turbokv.cli.entry import run


class LoadedError(Exception):
    """A model, a text from the hub, kernels or a server were about to be used."""


@dataclass
class Result:
    status: int | None  # None: the command got as far as loading something
    out: str
    err: str

    def error(self) -> str:
        """The one sentence of a refused command."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert self.status == 2 and len(lines) == 1, (self.status, self.err)
        return lines[0].removeprefix("Error: ")


def _loaded(*_: object, **__: object) -> None:
    raise LoadedError


@contextlib.contextmanager
def nothing_loads() -> Iterator[None]:
    """Whatever loads a model, fetches a text, checks kernels or serves raises LoadedError."""
    names = (
        "mlx_turbokv.loading.models.load", "mlx_turbokv.loading.models.load_config",
        "mlx_turbokv.loading.random_model.random_model", "mlx_turbokv.loading.distributed.load",
        "mlx_turbokv.evaluate.text._fetch_wikitext", "mlx_turbokv.doctor.examine",
        "mlx_turbokv.serve.server.serve", "mlx_turbokv.report.plan.make_plan",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(name, _loaded))
        yield


def command_of(name: str) -> click.Command:
    return importlib.import_module(f"mlx_turbokv.cli.{name}").command


def call(command: click.Command | str, *args: object, stdin: bytes = b"") -> Result:
    """Run a command; an exception that would be a traceback goes on."""
    command = command_of(command) if isinstance(command, str) else command
    out, err = io.StringIO(), io.StringIO()
    source = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "stdin", source):
            try:
                run(command, [str(arg) for arg in args])
            except SystemExit as ended:
                status = int(ended.code or 0)
            except LoadedError:
                status = None
    return Result(status, out.getvalue(), err.getvalue())


def refused(command: click.Command | str, *args: object, words: Sequence[str] = ()) -> str:
    """The sentence of a command that must be refused before anything is loaded."""
    with nothing_loads():
        result = call(command, *args)
    sentence = result.error()
    assert result.out == ""
    for word in words:
        assert word in sentence, sentence
    return sentence


__all__ = ["COMMANDS", "LoadedError", "Result", "call", "command_of", "nothing_loads", "refused"]
