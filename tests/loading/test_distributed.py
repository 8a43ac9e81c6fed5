"""Two processes, one model: packed caches under tensor and pipeline parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_run import N_TOKENS, run

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "distributed_run.py"
LAUNCH = Path(sys.executable).parent / "mlx.launch"


def launch(architecture: str, how: str, folder: Path) -> list[dict]:
    """What both ranks saw."""
    port = 20_000 + os.getpid() % 20_000  # mlx.launch's default serves one run on a machine
    command = [sys.executable, str(LAUNCH), "-n", "2", "--backend", "ring"]
    command += ["--starting-port", str(port), "--python", sys.executable]
    command += [str(SCRIPT), architecture, how, str(folder)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2, ended.stdout + ended.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("how", ["tensor", "tensor-late"])
def test_tensor_parallel_gives_the_tokens_of_one_process(how: str, tmp_path: Path) -> None:
    alone, ranks = run("llama", "alone"), launch("llama", how, tmp_path)
    assert len(alone["tokens"]) == N_TOKENS
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["formats"] == alone["formats"]
        assert [2 * n for n in rank["heads"]] == alone["heads"]


@pytest.mark.parametrize("architecture", ["ministral3", "qwen3_next"])
@pytest.mark.parametrize("how", ["pipeline", "pipeline-late"])
def test_pipeline_counts_kv_layers_over_the_whole_model(
    architecture: str, how: str, tmp_path: Path
) -> None:
    """The last rank holds the first layers; a boundary is the model's, not a rank's."""
    alone, ranks = run(architecture, "alone"), launch(architecture, how, tmp_path)
    assert len(set(alone["formats"]) - {"none"}) == 2
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
    assert ranks[1]["formats"] + ranks[0]["formats"] == alone["formats"]
    assert ranks[0]["formats"] and ranks[1]["formats"]


@pytest.mark.parametrize("how", ["tensor-sliding", "pipeline-sliding", "pipeline-sliding-late"])
def test_windows_are_packed_on_every_rank(how: str, tmp_path: Path) -> None:
    alone, ranks = run("ministral3", "alone-sliding"), launch("ministral3", how, tmp_path)
    assert alone["formats"] == ["q8_0/q8_0", *["q8_0/turbo6"] * 4, "q8_0/q8_0"]
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
    if how.startswith("tensor"):
        assert {tuple(rank["formats"]) for rank in ranks} == {tuple(alone["formats"])}
    else:
        assert ranks[1]["formats"] + ranks[0]["formats"] == alone["formats"]
