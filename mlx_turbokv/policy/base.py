"""What all policies share: ``Policy``, the base of those in policies.py and of callers' own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..checked import Kind, of
from ..errors import InputError
from ..quant.formats import FORMAT, KVFormat, as_format
from .protection import DEFAULT_PROTECTION, Protection

PolicyType = TypeVar("PolicyType", bound="Policy")
Pair = tuple[KVFormat, KVFormat]
PAIR = Kind(
    "the formats of K and V, such as ('q8_0', 'turbo3')",
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2,
)
PROTECTION = of("a Protection", Protection)


@dataclass(frozen=True)
class Policy:
    """Base of all policies: a subclass overrides ``pair``, and ``check`` where n can be wrong.

    Args:
        protection: tokens that are stored in 8.5 bits in every layer.

    Raises:
        InputError: a field has a value of another kind.
    """

    protection: Protection = field(default=DEFAULT_PROTECTION, kw_only=True)

    def __post_init__(self) -> None:
        PROTECTION("protection", self.protection)

    @property
    def name(self) -> str:
        """Short name for tables."""
        return type(self).__name__.lower()

    def pair(self, ordinal: int, n_layers: int) -> Pair | tuple[KVFormat | str, KVFormat | str]:
        """Formats of K and V, or their names, in KV layer ``ordinal`` of ``n_layers``."""
        raise InputError(
            f"Policy {self.name!r} has no pair(ordinal, n_layers): give it one that returns the "
            "formats of K and V in a KV layer, such as ('q8_0', 'turbo3')."
        )

    def check(self, n_layers: int) -> None:
        """Raises: InputError where the policy does not fit a model of ``n_layers`` KV layers."""

    def notes(self, n_layers: int) -> list[str]:
        """Sentences worth telling about this policy on ``n_layers`` KV layers."""
        return []

    @property
    def default_protection(self) -> Protection:
        """What a policy of this kind protects where nothing else is asked for."""
        return type(self).protection

    def protecting(
        self: PolicyType, sink: int | None = None, recent: int | None = None
    ) -> PolicyType:
        """The same policy with other numbers of protected tokens; None keeps its own.

        Raises:
            InputError: a number is not accepted.
        """
        own = self.protection
        PROTECTION("protection", own)  # that of a class without its constructor
        other = Protection(
            own.sink if sink is None else sink, own.recent if recent is None else recent
        )
        if other == own:
            return self
        policy = copy.copy(self)  # a subclass may have a constructor of its own
        object.__setattr__(policy, "protection", other)
        return policy

    def k_formats(self) -> set[KVFormat]:
        """Every format that a layer's keys may get."""
        return self._formats_of("k")

    def v_formats(self) -> set[KVFormat]:
        """Every format that a layer's values may get."""
        return self._formats_of("v")

    def has_turbo(self) -> bool:
        """Whether a layer may get a turbo format; others need no protected tokens."""
        return any(f.is_turbo for f in self.k_formats() | self.v_formats())

    def _formats_of(self, side: str) -> set[KVFormat]:
        names = [x.name for x in fields(self) if x.name == side or x.name.endswith(f"_{side}")]
        return {as_format(f) for f in (getattr(self, name) for name in names) if f is not None}

    def formats(self, n_layers: int) -> list[Pair]:
        """The pair of formats of every KV layer, in order.

        Raises:
            InputError: the policy does not fit a model of ``n_layers`` KV layers, or gives a layer
                what is no pair of formats.
        """
        self.check(n_layers)
        return [self._formats_of_layer(ordinal, n_layers) for ordinal in range(n_layers)]

    def _formats_of_layer(self, ordinal: int, n_layers: int) -> Pair:
        found = self.pair(ordinal, n_layers)
        try:
            return as_pair(found)
        except InputError as error:
            raise InputError(f"Policy {self.name!r}, KV layer {ordinal}: {error}") from None


def as_pair(value: Any) -> Pair:
    """A pair of formats, of formats or their names.

    Raises:
        InputError: it is none.
    """
    PAIR("pair", value)
    k, v = value
    FORMAT("k", k)
    FORMAT("v", v)
    return as_format(k), as_format(v)
