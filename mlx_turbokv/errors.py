"""Errors that the person at the keyboard can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the value and what is accepted. The commands print it
    and exit with status 2.
    """
