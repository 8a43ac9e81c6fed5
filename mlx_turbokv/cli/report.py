"""``mlx_turbokv report``: everything about a model's cache on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .entry import run
from .options import (
    backend_option,
    centre_from,
    centre_options,
    dtype_option,
    load_dtype,
    model_options,
)
from .output import check_writable, note, read_json, write_json

PARTS = ("perplexity", "needle", "plan", "bench")
CALIBRATION = "calibration"
QUALITY_CONFIGS = (
    "q8_0/q8_0", "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "mode-10", "turbo6/turbo5",
    "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3", "mlx-kv8:64", "mlx-kv4:64",
)  # fmt: skip
FEW_CONFIGS = ("q8_0/q8_0", "q8_0/turbo2", "la-v7", "turbo4/turbo3")
PLAN_CONTEXTS = (512, 4096, 32768, 131072)
# What a part is measured at: (full, quick).
SIZES = {
    "ctx_size": (512, 512),
    "chunks": (16, 2),
    "needle_contexts": ((512, 1024, 2048, 4096), (512,)),
    "depths": (5, 3),
    "prompt_tokens": ((512, 4096), (256,)),
    "generation_tokens": (64, 8),
    "num_trials": (5, 2),
}
_COUNT = click.IntRange(1)


@click.command("report")
@model_options
@dtype_option
@click.option(
    "--out", "folder", default="turbokv-report", show_default=True, metavar="FOLDER",
    help="Takes report.html, report.json and a JSON file a part; parts that are there already, "
    "measured with the same settings, are kept.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Small sizes: minutes, and wide intervals.")
@click.option("--text", "-f", default="sample", show_default=True, metavar="FILE|sample|wikitext-2")
@click.option(
    "--config", "configs", multiple=True, metavar="CONFIG",
    help="Compared with f16/f16 in every part; repeatable.",
)  # fmt: skip
@click.option("--skip", multiple=True, type=click.Choice(PARTS), help="Leave a part out.")
@click.option("--calibrate", metavar="FILE", help="A record of calibrate: adds its sensitivities.")
@click.option("-c", "--ctx-size", type=_COUNT, help="perplexity: tokens a window.  [512]")
@click.option("--chunks", type=_COUNT, help="perplexity: windows.  [16; quick: 2]")
@click.option(
    "--needle-context", "needle_contexts", multiple=True, type=_COUNT,
    help="needle: repeatable.  [512, 1024, 2048, 4096; quick: 512]",
)  # fmt: skip
@click.option("--depths", type=_COUNT, help="needle: how many.  [5; quick: 3]")
@click.option(
    "-p", "--prompt-tokens", multiple=True, type=_COUNT,
    help="bench: repeatable.  [512, 4096; quick: 256]",
)  # fmt: skip
@click.option("-g", "--generation-tokens", type=_COUNT, help="bench.  [64; quick: 8]")
@click.option("-n", "--num-trials", type=_COUNT, help="bench.  [5; quick: 2]")
@centre_options
@backend_option
@click.option("--no-resume", is_flag=True, help="Measure everything anew.")
def command(**options: Any) -> None:
    """Measure quality, needles, memory and speed of a model's cache, and write one HTML page."""
    quick = options["quick"]
    for name, (full, small) in SIZES.items():
        options[name] = options[name] or (small if quick else full)
    folder = Path(options["folder"])
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: --out takes a folder.")
    calibration = None
    if options["calibrate"]:
        calibration = read_json(options["calibrate"], CALIBRATION)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(str(folder / "report.html"))
    record = _Report(options, folder).measured()
    record["calibrate"] = calibration
    write_json(str(folder / "report.json"), record)
    from ..report.page import build_page

    page = build_page(record)
    target = folder / "report.html"
    part = target.with_name("report.html.new")
    part.write_text(page, encoding="utf-8")
    part.replace(target)
    print(f"{target}: {len(page.encode()):,} bytes")


