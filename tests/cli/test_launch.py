"""The commands under ``mlx.launch``: two processes on this machine, ring back-end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from model_folder import write_model_folder
from server_process import free_port, wait_until_ready
from two_ranks import ENVIRONMENT, LAUNCH, SECONDS

from mlx_turbokv import InputError
from mlx_turbokv.loading import distributed

pytestmark = pytest.mark.slow

CACHE = ["-ctk", "q8_0", "-ctv", "q8_0", "--compress-sliding"]
PROMPT = "how do zebras sleep?"  # 20 tokens, past the window of 16
N_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full and sliding layers, which mlx-lm splits in both ways."""
    return write_model_folder(tmp_path_factory.mktemp("launch") / "tiny", "ministral3")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory):
    """A file that runs a command, as the console scripts do."""

    def script(name: str) -> str:
        path = tmp_path_factory.mktemp("scripts") / f"{name}.py"
        path.write_text(f"from mlx_turbokv.cli.{name} import main\nmain()\n")
        return str(path)

    return script


def generate(command: list[str], folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [*command, "--model", str(folder), "-p", PROMPT, "-m", str(N_TOKENS), *CACHE]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=SECONDS, env=ENVIRONMENT
    )


def answer(ended: subprocess.CompletedProcess) -> str:
    parts = ended.stdout.split("==========\n")
    assert len(parts) == 3, ended.stdout + ended.stderr  # printed once, by the first process
    return parts[1]


@pytest.fixture(scope="module")
def alone(folder: Path, script) -> str:
    text = answer(generate([sys.executable, script("generate")], folder))
    assert len(set(text)) > 8
    return text


@pytest.mark.parametrize("options", [[], ["--pipeline"]])
def test_generate_prints_the_text_of_one_process_once(options, folder, script, alone) -> None:
    ended = generate([*LAUNCH, script("generate")], folder, *options)
    assert answer(ended) == alone
    assert "KV cache: 32 tokens" in ended.stdout


@pytest.mark.parametrize("options", [[], ["--pipeline"]])
def test_keys_of_a_split_model_are_not_measured(options, folder, script) -> None:
    ended = generate([*LAUNCH, script("generate")], folder, "-ctk", "turbo4", *options)
    assert "keys not centred" in ended.stdout and "Measuring" not in ended.stderr
    assert ended.stderr.count("are not measured: 2 processes run") == 1


def test_sampling_draws_the_same_tokens_on_both(folder: Path, script) -> None:
    """If they drew different ones, the sums of their parts would be nonsense, or end unevenly."""
    command = [*LAUNCH, script("generate")]
    texts = [answer(generate(command, folder, "--temp", "1", "--seed", "5")) for _ in range(2)]
    assert texts[0] == texts[1]


def test_what_cannot_be_split_is_one_sentence(folder: Path, script) -> None:
    ended = generate([*LAUNCH, script("generate")], folder, "--draft-model", str(folder))
    assert "Error: --draft-model cannot be used over several machines." in ended.stderr
    assert "Traceback (most recent" not in ended.stderr.split("Error: ")[0]
    with pytest.raises(InputError, match="The default model cannot be split"):
        distributed.check_source(None)
    with pytest.raises(InputError, match="a.gguf cannot be split"):
        distributed.check_source("a.gguf")


def test_serve_answers_from_the_first_process(folder: Path, script, alone) -> None:
    port = free_port()
    command = [*LAUNCH, script("serve"), "--model", str(folder), "--port", str(port), *CACHE]
    # An open standard input, as a terminal's: at the end of one mlx.launch hands on nothing without
    # a pause, and a Ctrl-C that meets it inside its queue leaves that locked for good.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until_ready(process, port)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        options = {"model": "default_model", "prompt": PROMPT, "max_tokens": N_TOKENS}
        texts = [client.completions.create(**options).choices[0].text for _ in range(2)]
        parts = client.completions.create(**options, stream=True)
        texts.append("".join(part.choices[0].text for part in parts))
        assert texts == [alone.removesuffix("\n")] * 3
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, as a terminal sends it
        said, _ = process.communicate(timeout=60)  # which all processes have ended to close
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes that this test started
        process.wait()
    assert said.count(f"Serving {folder}") == 1
