"""Models: from mlx-lm, GGUF files, the package index, or a shape alone."""
