"""``python -m mlx_turbokv.doctor``."""

from ..cli import run_as_module

run_as_module("doctor")
