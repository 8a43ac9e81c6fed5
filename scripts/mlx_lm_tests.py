"""Run mlx-lm's own tests of prompt caches, generation and the server with packed caches attached.

    python scripts/mlx_lm_tests.py [--plain] [FOLDER]

Takes the tests from the source distribution of the installed mlx-lm (FOLDER, if it is unpacked
already, else downloaded). Their model is on a hub, so this package's default model replaces it,
with the default setting attached again before every test; --plain attaches nothing. Every test that
may fail is listed below with the reason. Exits with 1 if another one fails, or if no tokens were
protected.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_turbokv  # noqa: F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import mlx_lm
import mlx_lm.utils
import pytest

from mlx_turbokv import attach
from mlx_turbokv.loading import models
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION

FILES = ("test_prompt_cache.py", "test_generate.py", "test_server.py")
STAND_IN = "is written for the tokenizer or the weights of the model that is replaced here"
NO_HUB = "reads the hub's cache folder"
ROUNDING = (
    "compares log probabilities of a batch with those of single sequences to 1e-4 or closer; a "
    "quantised code that rounding turns moves them by more"
)
PIECES = (
    "compares the same where a batch reads prompts 8 tokens at a time and a single sequence reads "
    "them at once; beside protected tokens a piece of more than 8 is attended as the model made it"
)
OWN_CLASS = "asks for a cache of mlx-lm's own class"
OWN_FACTORY = (
    "gives max_kv_size to a model that makes its caches itself, which mlx-lm does not pass on; it "
    "fails with mlx-lm's own caches too"
)
NO_CONVERSION = "wants mlx-lm's own quantised cache, and packed caches are quantised already"
PENALTY = (
    "repeats a request with a repetition penalty; mlx-lm's penalty does not see tokens that come "
    "from the prompt cache, so that with its own caches too only some seeds repeat"
)
EXPLAINED = {
    "test_batch_generate_function_with_logits_processors": STAND_IN,
    "test_generate_with_logit_bias": STAND_IN,
    "test_stream_generate_input_embeddings": STAND_IN,
    "test_stream_generate_input_embeddings_prefill": STAND_IN,
    "test_handle_models": NO_HUB,
    "test_many_batches": PIECES,
    "test_batch_matches_single": ROUNDING,
    "test_batch_continued_generation": PIECES,
    "test_batch_max_kv_size_creates_rotating_cache": OWN_FACTORY,
    "test_batch_max_kv_size_none_creates_regular_cache": OWN_CLASS,
    "test_cache_to_quantized": NO_CONVERSION,
    "test_completion_quantizes_the_cache": NO_CONVERSION,
    "test_handle_completions": PENALTY,
}


class Attached:
    """A pytest plugin: replaces mlx-lm's loader and keeps packed caches attached."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.loaded: dict[str, models.Loaded] = {}
        self.failed: list[str] = []
        self.n_passed = 0

    def load(self, path: str, *_: Any, return_config: bool = False, **__: Any) -> tuple:
        """What mlx_lm.load does, for the default model."""
        if path not in self.loaded:
            self.loaded[path] = models.load()
        found = self.loaded[path]
        self._attach()
        return (found.model, found.tokenizer, found.config)[: 3 if return_config else 2]

    def _attach(self) -> None:
        if not self.plain:
            for found in self.loaded.values():
                attach(found.model)
                protected = {getattr(c, "protection", None) for c in found.model.make_cache()}
                if DEFAULT_PROTECTION not in protected:
                    sys.exit("No tokens are protected in the caches of these tests.")

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Some tests delete the model's cache factory when they end."""
        self._attach()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what failed."""
        if report.failed:
            self.failed.append(report.nodeid.split("::")[-1])
        elif report.when == "call" and report.passed:
            self.n_passed += 1


def source_tests(folder: Path) -> Path:
    """The tests folder of the installed mlx-lm's source distribution."""
    wanted = version("mlx-lm")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    subprocess.run([*command, "mlx-lm", f"mlx-lm=={wanted}", "-d", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(folder.glob("*/tests"))


def run(tests: Path, plain: bool) -> int:
    """Run the tests and print what failed and why; 1 for a failure that is not explained."""
    plugin = Attached(plain)
    mlx_lm.utils.load = mlx_lm.load = plugin.load
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={tests}"]
    pytest.main([*options, *(str(tests / name) for name in FILES)], plugins=[plugin])
    print(f"\n{plugin.n_passed} passed, {len(plugin.failed)} failed:")
    for name in plugin.failed:
        print(f"- {name}: {EXPLAINED.get(name, 'NOT EXPLAINED')}")
    unexplained = [name for name in plugin.failed if name not in EXPLAINED]
    return 1 if unexplained or plugin.n_passed == 0 else 0


def main() -> None:
    """Read the options, find the tests and run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="an unpacked source distribution")
    parser.add_argument("--plain", action="store_true", help="attach no packed caches")
    options = parser.parse_args()
    if options.folder is not None:
        sys.exit(run(options.folder / "tests", options.plain))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(source_tests(Path(folder)), options.plain))


if __name__ == "__main__":
    main()
