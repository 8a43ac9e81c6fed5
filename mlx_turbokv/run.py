"""``python -m mlx_turbokv.run``."""

if __name__ == "__main__":
    from .cli import run_as_module

    run_as_module("run")
