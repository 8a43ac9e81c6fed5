"""A packed, layer-aware KV cache for mlx-lm models."""

__version__ = "0.1.0"
