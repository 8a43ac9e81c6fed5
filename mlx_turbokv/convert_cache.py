"""``python -m mlx_turbokv.convert_cache``."""

if __name__ == "__main__":
    from .cli import run_as_module

    run_as_module("convert_cache")
