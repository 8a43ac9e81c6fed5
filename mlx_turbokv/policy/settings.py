"""Settings by name: a pair of formats for K and V in every layer, with protected tokens.

`plan`, the commands and Python share this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quant.formats import KVFormat
from .policies import Uniform


@dataclass(frozen=True)
class Setting(Uniform):
    """A pair of formats that has a name.

    Args:
        label: the name.
    """

    label: str = ""

    @property
    def name(self) -> str:
        return self.label


# The cheapest pairs measured whose KLD at 2,048 tokens is at most .001, .01 and .05, with its 95 %
# interval, on each of three trained models (docs/results/quality.md).
PAIRS = {
    "near-lossless": ("turbo5", "turbo4"),
    "balanced": ("turbo4", "turbo3"),
    "compact": ("turbo3", "turbo2"),
}
SETTINGS = {name: Setting(*pair, label=name) for name, pair in PAIRS.items()}
DEFAULT = "balanced"


def default_policy(k: KVFormat | str | None = None, v: KVFormat | str | None = None) -> Uniform:
    """What is used where no policy is named: the default setting, or these formats in every layer.

    A format that is not given is the default setting's.
    """
    found = SETTINGS[DEFAULT]
    return found if k is None and v is None else Uniform(k or found.k, v or found.v)
