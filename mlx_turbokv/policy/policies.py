"""Which KV layer gets which formats.

A policy maps n KV layers to n pairs (K format, V format). It counts ordinals among the layers
whose cache grows and is compressed, never raw layer indices, so a hybrid's first two *KV* layers
are its boundary wherever they stand in the network. Under pipeline parallelism the formats are
computed over the whole model, and each rank takes its slice. Layers with a sliding window have no
ordinal, unless they are packed as well (``compress_sliding``): then they are counted with the
others, in the model's order.

To add a policy: a frozen dataclass with one method, ``pair``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from ..checked import INTEGER, PATH, STRING, Kind, of
from ..errors import InputError
from ..quant.formats import FORMAT, KVFormat, as_format
from .base import Pair, Policy, as_pair
from .protection import UNPROTECTED, Protection

POLICY = of("a policy object", Policy)
PAIRS = Kind(
    "a list of the formats of K and V in each KV layer, such as [('q8_0', 'turbo3')]",
    lambda x: isinstance(x, Iterable) and not isinstance(x, (str, bytes, Mapping, Set)),
)
DEFAULT_K = "q8_0"
DEFAULT_V = "turbo2"


@dataclass(frozen=True)
class Uniform(Policy):
    """The same formats in every layer."""

    k: KVFormat | str = DEFAULT_K
    v: KVFormat | str = DEFAULT_V

    def __post_init__(self) -> None:
        super().__post_init__()
        _parse(self, "k", "v")

    def pair(self, ordinal: int, n_layers: int) -> Pair:
        return as_format(self.k), as_format(self.v)


@dataclass(frozen=True)
class Boundary(Policy):
    """Other formats for the first and the last layers.

    Args:
        k, v: formats of the layers between.
        first, last: how many layers at either end are boundary.
        boundary_k, boundary_v: formats of those; None keeps ``k`` or ``v``.

    Raises:
        InputError: a count is negative, or a value of another kind.
    """

    k: KVFormat | str
    v: KVFormat | str
    first: int
    last: int
    boundary_k: KVFormat | str | None = None
    boundary_v: KVFormat | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _parse(self, "k", "v")
        _parse(self, "boundary_k", "boundary_v", optional=True)
        INTEGER("first", self.first)
        INTEGER("last", self.last)
        if self.first < 0 or self.last < 0:
            raise InputError(
                f"Boundary {self.first},{self.last} is not accepted: both counts must be 0 or more."
            )

    @property
    def name(self) -> str:
        return f"boundary {self.first},{self.last}"

    def check(self, n_layers: int) -> None:
        if self.first + self.last > n_layers:
            raise InputError(
                f"Boundary {self.first},{self.last} is larger than the model: it has {n_layers} "
                "KV layers."
            )

    def pair(self, ordinal: int, n_layers: int) -> Pair:
        if self.first <= ordinal < n_layers - self.last:
            return as_format(self.k), as_format(self.v)
        return as_format(self.boundary_k or self.k), as_format(self.boundary_v or self.v)


@dataclass(frozen=True)
class LastN(Policy):
    """Other formats for the last n layers.

    Args:
        k, v: formats of the layers before.
        n: how many layers at the end get ``last_k`` and ``last_v`` (None keeps ``k`` or ``v``).

    Raises:
        InputError: n is negative, or a value of another kind.
    """

    k: KVFormat | str
    v: KVFormat | str
    n: int
    last_k: KVFormat | str | None = None
    last_v: KVFormat | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _parse(self, "k", "v")
        _parse(self, "last_k", "last_v", optional=True)
        INTEGER("n", self.n)
        if self.n < 0:
            raise InputError(f"Last {self.n} is not accepted: the count must be 0 or more.")

    @property
    def name(self) -> str:
        return f"last {self.n}"

    def check(self, n_layers: int) -> None:
        if self.n > n_layers:
            raise InputError(
                f"Last {self.n} is larger than the model: it has {n_layers} KV layers."
            )

    def pair(self, ordinal: int, n_layers: int) -> Pair:
        if ordinal < n_layers - self.n:
            return as_format(self.k), as_format(self.v)
        return as_format(self.last_k or self.k), as_format(self.last_v or self.v)


@dataclass(frozen=True)
class LayerList(Policy):
    """One pair a layer, as a policy file lists them (``files.py``).

    Args:
        pairs: (K format, V format) of each KV layer, in order.
        label: what to call the list, such as its file's name.
        path: its file; references of keys may lie beside it.
    """

    pairs: tuple[Pair, ...]
    label: str = "list"
    path: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        STRING("label", self.label)
        PATH.or_none()("path", self.path)
        PAIRS("pairs", self.pairs)
        pairs = []
        for ordinal, pair in enumerate(self.pairs):
            try:
                pairs.append(as_pair(pair))
            except InputError as error:
                raise InputError(f"pairs, KV layer {ordinal}: {error}") from None
        object.__setattr__(self, "pairs", tuple(pairs))

    @property
    def name(self) -> str:
        return self.label

    def check(self, n_layers: int) -> None:
        if len(self.pairs) != n_layers:
            raise InputError(
                f"Policy {self.label!r} lists {len(self.pairs)} KV layers, but the model has "
                f"{n_layers}."
            )

    def k_formats(self) -> set[KVFormat]:
        return {as_format(k) for k, _ in self.pairs}

    def v_formats(self) -> set[KVFormat]:
        return {as_format(v) for _, v in self.pairs}

    def pair(self, ordinal: int, n_layers: int) -> Pair:
        return self.pairs[ordinal]


@dataclass(frozen=True)
class Preset(Policy):
    """A policy of the paper, by name: where layers are few, all of them are boundary.

    No tokens are protected unless they are asked for, as in the paper.
    """

    label: str
    inner: Policy
    protected: int = field(default=0)
    protection: Protection = field(default=UNPROTECTED, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        STRING("label", self.label)
        POLICY("inner", self.inner)
        INTEGER("protected", self.protected)

    @property
    def name(self) -> str:
        return self.label

    def notes(self, n_layers: int) -> list[str]:
        if not 0 < n_layers < self.protected:
            return []
        return [
            f"Policy {self.label} protects {self.protected} KV layers, and this model has "
            f"{n_layers}: every layer is a boundary layer."
        ]

    def k_formats(self) -> set[KVFormat]:
        return self.inner.k_formats()

    def v_formats(self) -> set[KVFormat]:
        return self.inner.v_formats()

    def pair(self, ordinal: int, n_layers: int) -> Pair:
        return as_pair(self.inner.pair(ordinal, n_layers))


def _parse(policy: Policy, *names: str, optional: bool = False) -> None:
    """Let a frozen policy's formats be given by name."""
    for name in names:
        if (value := getattr(policy, name)) is not None or not optional:
            FORMAT(name, value)
            object.__setattr__(policy, name, as_format(value))  # type: ignore[arg-type]


def bits_per_value(
    formats: list[Pair], k_head_dims: list[int], v_head_dims: list[int], heads: list[int]
) -> tuple[float, float, float]:
    """Bits per value of K, of V, and of both together, weighted by each layer's values.

    Shapes:
        every list: one entry a KV layer.
    """
    k_bits = k_values = v_bits = v_values = 0.0
    for (k, v), k_dim, v_dim, n_heads in zip(formats, k_head_dims, v_head_dims, heads):
        k_values += n_heads * k_dim
        v_values += n_heads * v_dim
        k_bits += n_heads * k_dim * k.bits_per_value(k_dim)
        v_bits += n_heads * v_dim * v.bits_per_value(v_dim)
    if not k_values:
        return 0.0, 0.0, 0.0
    return k_bits / k_values, v_bits / v_values, (k_bits + v_bits) / (k_values + v_values)
