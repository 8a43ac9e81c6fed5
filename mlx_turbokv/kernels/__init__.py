"""The Metal kernels: their source, launchers and parameters, and a reference in MLX operations."""
