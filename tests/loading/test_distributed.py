"""Two processes, one model: packed caches under tensor and pipeline parallelism."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
from distributed_run import N_TOKENS, run
from two_ranks import ENVIRONMENT, LAUNCH, SECONDS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "distributed_run.py"
TENSOR = ["tensor", "tensor-late"]
PIPELINE = ["pipeline", "pipeline-late"]
WINDOWED, HYBRID = "ministral3", "qwen3_next"
PACED = ["tensor-paced", "pipeline-paced", "pipeline-late-paced"]
SLIDING = ["tensor-sliding", "pipeline-sliding", "pipeline-sliding-late"]

alone = cache(run)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """What both ranks saw of an architecture split in a way; all ways in one launch."""
    names = [f"llama:{how}" for how in TENSOR]
    names += [f"{name}:{how}" for name in (WINDOWED, HYBRID) for how in PIPELINE]
    names += [f"{WINDOWED}:{how}" for how in (*SLIDING, *PACED)]
    folder = tmp_path_factory.mktemp("ranks")
    command = [*LAUNCH, str(SCRIPT), str(folder), *names]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=ENVIRONMENT
    )
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2, ended.stdout + ended.stderr
    found = [json.loads(file.read_text()) for file in files]
    return lambda architecture, how: [rank[f"{architecture}:{how}"] for rank in found]


@pytest.mark.parametrize("how", TENSOR)
def test_tensor_parallel_gives_the_tokens_of_one_process(how: str, ranks) -> None:
    one = alone("llama", "alone")
    assert len(one["tokens"]) == N_TOKENS
    for rank in ranks("llama", how):
        assert rank["tokens"] == one["tokens"]
        assert rank["formats"] == one["formats"]
        assert [2 * n for n in rank["heads"]] == one["heads"]
        assert rank["protected"] == one["protected"] == ["0,0", *["32,128"] * 4, "0,0"]


@pytest.mark.parametrize("architecture", [WINDOWED, HYBRID])
@pytest.mark.parametrize("how", PIPELINE)
def test_pipeline_counts_kv_layers_over_the_whole_model(architecture: str, how: str, ranks) -> None:
    """The last rank holds the first layers; a boundary is the model's, not a rank's."""
    one, (first, last) = alone(architecture, "alone"), ranks(architecture, how)
    assert len(set(one["formats"]) - {"none"}) == 2
    assert first["tokens"] == last["tokens"] == one["tokens"]
    assert last["formats"] + first["formats"] == one["formats"]
    assert first["formats"] and last["formats"]
    assert last["protected"] + first["protected"] == one["protected"]
    assert one["protected"].count("32,128") == one["formats"].count("q8_0/turbo6")


@pytest.mark.parametrize("how", SLIDING)
def test_windows_are_packed_on_every_rank(how: str, ranks) -> None:
    one, (first, last) = alone(WINDOWED, "alone-sliding"), ranks(WINDOWED, how)
    assert one["formats"] == ["q8_0/q8_0", *["q8_0/turbo6"] * 4, "q8_0/q8_0"]
    assert first["tokens"] == last["tokens"] == one["tokens"]
    if how.startswith("tensor"):
        assert first["formats"] == last["formats"] == one["formats"]
    else:
        assert last["formats"] + first["formats"] == one["formats"]


@pytest.mark.parametrize("how", PACED)
def test_ranks_wait_for_their_own_layers_alone(how: str, ranks) -> None:
    one = alone(WINDOWED, "alone-paced")
    assert [rank["tokens"] for rank in ranks(WINDOWED, how)] == [one["tokens"]] * 2
