"""``mlx_turbokv report``: quality, memory and speed of a model's cache on one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..files import write_text
from . import options
from .command import Command
from .entry import console_script
from .output import as_json, check_folder, print_status, read_json, try_write_json, write_folder
from .runs import asked_centre, centre_of, config_names, fitting_names, load_model, not_whole
from .values import COUNT, refuse

PARTS = ("perplexity", "needle", "plan", "bench")
CALIBRATION = "calibration"
QUALITY_CONFIGS = (
    "q8_0/q8_0", "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "mode-10", "turbo6/turbo5",
    "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3", "mlx-kv8:64", "mlx-kv4:64", "llama-q4_0",
)  # fmt: skip
FEW_CONFIGS = ("q8_0/q8_0", "turbo6/turbo5", "la-v7", "turbo4/turbo3")
PLAN_CONTEXTS = (512, 4096, 32768, 131072)
# Sizes of the parts: (full, quick).
SIZES = {
    "ctx_size": (512, 512),
    "chunks": (16, 2),
    "needle_contexts": ((512, 1024, 2048, 4096), (512,)),
    "depths": (5, 3),
    "prompt_tokens": ((512, 4096), (256,)),
    "generation_tokens": (64, 8),
    "num_trials": (5, 2),
}
# Options of one part, by parameter.
PART_OPTIONS = {
    "perplexity": ("ctx_size", "chunks"),
    "needle": ("needle_contexts", "depths"),
    "plan": (),
    "bench": ("prompt_tokens", "generation_tokens", "num_trials"),
}


@click.command("report", cls=Command)
@options.combined(options.model, options.dtype)
@click.option(
    "--out", "folder", default="turbokv-report", metavar="FOLDER",
    help="Takes report.html, report.json and a JSON file a part; parts that are there already, "
    "measured with the same settings, are kept.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Small sizes: minutes, and wide intervals.")
@click.option("--text", "-f", default="sample", metavar="FILE|sample|wikitext-2")
@options.configs("Compared with f16/f16 in every part; repeatable.")
@click.option("--skip", multiple=True, type=click.Choice(PARTS), help="Leave a part out.")
@click.option("--calibrate", metavar="FILE", help="A record of calibrate: adds its sensitivities.")
@click.option("-c", "--ctx-size", type=COUNT, help="perplexity: tokens a window.  [512]")
@click.option("--chunks", type=COUNT, help="perplexity: windows.  [16; quick: 2]")
@click.option(
    "--needle-context", "needle_contexts", multiple=True, type=COUNT,
    help="needle: repeatable.  [512, 1024, 2048, 4096; quick: 512]",
)  # fmt: skip
@click.option("--depths", type=COUNT, help="needle: how many.  [5; quick: 3]")
@click.option(
    "-p", "--prompt-tokens", multiple=True, type=COUNT,
    help="bench: repeatable.  [512, 4096; quick: 256]",
)  # fmt: skip
@click.option("-g", "--generation-tokens", type=COUNT, help="bench.  [64; quick: 8]")
@click.option("-n", "--num-trials", type=COUNT, help="bench.  [5; quick: 2]")
@options.combined(options.centre, options.backend)
@click.option("--no-resume", is_flag=True, help="Measure everything anew.")
def command(**args: Any) -> None:
    """Measure quality, needles, memory and speed of a model's cache, and write one HTML page."""
    for name, (full, quick) in SIZES.items():
        args[name] = args[name] or (quick if args["quick"] else full)
    _check_options(args)
    folder = Path(args["folder"])
    report = _Report(args, folder)
    calibration = _calibration(args["calibrate"])
    check_folder(folder, "--out")
    report.load()
    record = report.measure()
    record["calibrate"] = calibration
    from ..report.page import build_page

    page, page_path = build_page(record), folder / "report.html"

    def write(folder: Path) -> None:
        write_text(folder / "report.json", as_json(record) + "\n")
        write_text(folder / page_path.name, page)

    write_folder(folder, write, record)
    print(f"{page_path}: {len(page.encode()):,} bytes")


