"""Whether caches protect tokens, as they do by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlx_turbokv.cache import TurboKVCache
from mlx_turbokv.cache.batch import BatchTurboKVCache
from mlx_turbokv.cache.summary import leaves
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION, Protection


def assert_protects(caches: Iterable[Any], protection: Protection = DEFAULT_PROTECTION) -> None:
    """Every growing cache in which a format takes fewer than 8.5 bits protects its tokens."""
    packed = [c for c in leaves(caches) if isinstance(c, (TurboKVCache, BatchTurboKVCache))]
    turbo = [c for c in packed if c.k_format.is_turbo or c.v_format.is_turbo]
    assert turbo and all(c.protection == protection for c in turbo)
