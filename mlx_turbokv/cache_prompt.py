"""``python -m mlx_turbokv.cache_prompt``."""

if __name__ == "__main__":
    from .cli import run_as_module

    run_as_module("cache_prompt")
