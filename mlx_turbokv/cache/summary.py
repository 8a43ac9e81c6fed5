"""What a list of caches holds, counted over its KV layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..centring.choose import describe
from ..kernels.trust import refused
from ..model.kinds import is_a, is_just
from .rotating import TurboRotatingKVCache
from .single import TurboKVCache

F16_BYTES = 2
PACKED = (TurboKVCache, TurboRotatingKVCache)


@dataclass(frozen=True)
class KVSummary:
    """Totals over the KV layers (the packed ones and mlx-lm's own ``KVCache``).

    tokens: tokens processed.
    kept: the most rows of one sequence that a layer holds; where all have a window, fewer.
    row_bytes: of the rows that are held and what is subtracted from them, without spare rows.
    f16_bytes: of the same rows in 16 bits.
    resident_bytes: everything held, spare rows included.
    bits_per_value: ``row_bytes`` in bits, for each value of the tokens' K and V.
    pairs: number of layers by ``K/V`` formats.
    protected: the most tokens of one sequence that a layer reads in the protected formats.
    backend: of the packed layers, or None without any.
    centred: number of layers whose keys are centred, by what they are centred by.
    """

    tokens: int
    row_bytes: int
    f16_bytes: int
    resident_bytes: int
    bits_per_value: float
    pairs: dict[str, int]
    backend: str | None
    protected: int = 0
    centred: dict[str, int] = field(default_factory=dict)
    kept: int = 0

    def line(self, policy: str) -> str:
        """The closing line of ``generate``."""
        pairs = ", ".join(f"{n} x {pair}" for pair, n in self.pairs.items())
        protected = f"{self.protected:,} tokens protected, " if "turbo" in pairs else ""
        turbo_keys = any(pair.startswith("turbo") for pair in self.pairs)
        centred = f"{describe(self.centred)}, " if turbo_keys else ""
        backend = f"{self.backend} back-end" if self.backend else "mlx-lm's own cache"
        return (
            f"KV cache: {self.size()} ({mib(self.f16_bytes)}), {mib(self.resident_bytes)} "
            f"resident, {self.bits_per_value:.2f} bits per value, {policy} ({pairs} layers), "
            f"{protected}{centred}{backend}"
        )

    def size(self) -> str:
        """Tokens, and the size of the rows held beside that of the same rows in f16."""
        percent = 100 * self.row_bytes / self.f16_bytes if self.f16_bytes else 100.0
        kept = f", {self.kept:,} of them kept" if self.kept < self.tokens else ""
        return f"{self.tokens:,} tokens{kept}, {mib(self.row_bytes)}, {percent:.1f}% of f16"


def mib(n_bytes: int) -> str:
    """A number of bytes in MiB, with three digits or more."""
    size = n_bytes / (1 << 20)
    digits = 1 if size >= 100 else 2 if size >= 1 else 4
    return f"{size:,.{digits}f} MiB"


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches with every CacheList opened."""
    for cache in caches:
        if is_a(cache, "CacheList"):
            yield from leaves(cache.caches)
        else:
            yield cache


def summarize(caches: list[Any]) -> KVSummary:
    """Count what caches hold."""
    layers = [c for c in leaves(caches) if isinstance(c, PACKED) or is_just(c, "KVCache")]
    pairs: Counter[str] = Counter()
    n_values = n_bits = 0.0
    protected = 0
    for cache in layers:
        packed = isinstance(cache, PACKED)
        if packed and not cache.empty():
            protected = max(protected, cache.n_protected // cache.keys.shape[0])
        pairs[f"{cache.k_format}/{cache.v_format}" if packed else "f16/f16"] += 1
        for values, bits in _rows(cache, packed):
            n_values += values
            n_bits += values * bits
    backends = [c.backend.name for c in layers if isinstance(c, PACKED)]
    centres = [c.centre for c in layers if isinstance(c, TurboKVCache)]
    row_bytes = round(n_bits / 8) + sum(map(_centre_bytes, layers))
    return KVSummary(
        tokens=max((int(c.offset) for c in layers), default=0),
        row_bytes=row_bytes,
        f16_bytes=int(n_values) * F16_BYTES,
        resident_bytes=sum(c.nbytes for c in layers),
        bits_per_value=8 * row_bytes / n_values if n_values else 0.0,
        pairs=dict(pairs),
        backend=_backend(backends[0]) if backends else None,
        protected=protected,
        centred=dict(Counter(centre.source for centre in centres if centre is not None)),
        kept=max((int(c.size()) for c in layers if not c.empty()), default=0),
    )


def _backend(name: str) -> str:
    """A back-end's name, and how many kernels the reference has taken over from."""
    if n := len(refused()):
        return f"{name}, but for {n} kernel{'s' * (n > 1)} that failed their check, reference"
    return name


def _centre_bytes(cache: Any) -> int:
    """Bytes of what is subtracted from a cache's keys."""
    centre = getattr(cache, "centre", None)
    return 0 if centre is None or cache.empty() else centre.nbytes(cache.n_rows)


def _rows(cache: Any, packed: bool) -> list[tuple[int, float]]:
    """(values, bits per value) of K and of V."""
    if cache.empty():
        return []
    batch, heads = cache.keys.shape[:2]
    n_rows = batch * heads * int(cache.size())
    if packed:
        layout, n_protected = cache.layout, heads * cache.n_protected
        sides = ((cache.k_format, layout.k_head_dim), (cache.v_format, layout.v_head_dim))
        rows = [((n_rows - n_protected) * dim, fmt.bits_per_value(dim)) for fmt, dim in sides]
        return rows + [(n_protected * dim, fmt.protected.bits_per_value(dim)) for fmt, dim in sides]
    return [(n_rows * a.shape[-1], 8.0 * a.itemsize) for a in (cache.keys, cache.values)]
