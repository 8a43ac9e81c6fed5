"""The package's logger: warnings given once, and failures that have another way out."""

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


def log_failure(what: str, error: BaseException) -> None:
    """Log why something did not work for which there is another way."""
    logger.info("%s (%s: %s).", what, type(error).__name__, error, exc_info=error)
