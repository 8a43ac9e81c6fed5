"""A calibration from texts to policy files, as the command runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..centring import AUTO
from ..centring.calibration import calibrate_keys
from ..centring.first_use import for_model
from ..centring.references import References, save_references
from ..kernels.backend import select_backend
from ..loading.models import Loaded
from ..model.fingerprint import weights_digest
from ..model.shapes import KVShape
from ..model.text_windows import cut_windows
from . import calibrate
from . import calibration_record as records
from .calibrate import Assigned
from .checkpoint import Checkpoint, Journal, journal_path
from .configuration import layer_list, prepare
from .names import REFERENCE, parse_policy, protected_name
from .perplexity import Evaluation, evaluate_windows, settings_of
from .prepared import Prepared
from .record import command_line, environment, model_record
from .sensitivity import default_batch
from .text import TextSource
from .windows import digest

MEASUREMENTS = "measurements.jsonl"


class Sample(NamedTuple):
    """Windows of a text, [n_windows, n_ctx]."""

    source: TextSource
    windows: np.ndarray


class Calibration:
    """One run: measure, assign, refine and check; then write the policy files.

    Args:
        loaded: a `models.Loaded`.
        folder: an existing folder.
        options: those of the command, checked: ctx_size, chunks, held_out_chunks, budgets,
            formats, base, sink, recent, refine, compare, batch_size, backend, keys, scales,
            no_centre and resume.
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
        self.pairs: dict[str, list[tuple[str, str]]] = {}  # by policy file, once it has run
        self.model = model_record(loaded) | {"fingerprint": weights_digest(loaded.model)}
        self.environment = environment()
        # What turbo keys are centred by, and its description.
        self.centre: Any = False
        self.keys = "not centred"
        if not options["no_centre"]:
            self.centre = for_model(AUTO, loaded.tokenizer, loaded.name)
            self.keys = "centred as measured at the model's first use"
        self.protected = options["sink"], options["recent"]
        # The base's own where it names some: of all that is measured, and of the policies.
        self.protection = parse_policy(options["base"]).protecting(*self.protected).protection

    def run(self, source: TextSource, other: TextSource | None) -> dict:
        """Calibrate on one text, check on another; returns the record."""
        options, model = self.options, self.loaded.model
        formats, stride = options["formats"], options["ctx_size"] // 2
        shapes = calibrate.shapes_of(model)
        # refused before anything is measured
        budgets = [calibrate.as_budget(model, shapes, name) for name in options["budgets"]]
        smallest = int(calibrate.row_sizes(shapes, formats).min(axis=-1).sum())
        calibrate.check_room(budgets, smallest, shapes)
        sample = self._sample(source, options["chunks"], stride)
        if options["keys"]:
            self.centre = calibrate_keys(model, sample.windows, source.sha256, scale=True)
            self.keys = f"centred and scaled by {len(sample.windows)} windows of the text"
        how = {
            "backend": options["backend"],
            "centre": self.centre,
            "batch": options["batch_size"] or default_batch(),
            "protection": self.protection,
            "records": self._measurements(sample),
        }
        with self.progress() as progress:
            found, assigned = calibrate.calibrate(
                model, sample.windows, options["budgets"], formats, options["base"],
                progress=progress, **how,
            )  # fmt: skip
        names = [records.file_name(budget) for budget in options["budgets"]]
        policies = dict(zip(names, assigned))
        evaluation = self._evaluate(sample, policies)
        evaluations = dict.fromkeys(names, evaluation)
        for name in names if options["refine"] else ():
            policies[name], evaluations[name] = self._refined(
                sample, name, policies[name], evaluation, shapes, how
            )
        record = {
            "what": "calibration: formats by layer for a budget of bits",
            "model": self.model,
            "calibration": {
                "text": source.record(),
                "n_ctx": options["ctx_size"],
                "n_windows": len(sample.windows),
                "stride": stride,
                "formats": list(formats),
                "base": options["base"],
                "refine": options["refine"],
                "keys": self.keys,
                **self._protected_record(),
            },
            "sensitivity": records.sensitivity_record(found, shapes, formats),
            "policies": [
                records.assigned_record(policies[name], evaluations[name], name) for name in names
            ],
            "held_out": None if other is None else self._held_out(other, policies),
            "command": command_line(),
            "environment": self.environment,
        }
        self.pairs = {name: policy.pairs for name, policy in policies.items()}
        return record

    def write(self, record: dict, folder: Path) -> None:
        """Write the policy files of what ``run`` returned, and the key references beside them.

        Raises: InputError where the folder cannot be written.
        """
        records.write_policies(folder, self.pairs, self.protection, record)
        if isinstance(self.centre, References):
            for name in self.pairs:
                save_references(folder / name, self.centre)

    def _sample(self, source: TextSource, chunks: int | None, stride: int | None = None) -> Sample:
        n_ctx = self.options["ctx_size"]
        windows = cut_windows(self.loaded.tokenizer, source.text, n_ctx, chunks, stride)
        if chunks is not None and len(windows) < chunks:
            self.note(f"{source.name} has {len(windows)} windows of {n_ctx}; all of them are used.")
        return Sample(source, windows)

    def _settings(self, sample: Sample, configs: list[Prepared]) -> dict:
        name, sha256 = self.model["fingerprint"], sample.source.sha256
        settings = settings_of(sample.windows, configs, name, sha256, self.environment)
        return settings | {"keys": self.keys, **self._protected_record()}

    def _protected_record(self) -> dict[str, str]:
        return {"protected": str(self.protection)} if self.protection else {}

    def _measurements(self, sample: Sample) -> Journal:
        """The measurements in the folder, of this model and text."""
        settings = self._settings(sample, []) | {
            "stride": self.options["ctx_size"] // 2,
            "backend": select_backend(self.options["backend"]).name,
        }
        path = self.folder / MEASUREMENTS
        kept = Journal(path, settings, self.options["resume"])
        if kept.parts:
            self.note(f"{len(kept.parts)} runs were measured before ({path}).")
        return kept

    def _refined(
        self,
        sample: Sample,
        name: str,
        best: Assigned,
        evaluation: Evaluation,
        shapes: list[KVShape],
        how: dict[str, Any],
    ) -> tuple[Assigned, Evaluation]:
        """A better assignment than this one where refining finds it, and its evaluation."""
        for _ in range(self.options["refine"]):
            with self.progress() as progress:
                other = calibrate.refine(
                    self.loaded.model, sample.windows, best, shapes, self.options["formats"],
                    progress=progress, **how,
                )  # fmt: skip
            if other.pairs == best.pairs:
                break
            again = self._evaluate(sample, {name: other})
            if _kld_of(again, name) >= _kld_of(evaluation, name):
                break
            best, evaluation = other, again
        return best, evaluation

    def _held_out(self, other: TextSource, policies: dict[str, Assigned]) -> dict:
        """The policies on held-out windows, with what they are compared with."""
        sample = self._sample(other, self.options["held_out_chunks"])
        names = [protected_name(name, *self.protected) for name in self.options["compare"]]
        compare = list(dict.fromkeys(names))
        evaluation = self._evaluate(sample, policies, compare)
        return {
            "text": other.record(),
            "n_ctx": self.options["ctx_size"],
            "n_windows": len(sample.windows),
            "results": records.held_out_record(evaluation, compare),
        }

    def _evaluate(
        self, sample: Sample, policies: dict[str, Assigned], more: Sequence[str] = ()
    ) -> Evaluation:
        """The f16 run, policies and further configurations over windows."""
        model, backend = self.loaded.model, self.options["backend"]
        configs = [prepare(model, REFERENCE, backend)]
        for name, policy in policies.items():
            config = layer_list(policy.pairs, name, self.protection)
            configs.append(prepare(model, config, backend, centre=self.centre))
        configs += [prepare(model, name, backend, centre=self.centre) for name in more]
        settings = self._settings(sample, configs) | {"windows": digest(sample.windows)}
        resume = False if self.options["resume"] is False else None
        checkpoint = Checkpoint(journal_path("perplexity", settings, None), settings, resume)
        with self.progress() as progress:
            evaluation = evaluate_windows(model, sample.windows, configs, checkpoint, progress)
        checkpoint.done()
        return evaluation


def _kld_of(evaluation: Evaluation, name: str) -> float:
    return float(evaluation.result(name).window_means("kld").mean())
