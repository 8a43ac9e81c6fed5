"""What callers give to the functions that make caches, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..centring import AUTO
from ..centring.first_use import FirstUse
from ..centring.references import References
from ..checked import BOOLEAN, INTEGER, Kind, checked, is_path
from ..errors import InputError
from ..kernels.backend import select_backend
from ..model.kinds import check_model
from ..model.kv_layers import KVLayer
from ..policy import Pair, Policy, load_policy
from ..policy.presets import format_of
from ..policy.protection import PROTECTED
from ..policy.settings import default_policy
from ..quant.formats import FORMAT, KVFormat

KEPT_TOKENS = 4  # first tokens that stay when max_kv_size is reached; mlx-lm keeps as many


def _model(_name: str, value: Any) -> None:
    check_model(value)


def _is_tokenizer(value: Any) -> bool:
    is_text = isinstance(value, (str, bytes, type))
    return not is_text and callable(getattr(value, "encode", None))


def _backend(_name: str, value: Any) -> None:
    select_backend(value)


checked_model = checked(model=_model)
# the arguments of attach and make_prompt_cache
checked_options = checked(
    model=_model,
    k=FORMAT,
    v=FORMAT,
    policy=Kind(
        "a policy object, its name or the path of a JSON file",
        lambda value: isinstance(value, Policy) or is_path(value),
    ),
    backend=_backend,
    centre=Kind(
        f"{AUTO!r}, True, False or a file of mean keys",
        lambda value: isinstance(value, (bool, References, FirstUse)) or is_path(value),
    ),
    tokenizer=Kind("the model's tokenizer", _is_tokenizer),
    compress_sliding=BOOLEAN,
    max_kv_size=Kind("a whole number of tokens", INTEGER.fits),
    handles=BOOLEAN,
    sink=PROTECTED,
    recent=PROTECTED,
)


def check_protection(
    policy: Policy, formats: Sequence[Pair], sink: int | None, recent: int | None
) -> None:
    """Check protected tokens that were asked for.

    Args:
        formats: of the KV layers, as the policy gives them.

    Raises:
        InputError: no format is turbo.
    """
    # a caller's own policy shows its formats by those of the layers alone
    if policy.has_turbo() or any(fmt.is_turbo for pair in formats for fmt in pair):
        return
    _refuse_protected(
        sink, recent, "where no K or V format is turbo: q8_0 and f16 are at least as exact"
    )


def check_max_kv_size(max_kv_size: int, centre: Any, layers: Sequence[KVLayer]) -> None:
    """Check a limit of tokens against what else was asked for, and the model's layers.

    Raises:
        InputError: it is too small, or does not go with them.
    """
    if max_kv_size <= KEPT_TOKENS:
        raise InputError(
            f"max_kv_size {max_kv_size} is not accepted: it must be {KEPT_TOKENS + 1} or more, "
            f"as the first {KEPT_TOKENS} tokens are kept."
        )
    if not isinstance(centre, (bool, FirstUse)):
        raise InputError(
            f"Key references cannot be used with max_kv_size {max_kv_size}: the keys of a "
            "window stay whole."
        )
    if any(layer.is_read for layer in layers):
        raise InputError(
            f"max_kv_size {max_kv_size} cannot be used with a diffusion model, which reads all "
            "rows of its caches."
        )
    if any(layer.is_indexed for layer in layers):
        raise InputError(
            f"max_kv_size {max_kv_size} cannot be used with a model whose indexer chooses among "
            "all tokens."
        )


def check_window(max_kv_size: int | None, sink: int | None, recent: int | None) -> None:
    """Raises: InputError where tokens of a window are to be protected."""
    if max_kv_size is not None:
        why = f"with max_kv_size {max_kv_size}: a window protects no tokens"
        _refuse_protected(sink, recent, why)


def _refuse_protected(sink: int | None, recent: int | None, why: str) -> None:
    """Raises: InputError where tokens are to be protected; ``why`` ends its sentence."""
    for name, n in (("sink", sink), ("recent", recent)):
        if n:
            raise InputError(f"{name} {n} has no effect {why}.")


def as_policy(
    k: KVFormat | str | None,
    v: KVFormat | str | None,
    policy: Policy | str | os.PathLike | None,
) -> Policy:
    """The policy that these arguments mean.

    Raises:
        InputError: they mean none, or ``k`` or ``v`` has no effect.
    """
    k, v = (None if x is None else format_of(x) for x in (k, v))
    if policy is None:
        return default_policy(k, v)
    if not isinstance(policy, Policy):
        return load_policy(policy, k, v)
    for name, fmt in (("k", k), ("v", v)):
        if fmt is not None:
            raise InputError(f"{name} {fmt} has no effect beside a policy, which sets the formats.")
    return policy
