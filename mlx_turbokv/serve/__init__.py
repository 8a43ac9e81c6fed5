"""mlx_lm.server with packed caches."""