def _check_options(args: dict[str, Any]) -> None:
    """Raises: InputError for options that would change nothing, or a missing matplotlib."""
    from ..evaluate.plots import require_matplotlib
    from ..model.text_windows import check_sizes

    require_matplotlib()
    for part in args["skip"]:
        refuse(PART_OPTIONS[part], f"with --skip {part}")
    if set(args["skip"]) == set(PARTS):
        raise InputError("--skip leaves no part: at least one must be measured.")
    check_sizes(args["ctx_size"], args["chunks"])


def _calibration(path: str | None) -> dict | None:
    """The record of --calibrate.

    Raises: InputError for a file that a page cannot be made of.
    """
    if path is None:
        return None
    from ..report.page import check_calibration

    record = read_json(path, CALIBRATION)
    try:
        check_calibration(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise not_whole(path, CALIBRATION, error) from error
    return record


class _Report:
    """The parts of one report; what needs no model is checked first."""

    def __init__(self, args: dict[str, Any], folder: Path) -> None:
        from ..evaluate.text import load_text

        self.args, self.folder = args, folder
        self.names = config_names(args["configs"] or QUALITY_CONFIGS)
        self.few = config_names(args["configs"] or FEW_CONFIGS)
        self.asked_centre = asked_centre(args, self.names)
        options.check_backend(args["backend"])
        self.source = load_text(args["text"])

    def load(self) -> None:
        """Load the model, and check every part against it before the first is measured."""
        from ..evaluate.configuration import prepare
        from ..evaluate.record import environment, model_record

        args = self.args
        self.loaded = load_model(args)
        self.centre = centre_of(self.asked_centre, self.loaded)
        self.model, self.environment = model_record(self.loaded), environment()
        self.names = fitting_names(self.loaded.model, self.names, args)
        self.few = [name for name in self.few if name in self.names]
        self.resume = False if args["no_resume"] else None
        self.about = {
            "model": self.model,
            "text": {"name": self.source.name, "sha256": self.source.sha256},
        }
        prepared = [
            prepare(self.loaded.model, name, args["backend"], centre=self.centre)
            for name in self.names
        ]
        self.centred = {c.name: c.centred for c in prepared}
        self.protected = {c.name: str(c.protection) if c.protection else None for c in prepared}
        self._check_parts()

    def _check_parts(self) -> None:
        """Raises: InputError for a text or context that is too short for a part."""
        from ..evaluate.haystack import Haystack
        from ..model.text_windows import cut_windows

        skip, args, tokenizer = self.args["skip"], self.args, self.loaded.tokenizer
        if "perplexity" not in skip:
            cut_windows(tokenizer, self.source.text, args["ctx_size"], args["chunks"])
        if "needle" not in skip:
            Haystack(tokenizer, self.source.text).check(self._cases())

    def _cases(self) -> list:
        from ..evaluate.haystack import KINDS, make_cases
        from .needle import even_depths

        return make_cases(
            list(self.args["needle_contexts"]), even_depths(self.args["depths"]), KINDS
        )  # fmt: skip

    def measure(self) -> dict:
        """The whole record; each part is also written to its own file."""
        parts = {
            name: None if name in self.args["skip"] else getattr(self, f"_{name}")()
            for name in PARTS
        }
        backends = [p["backend"] for p in parts.values() if p and "backend" in p]
        return {
            "what": "report of a model's KV cache",
            "model": self.model,
            "environment": self.environment,
            "backend": backends[0] if backends else "none",
            **parts,
        }

    def _path(self, name: str) -> str:
        return str(self.folder / f"{name}.json")

    def _finished(
        self, name: str, what: str, settings: dict, rows: str = "", names: list[str] | None = None
    ) -> dict | None:
        """A part that was measured before with these settings.

        Args:
            rows: the record's key of one row a configuration, which must be ``names``, centred and
                protected as they are now.
        """
        path = Path(self._path(name))
        if self.args["no_resume"] or not path.is_file():
            return None
        found = read_json(path, what)
        settings = json.loads(json.dumps(settings | {"environment": self.environment}))
        differ = [key for key, value in settings.items() if found.get(key) != value]
        if differ:
            print_status(
                f"{path} was measured with other settings ({', '.join(differ)}): measured anew."
            )
            return None
        print_status(f"{name}: kept from {path}")
        wanted = [(config, self.centred[config], self.protected[config]) for config in names or []]
        held = [
            (row["config"], row.get("centred"), row.get("protected")) for row in found.get(rows, [])
        ]
        same = held == wanted
        return found if same else None

    def _perplexity(self) -> dict:
        from ..model.text_windows import cut_windows
        from . import perplexity

        n_ctx, chunks = self.args["ctx_size"], self.args["chunks"]
        windows = cut_windows(self.loaded.tokenizer, self.source.text, n_ctx, chunks)
        settings = self.about | {"n_ctx": n_ctx, "n_windows": len(windows)}
        return self._finished(
            "perplexity", perplexity.WHAT, settings, "results", self.names
        ) or perplexity.measure(
            self.loaded, self.source, self.names, n_ctx, chunks, self.args["backend"],
            self._path("perplexity"), self.resume, self.centre,
        )  # fmt: skip

    def _needle(self) -> dict:
        from ..evaluate.haystack import KINDS
        from . import needle

        contexts, depths = self.args["needle_contexts"], needle.even_depths(self.args["depths"])
        settings = self.about | {
            "contexts": sorted(set(contexts)), "depths": depths, "kinds": sorted(KINDS),
            "repeats": 1, "not_measured": 0,
        }  # fmt: skip
        return self._finished(
            "needle", needle.WHAT, settings, "summary", self.few
        ) or needle.measure(
            self.loaded, self.source, self.few, self._cases(),
            self.args["backend"], self._path("needle"), self.resume, centre=self.centre,
        )  # fmt: skip

    def _plan(self) -> dict:
        from ..evaluate.names import is_peer, parse_policy
        from ..loading.model_shape import shape_from_config
        from ..report.plan import make_plan
        from ..report.plan_table import as_json

        shape = shape_from_config(self.loaded.config, self.loaded.name)
        rows = [(name, parse_policy(name)) for name in self.names if not is_peer(name)]
        most = self.loaded.max_context or PLAN_CONTEXTS[-1]
        contexts = [n for n in PLAN_CONTEXTS if n <= most] or PLAN_CONTEXTS[:1]
        plan = as_json(make_plan(shape, rows, contexts, centre=self.asked_centre))
        plan = json.loads(json.dumps(plan))
        try_write_json(self._path("plan"), plan)
        return plan

    def _bench(self) -> dict:
        from ..evaluate.benchmark import Point, Settings
        from ..loading.random_model import vocabulary_size, weight_bytes
        from . import bench

        args, model = self.args, self.loaded.model
        n_generated, n_trials = args["generation_tokens"], args["num_trials"]
        vocab_size = vocabulary_size(self.loaded.config)
        settings = Settings(n_generated, n_trials, vocab_size=vocab_size)
        about = {
            "model": self.model, "weights": "its own weights", "weight_bytes": weight_bytes(model),
        }  # fmt: skip
        same = {
            "model": self.model, "configs": self.few, "num_trials": n_trials,
            "centred": {name: self.centred[name] for name in self.few},
            "protected": {name: self.protected[name] for name in self.few},
            "generation_tokens": n_generated,
        }  # fmt: skip
        return bench.measure(
            model, about, self.few, [Point("prompt", n) for n in args["prompt_tokens"]],
            settings, args["backend"], self._path("bench"),
            self._finished("bench", bench.WHAT, same) is not None, centre=self.centre,
        )  # fmt: skip


main = console_script(command)
