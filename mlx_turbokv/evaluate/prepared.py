"""A configuration made ready for one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..centring.centre import Centre
from ..policy import Protection
from ..policy.protection import UNPROTECTED
from .mlx_lm_quantized import MLX_LM


@dataclass(frozen=True)
class Prepared:
    """A configuration made ready for one model.

    name: what the table calls it.
    make_caches: makes empty caches.
    layers: names of K's and V's format in each KV layer.
    k_bits, v_bits, bits: bits per value of K, of V and of both; None if the model's shapes
        cannot be learnt.
    layer_bits: the same of K and V in each KV layer.
    backend: what packs and reads the rows: a back-end's name, or "mlx-lm" (and whether its rows
        are dequantised for attention).
    centred: what the keys are centred by, in words.
    protection: the protected tokens; the bits above are those of the others.
    protected_bits: bits per value of K, of V and of both in protected tokens.
    centres: what keys are centred by, in the layers where they are.
    n_values: values of K and of V in a token, over all KV layers.
    warnings: sentences on what will harm the model.
    """

    name: str
    make_caches: Callable[[], list[Any]]
    layers: list[tuple[str, str]] = field(default_factory=list)
    k_bits: float | None = None
    v_bits: float | None = None
    bits: float | None = None
    layer_bits: list[tuple[float, float]] | None = None
    backend: str = MLX_LM
    centred: str = "keys not centred"
    protection: Protection = UNPROTECTED
    protected_bits: tuple[float, float, float] | None = None
    centres: tuple[Centre, ...] = ()
    n_values: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()

    def bits_at(self, n: int) -> tuple[float | None, float | None, float | None]:
        """Bits per value of K, of V and of both after a prompt of ``n`` tokens.

        Protected tokens and the anchors of centred keys are counted.
        """
        if self.k_bits is None or self.v_bits is None or self.bits is None:
            return None, None, None
        k, v, both = self.k_bits, self.v_bits, self.bits
        if self.protected_bits is not None:
            share = min(n, self.protection.rows_after(n)[1]) / n
            bits = zip((k, v, both), self.protected_bits)
            k, v, both = (x + share * (y - x) for x, y in bits)
        if self.centres:
            anchors = 8 * sum(centre.nbytes(n) for centre in self.centres) / n
            k += anchors / self.n_values[0]
            both += anchors / sum(self.n_values)
        return k, v, both
