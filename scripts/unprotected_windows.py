"""Configurations with the paper's semantics, through quality_windows.py: policies by any name, no
protected tokens, keys not centred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from quality_windows import Measurement

from mlx_turbokv.policy import Policy
from mlx_turbokv.policy.protection import UNPROTECTED

NOT_CENTRED = "–"


class Choice(NamedTuple):
    """A policy, and whether it counts and packs layers with sliding windows too."""

    policy: Policy
    packs_windows: bool = False


class Unprotected(Measurement):
    """One model whose configurations are ``choices``, by name; other names are what they say.

    No configuration protects tokens or centres keys.
    """

    def __init__(
        self, loaded: Any, text: Any, backend: str | None, choices: Mapping[str, Choice]
    ) -> None:
        super().__init__(loaded, text, backend)
        self.choices = choices

    def prepared(self, name: str, keys: str | None) -> tuple[Any, str]:
        """A configuration, and what its keys are centred by, which is nothing.

        Raises: InputError where it does not fit the model.
        """
        from mlx_turbokv.evaluate.configuration import parse_policy, prepare

        policy, packs_windows = self.choices.get(name) or Choice(parse_policy(name))
        policy = policy.protecting(UNPROTECTED.sink, UNPROTECTED.recent)
        return prepare(
            self.loaded.model, policy, self.backend, name=name, centre=False,
            compress_sliding=packs_windows,
        ), NOT_CENTRED  # fmt: skip
