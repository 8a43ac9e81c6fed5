"""Which models a server lists and loads, and the options that are checked at its start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner
from gguf_files import write_small_gguf
from model_folder import write_model_folder
from server_process import SERVE, ask, running

from mlx_turbokv import load_policy
from mlx_turbokv.cli.serve import command
from mlx_turbokv.errors import InputError
from mlx_turbokv.serve.models import TurboModelProvider
from mlx_turbokv.serve.options import parse

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "the cat the th a big " * 4
GENERATE = ["python", "-c", "from mlx_turbokv.cli.generate import main; main()"]


def completion(model: str | None = None, **fields) -> dict:
    named = {} if model is None else {"model": model}
    return {"prompt": PROMPT, "max_tokens": 10, **named, **fields}


def text(address: str, model: str | None = None, **fields) -> str:
    status, answer = ask(address, TEXT, completion(model, **fields))
    assert status == 200, answer
    return answer["choices"][0]["text"]


def refused(address: str, status: int, model: str | None = None, **fields) -> dict:
    found, answer = ask(address, TEXT, completion(model, **fields))
    assert found == status, answer
    return answer["error"]


def put_in_hub_cache(hub: Path, name: str, folder: Path, without: str = "") -> None:
    """A model as huggingface_hub keeps it, one file left out."""
    repo = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    if without:
        (repo / "snapshots" / ("a" * 40) / without).unlink()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("own", "second", "broken", "unlisted", "truncated"):
        write_model_folder(root / name, "llama", **({"seed": 1} if name == "second" else {}))
    (root / "broken" / "config.json").write_text("{")
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[tuple]:
    """A server whose hub cache does not exist yet."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_CACHE", str(root / "hub"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--model", str(root / "own"), "--max-tokens", "10"]
    for name in ("second", "broken", "truncated"):
        options += ["--allow-model", str(root / name)]
    with running(*options) as started:
        yield started
    patch.undo()


def test_what_is_printed_is_listed_and_accepted(server, root: Path) -> None:
    process, address = server
    (printed,) = [line for line in process.said if line.startswith("Serving ")]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    names = [model.id for model in client.models.list()]
    assert printed.startswith(f"Serving {names[0]}: ")
    assert names == ["own", "second", "broken", "truncated"]
    assert client.models.retrieve("own").id == "own"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("unlisted")
    expected = text(address)
    for name in ("own", "default_model", str(root / "own")):
        assert text(address, name) == expected
    assert client.completions.create(**completion("own")).choices[0].text == expected


def test_no_other_local_file_is_loaded(server, root: Path) -> None:
    process, address = server
    expected, n_loaded = text(address), len(process.said)
    small = str(write_small_gguf(root))
    names = str(root / "unlisted"), small, "unlisted", "..", "/etc/passwd", "a/b/c", "~", "x" * 300
    for name in names:
        for field in ("model", "draft_model", "adapters"):
            error = refused(address, 404, **{field: name})
            assert error["code"] == "model_not_found"
            assert error["param"] == ("adapters" if field == "adapters" else "model")
    assert text(address) == expected
    assert not any("Serving" in line for line in process.said[n_loaded:])


def test_an_allowed_model_is_loaded_and_one_that_is_damaged_leaves_the_good_one(server) -> None:
    process, address = server
    expected = text(address)
    assert text(address, "second") != expected == text(address, "own")
    assert "Serving second:" in "".join(process.said)
    for name in ("broken", "truncated"):
        error = refused(address, 404, name)
        assert name in error["message"] and error["code"] == "model_not_found"
        n_loaded = sum(line.startswith("Serving") for line in process.said)
        assert text(address) == expected
        assert sum(line.startswith("Serving") for line in process.said) == n_loaded


def test_what_the_hub_cache_has_is_served_and_nothing_is_fetched(server, root: Path) -> None:
    _, address = server
    expected = text(address)
    assert refused(address, 404, "org/tiny")
    put_in_hub_cache(root / "hub", "org/tiny", root / "own")
    put_in_hub_cache(root / "hub", "org/half", root / "own", without="model.safetensors")
    listed = [model["id"] for model in ask(address, "/v1/models")[1]["data"]]
    assert listed == ["own", "second", "broken", "truncated", "org/tiny"]
    assert text(address, "org/tiny") == expected
    refused(address, 404, "org/half")
    assert text(address) == expected


def start(*options: str) -> str:
    """What a server that does not start says."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*SERVE, "--port", "0", *options], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    return error


def test_an_occupied_port_is_found_before_the_model_is_loaded(server, root: Path) -> None:
    port = server[1].rpartition(":")[2]
    error = start("--model", "/nowhere/at/all", "--port", port)
    assert port in error and "cannot be listened on" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-model", "/nowhere"], "/nowhere"),
        (["--allow-model", "a b"], "'a b'"),
        (["--kv-group-size", "64"], "--kv-group-size 64"),
        (["--quantized-kv-start", "1"], "--quantized-kv-start 1"),
        (["--max-kv-size", "3"], "3"),
        (["--max-kv-size", "9", "--keys", "x"], "--keys has no effect with --max-kv-size"),
    ],
)
def test_options_that_are_not_accepted(options: list[str], words: str) -> None:
    ended = CliRunner().invoke(command, ["--model", "/nowhere", "--port", "0", *options])
    assert words in str(ended.exception) + ended.output


def test_help_lists_only_what_is_accepted() -> None:
    listed = re.findall(r"^ +(--?[a-z-]+)", CliRunner().invoke(command, ["--help"]).output, re.M)
    assert not {"--kv-bits", "--kv-group-size", "--quantized-kv-start"} & set(listed)
    assert {"--allow-model", "--max-kv-size", "--prompt-cache-bytes"} <= set(listed)


def test_max_kv_size_gives_what_generate_gives(root: Path) -> None:
    options = ["--model", str(root / "own"), "--max-kv-size", "24"]
    run = [*SERVE[:1], *GENERATE[1:], *options, "-p", PROMPT, "-m", "20", "--ignore-chat-template"]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    with running(*options) as (_, address):
        found = {text(address, max_tokens=20, seed=seed) for seed in (None, 1)}
    (found,) = found
    assert found.removeprefix(" ") == printed.split("=" * 10 + "\n")[1].removesuffix("\n")


@pytest.fixture(scope="module")
def draft(root: Path) -> str:
    return str(write_model_folder(root / "draft", "llama", seed=1))


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("qwen3_5", [], "cannot decode speculatively"),
        ("lfm2", [], "cannot decode speculatively"),
        ("gemma3_text", [], "beyond a window of 16 tokens"),
        ("llama", ["--max-kv-size", "24"], "beyond a window of 24 tokens"),
        ("gemma3_text", ["--compress-sliding", "--num-draft-tokens", "33"], "33 draft tokens"),
    ],
)
def test_speculation_that_would_be_wrong_is_refused_at_the_start(
    tmp_path: Path, draft: str, architecture: str, options: list[str], words: str
) -> None:
    folder = write_model_folder(tmp_path / "model", architecture)
    given = ["--model", str(folder), "--draft-model", draft, *options]
    if architecture == "lfm2":
        assert words in start(*given)
        return
    max_kv_size = 24 if "--max-kv-size" in given else None
    rest = [word for word in given if word not in ("--compress-sliding", "--max-kv-size", "24")]
    provider = TurboModelProvider(
        parse(rest), policy=load_policy("la-v7"), max_kv_size=max_kv_size,
        compress_sliding="--compress-sliding" in given,
    )  # fmt: skip
    with pytest.raises(InputError, match=words):
        provider.load_default()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_speculation_answers_as_without_a_draft_model(
    tmp_path: Path, draft: str, architecture: str
) -> None:
    """A conversation whose turns continue from the prompt cache, past a packed window."""
    folder = write_model_folder(tmp_path / "model", architecture)
    options = ["--model", str(folder), "--compress-sliding", "--policy", "uniform"]
    options += ["-ctk", "f16", "-ctv", "q8_0"]
    answers = []
    for more in ([], ["--draft-model", draft, "--num-draft-tokens", "4"]):
        with running(*options, *more) as (_, address):
            prompt, said = PROMPT, []
            for turn in range(4):
                body = {"prompt": prompt, "max_tokens": 9 + turn}
                _, answer = ask(address, TEXT, body)
                said.append(answer["choices"][0]["text"])
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert turn == 0 or architecture != "llama" or cached > 60
                prompt += said[-1] + " th"
            if more:
                too_many = {"prompt": "a", "num_draft_tokens": 33}
                status, answer = ask(address, TEXT, too_many)
                assert (status == 400) == (architecture == "gemma3_text"), answer
        answers.append(said)
    assert answers[0] == answers[1]
