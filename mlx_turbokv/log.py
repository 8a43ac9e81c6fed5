"""The package's logger: warnings given once, and failures that are recovered from."""

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
    """Log a failure that is recovered from, once; its traceback at level DEBUG."""
    text = f"{what} ({type(error).__name__}: {error})."
    if ("failure", text) not in _given:
        _given.add(("failure", text))
        logger.info(text)
        logger.debug("", exc_info=error)
