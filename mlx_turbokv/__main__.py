"""``python -m mlx_turbokv COMMAND``."""

import sys

from .cli import main

sys.argv[0] = "mlx_turbokv"  # what records and messages call it
main()
