"""The package's logger, and warnings that are given once."""

from __future__ import annotations

import logging
from collections.abc import Hashable

logger = logging.getLogger("mlx_turbokv")
_given: set[tuple[Hashable, str]] = set()


def warn_once(text: str, scope: Hashable = None) -> None:
    """Log a warning the first time that ``text`` is given for ``scope``."""
    if (scope, text) not in _given:
        _given.add((scope, text))
        logger.warning(text)
