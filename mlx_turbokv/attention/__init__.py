"""Attention over packed rows, and its place in MLX."""
