"""The KV layers of any mlx-lm model, and their shapes."""
