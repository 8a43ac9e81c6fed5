"""The shape of what a KV layer stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVShape:
    """What one KV layer stores for a token."""

    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def n_values(self) -> int:
        """Values of K and V a token."""
        return self.n_kv_heads * (self.k_head_dim + self.v_head_dim)
