"""``mlx_turbokv calibrate``: formats for each layer of one model, within a budget of bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..files import write_text
from ..quant.formats import as_format
from . import options
from .command import Command
from .entry import console_script
from .output import Progress, as_json, check_folder, format_record, print_status, write_folder
from .runs import load_model, policies_of, print_record
from .values import COUNT, exclude, refuse

NO_TEXT = "none"
RECORD = "calibration.json"


@click.command("calibrate", cls=Command)
@options.combined(options.model, options.dtype)
@click.option(
    "--text", "-f", default="sample", metavar="FILE|sample", help="The text to calibrate on."
)
@click.option(
    "--held-out", metavar="FILE|wikitext-2|none",
    help="Another text, to check the policies on.  [default: wikitext-2]",
)  # fmt: skip
@click.option("-c", "--ctx-size", default=512, type=COUNT, help="Tokens a window.")
@click.option(
    "--chunks",
    default=4,
    type=COUNT,
    help="Windows to calibrate on; their scored halves do not overlap.",
)
@click.option("--held-out-chunks", default=16, type=COUNT, help="Windows to check on.")
@click.option(
    "--budget", "budgets", multiple=True, metavar="BITS|CONFIG",
    help="Bits per value that K and V together may take, or a configuration whose bits are meant; "
    "repeatable.  [default: la-v7, 4.5 and 3.6]",
)  # fmt: skip
@click.option(
    "--formats", metavar="NAME,…",
    help="Formats to choose from for K and V of every layer.  [default: q8_0 and turbo6 to turbo2]",
)  # fmt: skip
@click.option(
    "--base", default="f16/f16", metavar="CONFIG",
    help="The formats of the other layers while one is measured.",
)  # fmt: skip
@options.protection
@click.option(
    "--refine", type=click.IntRange(0, 1000), default=0, metavar="N",
    help="Measure again around each policy, one step up and down, and take what is better; at "
    "most N times.",
)  # fmt: skip
@click.option(
    "--compare", multiple=True, default=("la-v7",), metavar="CONFIG",
    help="Configurations to check along with the policies; repeatable.",
)  # fmt: skip
@click.option(
    "--batch-size", type=COUNT,
    help="Windows at a time.  [default: 4 on a GPU, else 1]",
)  # fmt: skip
@options.backend
@click.option(
    "--keys", is_flag=True,
    help="Take mean keys and their scales from the text first, and write them next to each policy "
    "file, where they are found.  [default: measured at a model's first use]",
)  # fmt: skip
@click.option(
    "--no-centre", is_flag=True,
    help="Leave turbo keys as they are.",
)  # fmt: skip
@click.option(
    "--folder", default="calibrated", type=click.Path(file_okay=False),
    help="Where the policy files, the record and the measurements go.",
)  # fmt: skip
@options.resume
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text",
    help="How the results are printed.",
)  # fmt: skip
def command(**args: Any) -> None:
    """Find the formats that cost this model least, layer by layer, for a budget of bits.

    Writes a policy file for each budget, to be used as --policy FILE. Measurements stay in the
    folder: an interrupted run goes on where it stopped, and another budget costs only its check.
    """
    from ..evaluate.text import load_text

    check_options(args)
    folder = Path(args["folder"])
    if folder.exists():
        check_folder(folder, "--folder")
    source, held_out = load_text(args["text"]), args["held_out"]
    other = None if held_out == NO_TEXT else load_text(held_out, "--held-out")
    if other is not None and other.sha256 == source.sha256:
        raise InputError(
            f"The held-out text is the calibration text ({source.name}): give another, or 'none'."
        )
    options.check_backend(args["backend"])
    check_folder(folder, "--folder")
    loaded = load_model(args)
    from ..evaluate.calibration_run import Calibration
    from ..evaluate.tables import calibration_table

    def measure() -> dict:
        calibration = Calibration(loaded, folder, args, print_status, Progress)
        record = calibration.run(source, other)

        def write(folder: Path) -> None:
            calibration.write(record, folder)
            write_text(folder / RECORD, as_json(record) + "\n")

        write_folder(folder, write, record)
        return record

    record = print_record(
        measure, lambda record: format_record(record, calibration_table, args["output"])
    )
    if args["output"] == "text":
        print("\n" + "\n".join(str(folder / at["policy"]) for at in record["policies"]))


def check_options(args: dict[str, Any]) -> None:
    """Check the options and fill in defaults, before a text or a model is loaded.

    Raises: InputError.
    """
    from ..evaluate import calibrate
    from ..evaluate.calibration_record import file_name
    from ..evaluate.names import check_name, parse_policy
    from ..evaluate.sensitivity import check_context
    from ..evaluate.windows import short_windows
    from ..model.text_windows import check_sizes

    names = args["formats"]
    args["formats"] = calibrate.check_formats(
        calibrate.FORMATS if names is None else [n for n in names.split(",") if n.strip()]
    )
    exclude("keys", "no_centre")
    if args["held_out"] == NO_TEXT:
        refuse(["held_out_chunks", "compare"], "with --held-out none")
    args["budgets"] = tuple(dict.fromkeys(args["budgets"])) or calibrate.BUDGETS
    for budget in args["budgets"]:
        calibrate.check_budget(budget)
    names = [file_name(budget) for budget in args["budgets"]]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InputError(f"Budget {args['budgets'][at]} would write {name} a second time.")
    protection = parse_policy(args["base"]).protecting(args["sink"], args["recent"]).protection
    check_context(args["ctx_size"], protection)
    if said := short_windows({"every configuration": protection}, args["ctx_size"]):
        print_status(said)
    for name in args["compare"]:
        check_name(name)
    budgets = [name for name in args["budgets"] if not calibrate.is_number(name)]
    policies = policies_of([args["base"], *args["compare"], *budgets])
    formats = [as_format(name) for name in args["formats"]]
    formats += [k for policy in policies for k in policy.k_formats()]
    if not any(fmt.is_turbo for fmt in formats):
        refuse(["keys", "no_centre"], "where no format is turbo")
    for chunks in (args["chunks"], args["held_out_chunks"]):
        check_sizes(args["ctx_size"], chunks)


main = console_script(command)
