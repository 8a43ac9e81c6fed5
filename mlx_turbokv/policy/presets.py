"""Policies by name: the paper's presets, the environment variable, and parametrised names.

The presets are those of TurboQuant+'s TURBO_LAYER_ADAPTIVE (TheTom/llama-cpp-turboquant), counted
in ordinals of KV layers.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping

from ..checked import PATH, Kind, checked
from ..errors import InputError
from ..quant.formats import FORMAT, KVFormat, as_format, nearest_format
from .files import read_layer_list
from .policies import DEFAULT_K, DEFAULT_V, Boundary, LastN, Policy, Preset, Uniform
from .protection import UNPROTECTED
from .settings import SETTINGS

ENVIRONMENT = "TURBO_LAYER_ADAPTIVE"
PRESETS = {"la-v5": 5, "la-v6": 6, "la-v7": 7, "boundary-v": 7}
MODES = (0, 1, 2, 5, 6, 7, 10)
ACCEPTED = (
    f"{', '.join(SETTINGS)}, uniform, la-v5, la-v6, la-v7 (or boundary-v), "
    "mode-N (N one of 0, 1, 2, 5, 6, 7, 10), "
    "boundary:A,B[:V or :K/V], last:N[:V or :K/V] and the path of a JSON file"
)


def layer_adaptive(
    mode: int | str, k: KVFormat | str | None = None, v: KVFormat | str | None = None
) -> Policy:
    """The policy that TURBO_LAYER_ADAPTIVE=mode names; like the paper, it protects no tokens.

    Args:
        mode: 0, 1, 2, 5, 6, 7 or 10.
        k: K's format where the mode does not set it (default q8_0).
        v: V's format outside the protected layers (default turbo2).

    Raises:
        InputError: another mode.
    """
    try:
        number = int(mode)
    except (TypeError, ValueError, OverflowError):
        number = -1
    k, v = as_format(k or DEFAULT_K), as_format(v or DEFAULT_V)
    q8, turbo4 = as_format("q8_0"), as_format("turbo4")
    # a boundary ordinal may belong to both ends, so the protected count is the sum of both
    policies: dict[int, Policy] = {
        0: Uniform(k, v, protection=UNPROTECTED),
        1: Preset("mode-1", Boundary(k, v, 4, 4, q8, q8), 8),
        2: Preset("mode-2", LastN(k, v, 8, q8, q8), 8),
        5: Preset("la-v5", Boundary(k, v, 2, 2, None, turbo4), 4),
        6: Preset("la-v6", LastN(k, v, 8, None, turbo4), 8),
        7: Preset("la-v7", Boundary(k, v, 2, 2, None, q8), 4),
        10: Preset("mode-10", Boundary(k, v, 4, 4, None, q8), 8),
    }
    if number not in policies:
        raise InputError(
            f"Unknown layer-adaptive mode {str(mode)!r}: accepted are {', '.join(map(str, MODES))}."
        )
    return policies[number]


def from_environment(
    k: KVFormat | str | None = None,
    v: KVFormat | str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Policy | None:
    """The policy that the environment variable TURBO_LAYER_ADAPTIVE names, or None.

    Raises:
        InputError: the variable holds an unknown mode.
    """
    mode = (os.environ if environ is None else environ).get(ENVIRONMENT, "").strip()
    if not mode:
        return None
    try:
        return layer_adaptive(mode, k, v)
    except InputError as error:
        raise InputError(f"{ENVIRONMENT}={mode}: {error}") from None


_WITH_PROTECTED = re.compile(r"(.+)\+\s*([0-9]{1,7})\s*,\s*([0-9]{1,7})")


def _instead(text: str) -> str:
    """What was probably meant by an unknown policy; empty where nothing is like it."""
    if match := _WITH_PROTECTED.fullmatch(text):
        name, sink, recent = match.groups()
        options = f"--sink {sink} --recent {recent}"
        if name in (*SETTINGS, *PRESETS):
            options = f"--policy {name} {options}"
        return f"protected tokens are options of their own ({options}); "
    k, slash, v = text.partition("/")
    v = v if slash else k
    with contextlib.suppress(InputError):
        if as_format(k) and as_format(v):
            return f"formats are options of their own (-ctk {k} -ctv {v}); "
    near = nearest_policy(text)
    return f"the nearest is {near}; " if near else ""


class UnknownPolicyError(InputError):
    """A name that no policy has."""


def nearest_policy(text: str) -> str | None:
    """The policy of a like name, with what follows its colon if that is right; None if none is."""
    name, colon, rest = text.strip().lower()[:60].partition(":")
    names = ("boundary", "last") if colon else (*SETTINGS, "uniform", *PRESETS)
    near = next(iter(difflib.get_close_matches(name, names, 1)), None)
    if near is None or not colon:
        return near
    found = f"{near}:{rest}"
    return found if _PARAMETRISED.fullmatch(found) else _FORMS[near][0]


def format_of(value: KVFormat | str) -> KVFormat:
    """Accept a format or its name, where a policy's name is a likely mistake.

    Raises:
        InputError: the name is none of a format; that of a policy is said to be one.
    """
    name = value.strip().lower() if isinstance(value, str) else ""
    if name in (*SETTINGS, *PRESETS):
        raise InputError(
            f"{value!r} is a policy, not a KV format: give --policy {name}, in Python "
            f'policy="{name}".'
        )
    try:
        return as_format(value)
    except InputError:
        near = nearest_policy(name)
        if near is None or nearest_format(name) is not None:
            raise
        raise InputError(
            f"Unknown KV format {value!r}: the nearest is {near}, a policy: give --policy {near}, "
            f'in Python policy="{near}".'
        ) from None


_PARAMETRISED = re.compile(
    r"(?:boundary:(?P<first>[0-9]{1,9}),(?P<last>[0-9]{1,9})|last:(?P<n>[0-9]{1,9}))(?::(?P<formats>[^/]+(?:/[^/]+)?))?"
)


# how a parametrised policy is written, what it takes, and an example
_FORMS = {
    "boundary": ("boundary:A,B", "two counts of layers", "boundary:2,2"),
    "last": ("last:N", "a count of layers", "last:8"),
}


def _check_form(text: str) -> None:
    """Raises: InputError for a parametrised policy with other parameters than it takes."""
    name, colon, _ = text.lower().partition(":")
    if colon and name in _FORMS:
        _, takes, example = _FORMS[name]
        raise InputError(
            f"Policy {text!r} is not accepted: {name} takes {takes}, such as {example}, optionally "
            f"with their formats, such as {example}:f16 (V) or {example}:q8_0/f16 (K/V)."
        )


_NAME = Kind("the name of a policy or the path of a JSON file", PATH.fits)


@checked(name=_NAME, k=FORMAT, v=FORMAT)
def load_policy(
    name: str | os.PathLike, k: KVFormat | str | None = None, v: KVFormat | str | None = None
) -> Policy:
    """A policy by name, or from a JSON file.

    Names: the settings (``balanced``), ``uniform``, the presets, ``mode-N``, ``boundary:A,B`` and
    ``last:N``; the last two give V q8_0 in the layers they name, or what follows a
    second colon: ``boundary:2,2:f16`` sets V, ``last:8:q8_0/turbo4`` sets K and V.

    Args:
        k: K's format where the policy leaves it open (default q8_0).
        v: V's format where the policy leaves it open (default turbo2).

    Raises:
        InputError: no such name, an unreadable file, ``k``/``v`` given beside a file or a
            setting, which leave none open, or a value of another kind.
    """
    k, v = (None if x is None else as_format(x) for x in (k, v))
    text = os.fspath(name).strip()
    lower = text.lower()
    if lower in SETTINGS:
        found = SETTINGS[lower]
        if k is not None or v is not None:
            raise InputError(
                f"Policy {lower!r} is K {found.k} and V {found.v}: other formats cannot be given "
                "beside it. Give K and V formats alone."
            )
        return found
    if lower == "uniform":
        return Uniform(k or DEFAULT_K, v or DEFAULT_V)
    if lower in PRESETS:
        return layer_adaptive(PRESETS[lower], k, v)
    if lower.startswith("mode-"):
        return layer_adaptive(lower.removeprefix("mode-"), k, v)
    if match := _PARAMETRISED.fullmatch(lower):
        return _parametrised(match, k or DEFAULT_K, v or DEFAULT_V)
    if not (text.endswith(".json") or os.path.exists(text)):
        _check_form(text)
        raise UnknownPolicyError(
            f"Unknown policy {text!r}: {_instead(lower)}accepted are {ACCEPTED}."
        )
    if k is not None or v is not None:
        raise InputError(
            f"Policy file {text!r} sets the formats of every layer: K or V formats cannot be "
            "given beside it."
        )
    return read_layer_list(text)


def parse_boundary(
    text: str, k: KVFormat | str | None = None, v: KVFormat | str | None = None
) -> Policy:
    """The policy of ``--boundary A,B[:V or :K/V]``.

    Raises:
        InputError: the text has another form.
    """
    match = _PARAMETRISED.fullmatch(f"boundary:{text.replace(' ', '').lower()}")
    if not match:
        raise InputError(
            f"Boundary {text!r} is not accepted: give two counts such as 2,2, optionally with the "
            "boundary's formats such as 2,2:f16 (V) or 2,2:q8_0/f16 (K/V)."
        )
    return _parametrised(match, k or DEFAULT_K, v or DEFAULT_V)


def _parametrised(match: re.Match, k: KVFormat | str, v: KVFormat | str) -> Policy:
    names = (match["formats"] or "q8_0").split("/")
    special_k = names[0] if len(names) == 2 else None
    if match["n"]:
        return LastN(k, v, int(match["n"]), special_k, names[-1])
    return Boundary(k, v, int(match["first"]), int(match["last"]), special_k, names[-1])
