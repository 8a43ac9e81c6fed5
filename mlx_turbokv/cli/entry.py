"""Entry point of every command: errors as one sentence on stderr, and exit statuses."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import click

from ..errors import InputError
from ..log import logger

USAGE_STATUS = 2
INTERRUPT_STATUS = 130
PIPE_STATUS = 141


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    Bad input (InputError, what click refuses, a missing file) prints ``Error: <one sentence>`` on
    stderr and exits with 2; Ctrl-C exits with 130, a reader that closed the pipe with 141. The
    package's log messages go to stderr as they are.
    """
    _log_to_stderr()
    try:
        words = None if args is None else list(args)
        name = os.path.basename(sys.argv[0])
        status = command.main(words, name, standalone_mode=False, show_default=True)
    except InputError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(_one_sentence(error))
    except (click.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPT_STATUS)
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_STATUS)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename} cannot be used ({error.strerror}).")
    sys.exit(status if isinstance(status, int) else 0)


def console_script(command: click.Command) -> Callable[[], NoReturn]:
    """The function of a console script that runs ``command``."""
    return lambda: run(command)


def _fail(message: str) -> NoReturn:
    sys.stdout.flush()
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(USAGE_STATUS)


def _one_sentence(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(error, click.UsageError):
        message = f"{message.rstrip('.')}; see {context.command_path} --help."
    return message


def _log_to_stderr() -> None:
    if not logger.handlers:
        logger.addHandler(_Stderr())
        logger.propagate = False


class _Stderr(logging.Handler):
    """Writes to the present sys.stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)
