"""The configurations of an evaluation: a name for each way of storing K and V.

Names: `K/V` (one pair in every layer), a setting, a policy's name or file, `K/V@POLICY` and
`POLICY:K` (the formats that a policy leaves open), and other projects' caches: `mlx-kvN[:GROUP]`,
mlx-lm's affine `kv_bits`, and `llama-q4_0` and `llama-q5_1`, llama.cpp's rotated cache (simulated,
llama_cpp.py).
`NAME+SINK,RECENT` protects so many tokens; without it they are those of the options of these
names: 32 and 128, and none with the paper's presets.
"""

from __future__ import annotations

import contextlib
import re

from ..errors import InputError
from ..policy import Pair, Policy, Uniform, load_policy
from ..policy.presets import UnknownPolicyError, nearest_policy
from ..quant.formats import as_format, nearest_format
from . import llama_cpp

REFERENCE = "f16/f16"
DEFAULT_CONFIGS = (
    REFERENCE, "q8_0/q8_0", "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "la-v5", "la-v6", "la-v7",
    "mode-10", "turbo4/turbo4", "turbo3/turbo3",
)  # fmt: skip
POLICIES = "K/V such as q8_0/turbo3, a setting or a policy, K/V@POLICY, POLICY:K, NAME+SINK,RECENT"
ACCEPTED = f"{POLICIES}, mlx-kvN:GROUP, llama-q4_0 or llama-q5_1"
MLX_LM_NAME = re.compile(r"mlx-kv([2348])(?::(32|64|128))?")
LLAMA_CPP_NAME = re.compile(f"llama-({'|'.join(llama_cpp.FORMATS)})")
_PROTECTED = re.compile(r"(.+)\+\s*([0-9]{1,7})\s*,\s*([0-9]{1,7})\s*")


def parse_policy(name: str) -> Policy:
    """The policy that a configuration names.

    Raises:
        InputError: an unknown format or policy, or another project's cache, which has none.
    """
    text = name.strip()
    found = _PROTECTED.fullmatch(text)
    if is_peer(found[1] if found else text):
        raise InputError(
            f"Configuration {name!r} is another project's cache, which has no formats by layer and "
            f"no protected tokens: accepted here are {POLICIES}."
        )
    if found:
        return parse_policy(found[1]).protecting(int(found[2]), int(found[3]))
    parametrised = re.match(r"(?i)(boundary|last):", text)
    # A file's name may hold anything, so files come before the forms with signs in them.
    if text.lower().endswith(".json"):
        return load_policy(text)
    pair, at, policy = text.partition("@")
    if at:
        return load_policy(policy, *_pair(pair, name))
    if "/" in text and not parametrised:
        return Uniform(*_pair(text, name))
    # boundary:2,2:f16 has colons of its own, and takes K by K/V@boundary:...
    if text.lower().startswith("mlx-kv"):
        raise InputError(
            f"Unknown configuration {name!r}: mlx-lm's quantised cache is mlx-kvN or "
            "mlx-kvN:GROUP, accepted are N 2, 3, 4 and 8, and GROUP 32, 64 and 128."
        )
    if text.lower().startswith("llama-"):
        raise InputError(
            f"Unknown configuration {name!r}: of llama.cpp's caches "
            f"{' and '.join(f'llama-{x}' for x in llama_cpp.FORMATS)} are simulated."
        )
    if ":" in text and not parametrised:
        policy, _, k = text.partition(":")
        _known_policy(policy, name)
        return load_policy(policy, as_format(k))
    return _known_policy(text, name)


def _known_policy(text: str, name: str) -> Policy:
    try:
        return load_policy(text)
    except UnknownPolicyError:
        near = _nearest(name.strip())
        hint = f"the nearest is {near}; " if near else ""
        raise InputError(
            f"Unknown configuration {name!r}: {hint}accepted are {ACCEPTED}."
        ) from None


def _nearest(text: str) -> str | None:
    """What was probably meant by an unknown configuration without a slash."""
    if near := nearest_policy(text):
        return near
    first, colon, rest = text.partition(":")
    if colon and (near := nearest_policy(first)):
        return f"{near}:{rest}"
    for k, v in ((text, text), (first, rest)):
        with contextlib.suppress(InputError):
            return f"{as_format(k)}/{as_format(v)}"
    near = nearest_format(text.lower())
    return f"{near}/{near}" if near else None


def _pair(text: str, name: str) -> Pair:
    parts = text.split("/")
    if len(parts) != 2:
        raise InputError(f"Unknown configuration {name!r}: accepted are {ACCEPTED}.")
    return as_format(parts[0]), as_format(parts[1])


def is_peer(name: str) -> bool:
    """Whether a configuration is the quantised cache of mlx-lm or of llama.cpp."""
    text = name.strip().lower()
    return any(names.fullmatch(text) for names in (MLX_LM_NAME, LLAMA_CPP_NAME))


def check_name(name: str) -> None:
    """Check a configuration's name before any model is loaded.

    Raises:
        InputError: as `parse_policy`.
    """
    if not is_peer(name):
        parse_policy(name)


def protected_name(name: str, sink: int | None, recent: int | None) -> str:
    """A configuration with these protected tokens; one that names its own keeps them."""
    if (sink is None and recent is None) or is_peer(name) or _PROTECTED.fullmatch(name.strip()):
        return name
    policy = parse_policy(name)
    wanted = policy.protecting(sink, recent).protection
    return name if wanted == policy.protection else f"{name}+{wanted}"