class _Report:
    """The parts of one report."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        # MLX is imported by models, after the CPU's BLAS was looked for.
        from ..evaluate import configuration
        from ..evaluate.record import environment, model_record
        from ..evaluate.text import load_text
        from ..loading.models import load

        self.options, self.folder = options, folder
        self.centre = centre_from(options["keys"], options["no_centre"])
        given = options["configs"]
        self.names = self._names(given or QUALITY_CONFIGS)
        self.few = self._names(given or FEW_CONFIGS)
        for name in [*self.names, *self.few]:
            configuration.check_name(name)
        self.source = load_text(options["text"])
        self.loaded = load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
            **load_dtype(options["dtype"]),
        )
        self.model, self.environment = model_record(self.loaded), environment()
        if not given:
            backend = options["backend"]
            self.names, reasons = configuration.fitting(self.loaded.model, self.names, backend)
            self.few = [name for name in self.few if name in self.names]
            for reason in reasons:
                note(reason)
        self.centred = {name: self._prepared(name).centred for name in [*self.names, *self.few]}

    def _prepared(self, name: str) -> Any:
        from ..evaluate.configuration import prepare

        return prepare(self.loaded.model, name, self.options["backend"], centre=self.centre)

    @staticmethod
    def _names(configs: tuple[str, ...]) -> list[str]:
        from ..evaluate.configuration import REFERENCE

        return list(dict.fromkeys([REFERENCE, *configs]))

    def measured(self) -> dict:
        """The whole record; each part is also a file of its own."""
        parts = {
            name: getattr(self, f"_{name}")() if name not in self.options["skip"] else None
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

    def _kept(self, name: str, what: str, expected: dict) -> dict | None:
        """A part measured before with the same settings."""
        path = self.folder / f"{name}.json"
        if self.options["no_resume"] or not path.is_file():
            return None
        found = read_json(str(path), what)
        expected = json.loads(json.dumps(expected | {"environment": self.environment}))
        differ = [key for key, value in expected.items() if found.get(key) != value]
        if differ:
            note(f"{path} was measured with other settings ({', '.join(differ)}): measured anew.")
            return None
        note(f"{name}: kept from {path}")
        return found

    def _same(self, rows: list[dict], names: list[str]) -> bool:
        """Whether these are the configurations, with keys centred as they are now."""
        return [(r["config"], r.get("centred")) for r in rows] == [
            (name, self.centred[name]) for name in names
        ]

    def _text(self) -> dict:
        return {"name": self.source.name, "sha256": self.source.sha256}

    def _resume(self) -> bool | None:
        return False if self.options["no_resume"] else None

    def _perplexity(self) -> dict:
        from ..evaluate.windows import cut_windows
        from . import perplexity

        n_ctx, chunks = self.options["ctx_size"], self.options["chunks"]
        windows = cut_windows(self.loaded.tokenizer, self.source.text, n_ctx, chunks)
        expected = {
            "model": self.model, "text": self._text(), "n_ctx": n_ctx, "n_windows": len(windows),
        }  # fmt: skip
        kept = self._kept("perplexity", perplexity.WHAT, expected)
        if kept is not None and self._same(kept["results"], self.names):
            return kept
        return perplexity.measure(
            self.loaded, self.source, self.names, n_ctx, chunks, self.options["backend"],
            str(self.folder / "perplexity.json"), self._resume(), self.centre,
        )  # fmt: skip

    def _needle(self) -> dict:
        from ..evaluate.haystack import KINDS, make_cases
        from . import needle

        depths = needle.even_depths(self.options["depths"])
        contexts = list(self.options["needle_contexts"])
        cases = make_cases(contexts, depths, KINDS)
        expected = {
            "model": self.model, "text": self._text(), "contexts": sorted(set(contexts)),
            "depths": depths, "kinds": sorted(KINDS), "repeats": 1, "not_measured": 0,
        }  # fmt: skip
        kept = self._kept("needle", needle.WHAT, expected)
        if kept is not None and self._same(kept["summary"], self.few):
            return kept
        return needle.measure(
            self.loaded, self.source, self.few, cases, self.options["backend"],
            str(self.folder / "needle.json"), self._resume(), centre=self.centre,
        )  # fmt: skip

    def _plan(self) -> dict:
        from ..evaluate.configuration import parse_policy
        from ..loading.known_shapes import shape_from_config
        from ..report.plan import make_plan
        from ..report.plan_table import as_json

        shape = shape_from_config(self.loaded.config, self.loaded.name)
        rows = [(name, parse_policy(name)) for name in self.names if not name.startswith("mlx-kv")]
        contexts = PLAN_CONTEXTS
        if self.loaded.max_context:
            contexts = [n for n in PLAN_CONTEXTS if n <= self.loaded.max_context] or PLAN_CONTEXTS[
                :1
            ]
        plan = json.loads(json.dumps(as_json(make_plan(shape, rows, contexts))))
        write_json(str(self.folder / "plan.json"), plan)
        return plan

    def _bench(self) -> dict:
        from ..evaluate.benchmark import Point, Settings
        from ..loading.random_model import weight_bytes
        from . import bench

        options = self.options
        text = self.loaded.config.get("text_config") or self.loaded.config
        settings = Settings(
            options["generation_tokens"], options["num_trials"],
            vocab_size=int(text.get("vocab_size") or 256),
        )  # fmt: skip
        points = [Point("prompt", n) for n in options["prompt_tokens"]]
        about = {
            "model": self.model, "weights": "its own weights",
            "weight_bytes": weight_bytes(self.loaded.model),
        }  # fmt: skip
        path = self.folder / "bench.json"
        expected = {
            "model": self.model, "configs": self.few, "num_trials": settings.num_trials,
            "centred": {name: self.centred[name] for name in self.few},
            "generation_tokens": settings.generation_tokens,
        }  # fmt: skip
        resume = self._kept("bench", bench.WHAT, expected) is not None
        return bench.measure(
            self.loaded.model, about, self.few, points, settings, options["backend"], str(path),
            resume, centre=self.centre,
        )  # fmt: skip


def main() -> None:
    """Console script ``mlx_turbokv.report``."""
    run(command)
