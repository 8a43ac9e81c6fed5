"""The `calibrate` command: a policy made for one model, with the evidence for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .entry import run
from .options import backend_option, dtype_option, load_dtype, model_options
from .output import Progress, note, rendered, write_json

DEFAULT_CTX = 512
NO_TEXT = "none"
RECORD = "calibration.json"


@click.command("calibrate")
@model_options
@dtype_option
@click.option(
    "--text", "-f", default="sample", show_default=True, metavar="FILE|sample",
    help="The text to calibrate on.",
)  # fmt: skip
@click.option(
    "--held-out", metavar="FILE|wikitext-2|none",
    help="Another text, to check the policies on.  [default: wikitext-2]",
)  # fmt: skip
@click.option("-c", "--ctx-size", default=DEFAULT_CTX, show_default=True, help="Tokens a window.")
@click.option(
    "--chunks", type=int, default=4, show_default=True,
    help="Windows to calibrate on; their scored halves do not overlap.",
)  # fmt: skip
@click.option(
    "--held-out-chunks", type=int, default=16, show_default=True, help="Windows to check on."
)
@click.option(
    "--budget", "budgets", multiple=True, metavar="BITS|CONFIG",
    help="Bits per value that K and V together may take, or a configuration whose bits are meant; "
    "repeatable.  [default: la-v7, 4.5 and 3.6]",
)  # fmt: skip
@click.option(
    "--formats", default=None, metavar="NAME,…",
    help="Formats open to K and V of every layer.  [default: q8_0 and turbo6 to turbo2]",
)  # fmt: skip
@click.option(
    "--base", default="f16/f16", show_default=True, metavar="CONFIG",
    help="What the other layers hold while one is measured.",
)  # fmt: skip
@click.option(
    "--refine", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Measure again around each policy, one step up and down, and take what is better; at "
    "most N times.",
)  # fmt: skip
@click.option(
    "--compare", multiple=True, default=("la-v7",), show_default=True, metavar="CONFIG",
    help="Configurations to check beside the policies; repeatable.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), help="Windows at a time.  [default: 4 on a GPU, else 1]"
)
@backend_option
@click.option(
    "--keys", is_flag=True,
    help="Take mean keys from the text first, centre turbo keys by them, and write them beside "
    "each policy file, where they are found.",
)  # fmt: skip
@click.option(
    "--no-centre", is_flag=True,
    help="Leave turbo keys as they are.  [default: centred by the key projection's bias]",
)  # fmt: skip
@click.option(
    "--folder", default="calibrated", show_default=True, type=click.Path(file_okay=False),
    help="Where the policy files, the record and the measurements go.",
)  # fmt: skip
@click.option(
    "--resume/--no-resume", default=None,
    help="Demand, or forget, the measurements in the folder; by default they are taken where the "
    "settings are the same.",
)  # fmt: skip
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="How the results are printed.",
)  # fmt: skip
def command(
    model: str | None,
    adapter_path: str | None,
    trust_remote_code: bool,
    dtype: str | None,
    text: str,
    held_out: str | None,
    folder: str,
    output: str,
    **options: Any,
) -> None:
    """Find the formats that cost this model least, layer by layer, for a budget of bits.

    Writes a policy file for each budget, to be used as --policy FILE. Measurements stay in the
    folder: an interrupted run goes on where it stopped, and another budget costs only its check.
    """
    # MLX is imported by models, after the CPU's BLAS was looked for.
    from ..evaluate.calibration_run import Calibration
    from ..evaluate.tables import calibration_table
    from ..evaluate.text import load_text
    from ..loading.models import load

    options = _checked(options)
    source = load_text(text)
    other = None if held_out == NO_TEXT else load_text(held_out)
    if other is not None and other.sha256 == source.sha256:
        raise InputError(
            f"The held-out text is the calibration text ({source.name}): give another, or 'none'."
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    loaded = load(
        model,
        adapter_path=adapter_path,
        trust_remote_code=trust_remote_code,
        **load_dtype(dtype),
    )
    record = Calibration(loaded, target, options, note, Progress).run(source, other)
    write_json(str(target / RECORD), record)
    print(rendered(record, calibration_table, output))
    if output == "text":
        print("\n" + "\n".join(str(target / at["policy"]) for at in record["policies"]))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults, refused before a text or a model is loaded."""
    from ..evaluate import calibrate
    from ..evaluate.calibration_record import file_name
    from ..evaluate.configuration import check_name, parse_policy
    from ..evaluate.windows import check_sizes

    names = options["formats"]
    options["formats"] = calibrate.check_formats(
        calibrate.FORMATS if names is None else [n for n in names.split(",") if n.strip()]
    )
    if options["keys"] and options["no_centre"]:
        raise InputError("--keys and --no-centre cannot be given together.")
    options["budgets"] = tuple(dict.fromkeys(options["budgets"])) or calibrate.BUDGETS
    for budget in options["budgets"]:
        calibrate.check_budget(budget)
    names = [file_name(budget) for budget in options["budgets"]]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InputError(f"Budget {options['budgets'][at]} would write {name} a second time.")
    parse_policy(options["base"])
    for name in options["compare"]:
        check_name(name)
    check_sizes(options["ctx_size"], options["chunks"])
    check_sizes(options["ctx_size"], options["held_out_chunks"])
    return options


def main() -> None:
    """Console script ``mlx_turbokv.calibrate``."""
    run(command)
