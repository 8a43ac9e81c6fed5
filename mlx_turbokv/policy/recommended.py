"""The settings worth recommending, best first, and what to type for them.

`plan` shows them and takes the first that fits.
"""

from __future__ import annotations

from ..quant.formats import as_format
from .policies import Policy, Preset, Uniform
from .presets import load_policy
from .settings import SETTINGS, Setting

# What lies between the settings.
_PAIRS = (("turbo6", "turbo5"), ("turbo3", "turbo3"))


def recommended() -> list[Policy]:
    """Policies in order of their quality: f16, pairs with protected tokens, then without.

    The settings are among the former, the paper's policy is among the latter. F16 and q8_0 protect
    themselves.
    """
    settings = list(SETTINGS.values())
    named = {(str(x.k), str(x.v)) for x in settings}
    turbo = [*settings, *(Uniform(*pair) for pair in _PAIRS if pair not in named)]
    turbo.sort(key=lambda x: (as_format(x.k).bits + as_format(x.v).bits, as_format(x.k).bits))
    turbo.reverse()
    return [
        Uniform("f16", "f16"),
        Uniform("q8_0", "q8_0"),
        *turbo,
        *(pair.protecting(0, 0) for pair in settings[:2]),
        load_policy("la-v7"),
    ]


def label(policy: Policy) -> str:
    """A policy as a configuration names it, such as turbo4/turbo3 or turbo4/turbo3+0,0.

    Protected tokens are left out where a policy of this name has them by default.
    """
    name = f"{policy.k}/{policy.v}" if type(policy) is Uniform else policy.name
    own = policy.protection
    return name + (f"+{own}" if own != policy.default_protection else "")


def _preset(policy: Policy) -> Policy | None:
    """The preset of a policy's name, with its protected tokens."""
    if not isinstance(policy, Preset):
        return None
    return load_policy(policy.name).protecting(policy.protection.sink, policy.protection.recent)


def options(policy: Policy) -> str | None:
    """The options of the commands that select a policy; None for one that takes more than a name.

    Protected tokens are left out where they are the default, or change nothing.
    """
    if type(policy) is Uniform:
        words = [f"-ctk {policy.k} -ctv {policy.v}"]
    elif isinstance(policy, Setting) or policy == _preset(policy):
        words = [f"--policy {policy.name}"]
    else:
        return None
    own, default = policy.protection, policy.default_protection
    if not policy.has_turbo():
        own = default
    words += [f"--sink {own.sink}"] if own.sink != default.sink else []
    words += [f"--recent {own.recent}"] if own.recent != default.recent else []
    return " ".join(words)
