"""The error for input that cannot be used."""

from __future__ import annotations


class InputError(ValueError):
    """An option, file or argument that cannot be used.

    The message is one sentence that names the value and what is accepted. The commands print it
    and exit with status 2.
    """
