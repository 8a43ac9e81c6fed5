"""Types of the options' values, and what options must not be given together."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..errors import InputError
from ..policy.presets import format_of
from ..policy.protection import check_count
from ..quant.formats import FORMAT_NAMES, KVFormat

MOST_TOKENS = 1 << 24
COUNT = click.IntRange(1, MOST_TOKENS)
BACKENDS = ("auto", "metal", "cuda", "reference")
BACKEND_VARIABLE = "TURBOKV_BACKEND"
SEED = click.IntRange(0, (1 << 64) - 1)
# The coldest temperature above 0 whose inverse keeps logits finite in 16 bits.
COLDEST, HOTTEST = 0.001, 1000


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Temperature(Number):
    """0, or a number that logits can be divided by."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if number != 0 and not COLDEST <= number <= HOTTEST:
            self.fail(f"{value} is neither 0 nor from {COLDEST} to {HOTTEST}", param, ctx)
        return number


class FormatType(click.ParamType):
    """A K or V format by name."""

    name = "format"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> KVFormat:
        return format_of(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in FORMAT_NAMES if name.startswith(incomplete)]


class ProtectedType(click.ParamType):
    """A number of protected tokens."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number: Any = int(value)
        except ValueError:
            number = value
        return check_count("--" + (param.name or "") if param else "The number", number)


class BackendType(click.ParamType):
    """A back-end by name, of the command line or of the environment variable."""

    name = "backend"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in BACKENDS if name.startswith(incomplete)]

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(BACKENDS)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if (name := value.strip().lower()) not in BACKENDS:
            from_environment = ctx is not None and ctx.get_parameter_source("backend") is (
                ParameterSource.ENVIRONMENT
            )
            where = BACKEND_VARIABLE if from_environment else "--backend"
            raise InputError(
                f"{where} {value!r} is not accepted: give one of {', '.join(BACKENDS)}."
            )
        return name


class Size(click.ParamType):
    """A number of bytes, or one with kB, MB, GB or TB, as mlx_lm.server takes them."""

    name = "size"
    _UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    _MOST = 1 << 62
    _END = "B?"
    _EXAMPLE = "a number of bytes such as 12GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(
            rf"(\d{{1,18}}(?:\.\d{{1,9}})?)\s*([KMGT]?){self._END}", value.strip(), re.I
        )
        size = int(Decimal(match[1]) * self._UNITS[match[2].upper()]) if match else 0
        if not 0 < size < self._MOST:
            self.fail(f"{value} is not {self._EXAMPLE}", param, ctx)
        return size


class MemorySize(Size):
    """A number of GiB, or one with MB, GB or TB, which are binary as memory is sold."""

    name = "memory"
    _UNITS = {"": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    _END = "(?:(?<=[KMGT])i?B)?"  # no unit is GiB, so B alone would say the opposite
    _EXAMPLE = "a size of memory such as 16GB"


class TokenCount(click.ParamType):
    """A number of tokens; K and M are 1,024 and 1,024 times that."""

    name = "tokens"
    _UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
    MOST = 1 << 40

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,13}(?:\.\d{1,3})?)([KM]?)", str(value).strip(), re.I)
        n = Decimal(match[1]) * self._UNITS[match[2].upper()] if match else Decimal(0)
        if n != int(n) or not 1 <= n <= self.MOST:
            self.fail(f"{value} is not a number of tokens such as 32768 or 128K", param, ctx)
        return int(n)


UNIT = Number(0, 1)
SIZE = Size()


def given(name: str) -> str | None:
    """The option of this parameter as it is called, if the command line has it."""
    ctx = click.get_current_context(silent=True)
    if ctx is None or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        return None
    param = next(p for p in ctx.command.params if p.name == name)
    if param.secondary_opts and ctx.params.get(name) is False:
        return max(param.secondary_opts, key=len)
    return max(param.opts, key=len)


def check_max_tokens(n: int) -> None:
    """Raises: InputError where --max-tokens is neither a number of tokens nor -1."""
    if n == 0 or n < -1:
        raise InputError(f"--max-tokens {n} is not accepted: give at least 1, or -1 for no limit.")


def check_max_kv_size(n: int | None) -> None:
    """Raises: InputError where --keys, --sink or --recent is given with --max-kv-size."""
    if n is not None:
        refuse(["keys"], "with --max-kv-size: the keys of a window stay whole")
        refuse(["sink", "recent"], "with --max-kv-size: a window protects no tokens")


def refuse(names: Collection[str], why: str) -> None:
    """Refuse options that would change nothing.

    Args:
        names: their parameters' names.
        why: ends the sentence "--x has no effect ...".

    Raises:
        InputError: one of them was given.
    """
    for name in names:
        if option := given(name):
            raise InputError(f"{option} has no effect {why}.")


def refuse_all_but(names: Collection[str], why: str) -> None:
    """As ``refuse``, for every option of the command but these."""
    ctx = click.get_current_context()
    refuse([p.name for p in ctx.command.params if p.name and p.name not in names], why)


def exclude(first: str, second: str) -> None:
    """Raises: InputError where both parameters' options were given."""
    one, other = given(first), given(second)
    if one and other:
        raise InputError(f"{one} and {other} cannot be given together.")
