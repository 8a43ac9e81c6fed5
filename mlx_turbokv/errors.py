"""The error for input that cannot be used."""

from __future__ import annotations


class InputError(ValueError):
    """An option, file or argument that cannot be used.

    The message is one sentence that names the value and what is accepted. The commands print it
    and exit with status 2.
    """


def short(value: object, most: int = 60) -> str:
    """A value as a message shows it: its ``repr``, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
