"""Entry point of every command: errors as one sentence on stderr, and exit statuses."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import click

from ..errors import InputError
from ..log import logger
from .command import ClosedPipeError
from .output import InterruptedRunError, shorten, silence_stdout

USAGE_STATUS = 2
INTERRUPT_STATUS = 130
PIPE_STATUS = 141
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def run(command: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    Bad input (InputError, what click refuses, a missing file) prints ``Error: <one sentence>`` on
    stderr and exits with 2, as a closed stdout does; Ctrl-C exits with 130, a reader that closed
    the pipe with 141. The package's log messages go to stderr as they are.
    """
    _open_descriptors()
    _log_to_stderr()
    try:
        words = list(sys.argv[1:] if args is None else args)
        _check_text(words)
        _replace_unprintable()
        name = os.path.basename(sys.argv[0])
        status = command.main(words, name, standalone_mode=False, show_default=True)
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(_one_sentence(error))
    except (click.Abort, KeyboardInterrupt) as error:
        # click raises Abort from the KeyboardInterrupt that it catches
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        more = f": {cause}" if isinstance(cause, InterruptedRunError) else ""
        print(f"Interrupted{more}.", file=sys.stderr)
        sys.exit(INTERRUPT_STATUS)
    except (BrokenPipeError, ClosedPipeError):
        silence_stdout()
        sys.exit(PIPE_STATUS)
    except OSError as error:
        if error.filename is not None:
            _fail(f"{error.filename} cannot be used ({error.strerror}).")
        if error.errno not in _DISK_ERRORS:
            raise
        with contextlib.suppress(OSError):
            silence_stdout()
        _fail(f"The output cannot be written ({error.strerror}).")
    sys.exit(status if isinstance(status, int) else 0)


def console_script(command: click.Command) -> Callable[[], NoReturn]:
    """The function of a console script that runs ``command``."""
    return lambda: run(command)


def _open_descriptors() -> None:
    """Nothing that is opened later takes the place of a standard stream that is closed.

    MLX, for one, cannot read a file that has descriptor 0. Raises: SystemExit where stdout is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _fail("The output cannot be written: standard output is closed.")


def _check_text(words: list[str]) -> None:
    """Raises: InputError for an argument of bytes that are not UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"The argument {ascii(word)} is not text in UTF-8.") from None


def _replace_unprintable() -> None:
    """What a terminal's encoding lacks is printed as a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _fail(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(USAGE_STATUS)


def _one_sentence(error: click.ClickException) -> str:
    message = shorten(" ".join(error.format_message().split()))
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
