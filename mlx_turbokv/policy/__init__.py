"""Which KV layer gets which formats."""

from .policies import Boundary, LastN, LayerList, Pair, Policy, Preset, Uniform, bits_per_value
from .presets import from_environment, layer_adaptive, load_policy, parse_boundary
from .protection import Protection

__all__ = [
    "Boundary",
    "LastN",
    "LayerList",
    "Pair",
    "Policy",
    "Preset",
    "Protection",
    "Uniform",
    "bits_per_value",
    "from_environment",
    "layer_adaptive",
    "load_policy",
    "parse_boundary",
]
