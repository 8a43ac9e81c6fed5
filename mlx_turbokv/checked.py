"""What callers in Python give, checked by the kind of each argument.

To add an argument to a function that is ``checked``: name its kind there.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import InputError, short

F = TypeVar("F", bound=Callable[..., Any])
Check = Callable[[str, Any], None]


@dataclass(frozen=True)
class Kind:
    """A kind of value; called with an argument's name and its value, it checks them.

    Args:
        accepted: what to give, as the end of a sentence.
        fits: whether a value is of this kind.
    """

    accepted: str
    fits: Callable[[Any], bool]

    def __call__(self, name: str, value: Any) -> None:
        """Raises: InputError for a value of another kind."""
        if not self.fits(value):
            raise InputError(f"{name} {short(value)} is not accepted: give {self.accepted}.")

    def or_none(self) -> Kind:
        """The same, where None stands for no value."""
        return Kind(self.accepted, lambda value: value is None or self.fits(value))


def of(accepted: str, *types: type) -> Kind:
    """The kind of all values of some types."""
    return Kind(accepted, lambda value: isinstance(value, types))


def list_of(what: str, fits: Callable[[Any], bool]) -> Kind:
    """The kind of lists and tuples whose values all fit.

    Args:
        what: they hold, and an example.
    """
    return Kind(
        f"a list of {what}",
        lambda value: isinstance(value, (list, tuple)) and all(map(fits, value)),
    )


def is_path(value: Any) -> bool:
    """Whether a value names a file: a string, or an object that gives one."""
    return isinstance(value, str) or (
        isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    )


BOOLEAN = of("True or False", bool)
INTEGER = Kind(
    "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)
)
STRING = of("a string", str)
PATH = Kind("a file's path", is_path)


def checked(**kinds: Check) -> Callable[[F], F]:
    """Check the arguments of a function before it runs.

    Args:
        kinds: of every parameter, by its name. One whose default is None may be None.

    Raises:
        TypeError: a parameter has no kind, or there is none of a name.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = signature.parameters
        if others := set(parameters) ^ set(kinds):
            raise TypeError(f"{function.__qualname__}: no kind or no parameter {sorted(others)}")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # the function itself says what is missing or not known
                return function(*args, **kwargs)
            for name, value in given.items():
                if value is not None or parameters[name].default is not None:
                    kinds[name](name, value)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
