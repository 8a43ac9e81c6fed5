"""A calibration from texts to policy files, as the command runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..centring.calibration import calibrate_keys
from ..centring.references import References, save_references
from ..kernels.backend import select_backend
from ..loading.models import Loaded
from ..model.shapes import KVShape
from . import calibrate
from . import calibration_record as records
from .calibrate import Assigned
from .checkpoint import Checkpoint, Journal, journal_path
from .configuration import REFERENCE, Prepared, prepare, prepare_layers
from .perplexity import Evaluation, evaluate_windows, settings_of
from .record import command_line, environment, model_record, weights_digest
from .sensitivity import default_batch
from .text import TextSource
from .windows import cut_windows, digest

MEASUREMENTS = "measurements.jsonl"


class Calibration:
    """One run: measure, assign, refine, check, and write the policy files.

    Args:
        loaded: a `models.Loaded`.
        folder: an existing folder.
        options: those of the command, checked: ctx_size, chunks, held_out_chunks, budgets,
            formats, base, refine, compare, batch_size, backend, keys, no_centre and resume.
        note: prints a line apart from the results.
        progress: makes what is called with (runs done, all runs, what ran); a context manager.
    """

    def __init__(
        self,
        loaded: Loaded,
        folder: Path,
        options: dict[str, Any],
        note: Callable[[str], None] = lambda _: None,
        progress: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.loaded, self.folder, self.options = loaded, folder, options
        self.note, self.progress = note, progress
        self.model = model_record(loaded) | {"fingerprint": weights_digest(loaded.model)}
        self.environment = environment()
        # What turbo keys are centred by, and the same in words.
        self.centre: bool | References = not options["no_centre"]
        self.keys = "centred by the bias, if any" if self.centre else "not centred"

    def run(self, source: TextSource, other: TextSource | None) -> dict:
        """Calibrate on one text, check on another; write the policy files, return the record."""
        options, model = self.options, self.loaded.model
        shapes = calibrate.shapes_of(model)
        for name in options["budgets"]:
            calibrate.as_budget(model, shapes, name)  # refused before anything is measured
        windows = self._windows(source, options["chunks"], options["ctx_size"] // 2)
        if options["keys"]:
            self.centre = calibrate_keys(model, windows, source.sha256)
            self.keys = f"centred by their means over {len(windows)} windows of the text"
        kept = self._measurements(source, windows)
        with self.progress() as progress:
            found, assigned = calibrate.calibrate(
                model, windows, options["budgets"], options["formats"], options["base"],
                progress=progress, records=kept, **self._how(),
            )  # fmt: skip
        names = [records.file_name(budget) for budget in options["budgets"]]
        assigned, checked = self._refined(assigned, names, windows, shapes, kept, source)
        held = None if other is None else self._check(other, assigned, names)
        record = {
            "what": "calibration: formats by layer for a budget of bits",
            "model": self.model,
            "calibration": {
                "text": {"name": source.name, "sha256": source.sha256},
                "n_ctx": options["ctx_size"],
                "n_windows": len(windows),
                "stride": options["ctx_size"] // 2,
                "formats": list(options["formats"]),
                "base": options["base"],
                "refine": options["refine"],
                "keys": self.keys,
            },
            "sensitivity": records.sensitivity_record(found, shapes, options["formats"]),
            "policies": [
                records.assigned_record(a, e, name) for a, e, name in zip(assigned, checked, names)
            ],
            "held_out": held,
            "command": command_line(),
            "environment": self.environment,
        }
        pairs = {name: a.pairs for name, a in zip(names, assigned)}
        records.write_policies(self.folder, pairs, record)
        if isinstance(self.centre, References):
            for name in names:
                save_references(self.folder / name, self.centre)
        return record

    def _how(self) -> dict:
        batch = self.options["batch_size"] or default_batch()
        return {"backend": self.options["backend"], "centre": self.centre, "batch": batch}

    def _windows(
        self, source: TextSource, chunks: int | None, stride: int | None = None
    ) -> np.ndarray:
        n_ctx = self.options["ctx_size"]
        windows = cut_windows(self.loaded.tokenizer, source.text, n_ctx, chunks, stride)
        if chunks is not None and len(windows) < chunks:
            self.note(f"{source.name} has {len(windows)} windows of {n_ctx}; all of them are used.")
        return windows

    def _settings(self, source: TextSource, windows: np.ndarray, configs: list[Prepared]) -> dict:
        name = self.model["fingerprint"]
        return settings_of(windows, configs, name, source.sha256, self.environment)

    def _measurements(self, source: TextSource, windows: np.ndarray) -> Journal:
        """What the folder has of this model and text."""
        backend = self.options["backend"]
        settings = self._settings(source, windows, []) | {
            "stride": self.options["ctx_size"] // 2,
            "backend": select_backend(None if backend == "auto" else backend).name,
            "keys": self.keys,
        }
        path = self.folder / MEASUREMENTS
        kept = Journal(path, settings, self.options["resume"])
        if kept.parts:
            self.note(f"{len(kept.parts)} runs were measured before ({path}).")
        return kept

    def _refined(
        self,
        assigned: list[Assigned],
        names: list[str],
        windows: np.ndarray,
        shapes: list[KVShape],
        kept: Journal,
        source: TextSource,
    ) -> tuple[list[Assigned], list[Evaluation]]:
        """Assignments, better ones where refining finds them, and each one's evaluation."""
        model, formats = self.loaded.model, self.options["formats"]
        evaluation = self._evaluate(source, windows, assigned, names)
        final, checked = [], []
        for best, name in zip(assigned, names):
            measured, result = _kld_of(evaluation, name), evaluation
            for _ in range(self.options["refine"]):
                with self.progress() as progress:
                    other = calibrate.refine(
                        model, windows, best, shapes, formats,
                        records=kept, progress=progress, **self._how(),
                    )  # fmt: skip
                if other.pairs == best.pairs:
                    break
                again = self._evaluate(source, windows, [other], [name])
                if _kld_of(again, name) >= measured:
                    break
                best, result, measured = other, again, _kld_of(again, name)
            final.append(best)
            checked.append(result)
        return final, checked

    def _check(self, other: TextSource, assigned: list[Assigned], names: list[str]) -> dict:
        """The policies on held-out windows, with what they are compared with."""
        windows = self._windows(other, self.options["held_out_chunks"])
        compare = list(dict.fromkeys(self.options["compare"]))
        evaluation = self._evaluate(other, windows, assigned, names, compare)
        return {
            "text": {"name": other.name, "sha256": other.sha256},
            "n_ctx": self.options["ctx_size"],
            "n_windows": len(windows),
            "results": records.held_out_record(evaluation, compare),
        }

    def _evaluate(
        self,
        source: TextSource,
        windows: np.ndarray,
        assigned: list[Assigned],
        names: list[str],
        more: Sequence[str] = (),
    ) -> Evaluation:
        """The f16 run, policies and further configurations over windows."""
        model, backend = self.loaded.model, self.options["backend"]
        configs = [prepare(model, REFERENCE, backend)]
        for at, name in zip(assigned, names):
            configs.append(prepare_layers(model, at.pairs, name, backend, self.centre))
        configs += [prepare(model, name, backend, centre=self.centre) for name in more]
        settings = self._settings(source, windows, configs)
        settings |= {"windows": digest(windows), "keys": self.keys}
        resume = False if self.options["resume"] is False else None
        checkpoint = Checkpoint(journal_path("perplexity", settings, None), settings, resume)
        with self.progress() as progress:
            evaluation = evaluate_windows(model, windows, configs, checkpoint, progress)
        checkpoint.done()
        return evaluation


def _kld_of(evaluation: Evaluation, name: str) -> float:
    return float(evaluation.result(name).window_means("kld").mean())
