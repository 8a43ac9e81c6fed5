"""Runs Metal kernels on the CPU and checks their types; see README.md."""

from .errors import HostError, ToolMissingError
from .executor import HostMetal, Recorder
from .generated import Launch, capture, metal_text

__all__ = [
    "HostError",
    "HostMetal",
    "Launch",
    "Recorder",
    "ToolMissingError",
    "capture",
    "metal_text",
]
