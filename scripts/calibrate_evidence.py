"""Calibrate the default model, and try variants of calibrating it on wikitext-2.

    python scripts/calibrate_evidence.py FOLDER --held-out wiki.test.raw [--steps NAME,…] [--small]

Steps, each resumed where it was interrupted; without --steps all of them, in this order:

    sample     sensitivities on the package's sample, around f16: the policies of BUDGETS, which are
               those of benchmarks/policies (scripts/quality_table.py says what they are worth)
    base       sensitivities on the sample around turbo4/turbo4
    own        sensitivities around f16 on 16 windows of text that the model writes itself
    refine     policies of the step `sample`, measured again around themselves
    variants   the policies of `base`, `own` and `refine` beside those of `sample`, 64 windows of 512

--small makes everything tiny, to try the script.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_turbokv.cli.output import Progress, print_status, write_json  # noqa: E402
from mlx_turbokv.cli.perplexity import measure  # noqa: E402
from mlx_turbokv.evaluate.calibrate import FORMATS  # noqa: E402
from mlx_turbokv.evaluate.calibration_record import file_name  # noqa: E402
from mlx_turbokv.evaluate.calibration_run import Calibration  # noqa: E402
from mlx_turbokv.evaluate.tables import calibration_table, perplexity_table  # noqa: E402
from mlx_turbokv.evaluate.text import TextSource, load_text  # noqa: E402
from mlx_turbokv.loading.models import load  # noqa: E402

BUDGETS = ("la-v7", "5.25", "4.75", "4.25", "3.75", "3.5", "3.25", "3", "2.75")
VARIANT_BUDGETS = ("la-v7", "4.25", "3.5")
STEPS = ("sample", "base", "own", "refine", "variants")


class Steps:
    """The steps by name, on one loaded model."""

    def __init__(self, given: argparse.Namespace):
        self.backend, self.batch, self.small = given.backend, given.batch_size, given.small
        self.held_out = load_text(given.held_out)
        self.loaded = load(dtype=getattr(mx, given.dtype), packed=False)
        # Policies are called by their path in the folder.
        given.folder.mkdir(parents=True, exist_ok=True)
        os.chdir(given.folder)
        self.n_windows, self.n_own = (1, 1) if self.small else (64, 16)
        self.budgets = ("la-v7",) if self.small else BUDGETS
        self.variant_budgets = ("la-v7",) if self.small else VARIANT_BUDGETS

    def calibrate(self, name: str, source: TextSource, chunks: int | None, **changes) -> None:
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        options = {
            "ctx_size": 64 if self.small else 512, "chunks": 1 if self.small else chunks,
            "held_out_chunks": None, "budgets": self.variant_budgets, "base": "f16/f16", "refine": 0,
            "formats": ("q8_0", "turbo2") if self.small else FORMATS, "compare": (),
            "batch_size": self.batch, "backend": self.backend,
            "keys": False, "no_centre": False, "resume": None, **changes,
        }  # fmt: skip
        record = Calibration(self.loaded, folder, options, print_status, Progress).run(source, None)
        write_json(f"{name}/calibration.json", record)
        print(calibration_table(record).render("text"), flush=True)

    def sample(self) -> None:
        self.calibrate("sample", load_text("sample"), None, budgets=self.budgets)

    def base(self) -> None:
        self.calibrate("base", load_text("sample"), None, base="turbo4/turbo4")

    def own(self) -> None:
        self.calibrate("own", self.own_text(), self.n_own)

    def refine(self) -> None:
        Path("refine").mkdir(exist_ok=True)
        if not Path("refine/measurements.jsonl").exists():
            shutil.copy("sample/measurements.jsonl", "refine/measurements.jsonl")
        self.calibrate("refine", load_text("sample"), None, refine=1)

    def variants(self) -> None:
        names = self.policies(("sample", "base", "own", "refine"), self.variant_budgets)
        self.measure("variants", ["f16/f16", "la-v7", *names], 512, self.n_windows)

    @staticmethod
    def policies(steps: tuple[str, ...], budgets: tuple[str, ...]) -> list[str]:
        paths = [f"{step}/{file_name(budget)}" for step in steps for budget in budgets]
        return [path for path in paths if Path(path).is_file()]

    def measure(self, name: str, configs: list[str], n_ctx: int, n_windows: int) -> None:
        n_ctx = 64 if self.small else n_ctx
        record = measure(
            self.loaded, self.held_out, configs, n_ctx, n_windows, self.backend,
            f"{name}.json", None,
        )  # fmt: skip
        print(perplexity_table(record).text(), flush=True)

    def own_text(self) -> TextSource:
        """Text that the model writes, each sequence from a few tokens of the sample."""
        path = Path("own.txt")
        if not path.is_file():
            path.write_text(self.written(), encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        return TextSource("own", text, hashlib.sha256(text.encode()).hexdigest())

    def written(self, prompt: int = 8, seed: int = 0) -> str:
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        n_sequences, length = (2, 80) if self.small else (20, 512)
        sample = tokenizer.encode(load_text("sample").text, add_special_tokens=False)
        starts = range(0, len(sample) - prompt, len(sample) // n_sequences)
        tokens = mx.array([sample[i : i + prompt] for i in starts][:n_sequences])
        caches = make_prompt_cache(model)
        mx.random.seed(seed)
        parts, step = [tokens], tokens
        for _ in range(length - prompt):
            logits = model(step, cache=caches)[:, -1].astype(mx.float32)
            step = mx.random.categorical(logits)[:, None]
            mx.async_eval(step)
            parts.append(step)
        rows = mx.concatenate(parts, axis=1).tolist()
        return "\n\n".join(tokenizer.decode(row) for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    names = given.steps.split(",")
    if unknown := [n for n in names if n not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}: accepted are {', '.join(STEPS)}")
    faulthandler.enable()
    steps, failed = Steps(given), False
    for name in names:
        started = time.perf_counter()
        try:
            getattr(steps, name)()
        except Exception:  # the other steps may still work
            traceback.print_exc()
            failed = True
        print(f"[{name}: {time.perf_counter() - started:.1f} s]\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
