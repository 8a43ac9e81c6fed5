"""mlx_turbokv run: each command that mlx-lm ships, with packed caches and the text of generate."""

from __future__ import annotations

import ast
import inspect
import io
import json
import math
import re
import subprocess
import sys
import threading
import types
import urllib.request
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.cli
import pytest
from chat_models import write_chat_folder
from command_calls import call, nothing_loads
from gguf_files import write_small_gguf
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_caches
from server_process import free_port, wait_until_ready

from mlx_turbokv import TurboKVCache, make_prompt_cache
from mlx_turbokv.cache.base import PackedCache
from mlx_turbokv.cli.run import COMMANDS, WITHOUT_CACHES, command_of
from mlx_turbokv.loading import models

PAIR = ("-ctk", "turbo4", "-ctv", "turbo3")
# without protected tokens, so that short texts are packed in these formats
FORMATS = (*PAIR, "--sink", "0", "--recent", "0")
PROMPT = "the quick brown fox"
N = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_chat_folder(tmp_path_factory.mktemp("run"), "llama", head_dim=32))


@pytest.fixture(scope="module")
def text(folder) -> str:
    """What the generate command answers."""
    out = call("generate", "--model", folder, "-p", PROMPT, "-m", N, *FORMATS).out
    return out.split("=" * 10 + "\n")[1].removesuffix("\n")


@contextmanager
def packed_only():
    """Nothing is written to mlx-lm's own cache; the packed updates are counted."""
    real, counted = PackedCache.update_and_fetch, []

    def update(self, keys, values):
        if self.n_rows or keys.shape[2] > 1:  # not one token that asks what a model does
            counted.append((type(self).__name__, keys.shape))
        return real(self, keys, values)

    def refuse(self, keys, values):
        raise AssertionError("mlx-lm's own cache was used")

    with mock.patch.object(PackedCache, "update_and_fetch", update):
        with mock.patch.object(KVCache, "update_and_fetch", refuse):
            yield counted


def run(name, *args, formats=FORMATS, stdin=b""):
    """Run a command, which must use packed caches alone."""
    with packed_only() as counted:
        result = call("run", *formats, "--", f"mlx_lm.{name}", *args, stdin=stdin)
    assert result.status == 0, result.err
    assert counted and "(3 x turbo4/turbo3 layers)" in result.err
    assert f"KV cache turbo4/turbo3{'+0,0' * (formats == FORMATS)}" in result.err
    return result, counted


def shipped() -> set[str]:
    """The commands that mlx_lm's own command line knows."""
    tree = ast.parse(inspect.getsource(mlx_lm.cli))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "subcommands":
            return set(ast.literal_eval(node.value))
    raise AssertionError("mlx_lm.cli has no subcommands")


def test_every_command_that_mlx_lm_ships_is_run_or_refused():
    ran, refused = set(COMMANDS), set(WITHOUT_CACHES)
    assert ran | refused == shipped() and not ran & refused
    for name in refused:
        assert f"mlx_lm.{name} makes no KV cache" in call("run", f"mlx_lm.{name}").error()


@pytest.mark.parametrize(
    "words",
    [["mlx_lm.generate"], ["mlx_lm", "generate"], ["python", "-m", "mlx_lm", "generate"],
     ["/usr/bin/python3", "-m", "mlx_lm.generate"], ["/opt/bin/mlx_lm.generate"]],
)  # fmt: skip
def test_the_ways_to_name_a_command(words):
    assert command_of((*words, "--model", "x")) == ("mlx_lm", "generate", ["--model", "x"])
    words = [word.replace("mlx_lm", "mlx_vlm") for word in words]
    assert command_of((*words, "--model", "x")) == ("mlx_vlm", "generate", ["--model", "x"])


@pytest.mark.parametrize("words", [[], ["mlx_lm"], ["generate"], ["ls"], ["mlx_lm.nothing"], [""]])
def test_other_commands_are_refused(words):
    assert "mlx_lm.chat --model ID" in call("run", "--", *words).error()


@pytest.mark.parametrize("words", [["mlx_vlm"], ["mlx_vlm.convert"], ["mlx_vlm", "train"]])
def test_other_commands_of_mlx_vlm_are_refused(words):
    assert "chat, generate or server" in call("run", "--", *words).error()


def test_generate(folder, text):
    result, _ = run("generate", "--model", folder, "--prompt", PROMPT, "-m", N)
    assert result.out.split("=" * 10 + "\n")[1] == text + "\n"
    # the -- may be left out, and a draft model keeps its own cache
    args = ("--model", folder, "--prompt", PROMPT, "-m", N, "--draft-model", folder)
    result = call("run", *FORMATS, "mlx_lm.generate", *args)
    assert result.out.split("=" * 10 + "\n")[1] == text + "\n"
    assert "keeps mlx-lm's own cache" in result.err


def test_generate_with_a_gguf_file(tmp_path):
    model = str(write_small_gguf(tmp_path))
    args = ("--model", model, "-m", N, "--prompt", "the")
    result = call("run", "-ctv", "q8_0", "--", "mlx_lm.generate", *args)
    assert result.status == 0, result.err
    expected = call("generate", "-ctv", "q8_0", *args).out
    assert result.out.split("=" * 10)[1] == expected.split("=" * 10)[1]


def test_max_kv_size_goes_to_the_packed_caches(folder):
    args = ("--model", folder, "--prompt", "the lazy dog " * 9, "-m", N, "--max-kv-size", 32)
    result, counted = run("generate", *args, formats=PAIR)
    assert {name for name, _ in counted} == {"TurboRotatingKVCache"}
    assert "--max-kv-size 32 goes to the packed caches" in result.err
    expected = call("generate", *PAIR, *args).out
    assert result.out.split("=" * 10)[1] == expected.split("=" * 10)[1]
    assert "max_kv_size 3" in call("run", "mlx_lm.chat", "--model", folder, "--max-kv-size", 3).err


@pytest.mark.parametrize("option", ["--sink", "--recent"])
@pytest.mark.parametrize("name", ["generate", "cache_prompt"])
def test_a_window_protects_no_tokens(folder, tmp_path, name, option):
    more = ("--prompt-cache-file", tmp_path / "c") if name == "cache_prompt" else ()
    words = (f"mlx_lm.{name}", "--model", folder, "--prompt", "a", "--max-kv-size", 64, *more)
    said = call("run", option, 32, "--", *words).error()
    assert f"{option} has no effect with --max-kv-size" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kv-bits", "4"], "give -ctk turbo4 -ctv turbo4 instead to mlx_turbokv run"),
        (["--kv-group-size", "32"], "--kv-group-size has no effect"),
        (["--quantized-kv-start", "0"], "--quantized-kv-start has no effect"),
    ],
)
def test_flags_of_mlx_lms_quantised_cache_are_refused(folder, args, said):
    for name in ("generate", "cache_prompt"):
        more = ["--prompt-cache-file", "x.safetensors"] if name == "cache_prompt" else []
        given = ("--model", folder, "--prompt", "a", *args, *more)
        assert said in call("run", "--", f"mlx_lm.{name}", *given).error()


def test_chat(folder, text):
    with mock.patch("builtins.input", side_effect=[PROMPT, "r", PROMPT, "q"]):
        result, _ = run("chat", "--model", folder, "-m", N)
    assert result.out.count(f"\n{text}\n") == 2


def test_cache_prompt_and_generate(folder, tmp_path):
    """What mlx-lm saves is packed; generate goes on with it, mlx_lm.generate through run too."""
    file = tmp_path / "p.safetensors"
    run("cache_prompt", "--model", folder, "--prompt", PROMPT, "--prompt-cache-file", file)
    caches = load_prompt_cache(str(file))
    assert all(type(c) is TurboKVCache and str(c.k_format) == "turbo4" for c in caches)
    args = ("--model", folder, "--prompt", " jumps", "-m", N, "--prompt-cache-file", file)
    with packed_only() as counted:
        theirs = call("run", *FORMATS, "--", "mlx_lm.generate", *args)
    assert counted and theirs.status == 0, theirs.err
    ours = call("generate", *args)
    assert ours.out.split("=" * 10)[1] == theirs.out.split("=" * 10)[1]
    assert "as in p.safetensors (3 x turbo4/turbo3 layers)" in ours.out


@pytest.mark.parametrize("bits", [None, 4])
def test_generate_packs_a_file_that_mlx_lm_made_without_us(folder, tmp_path, bits):
    file = tmp_path / "theirs.safetensors"
    loaded = models.load(folder)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], continue_final_message=True
    )
    caches = mlx_lm_caches(loaded.model)
    mx.eval(loaded.model(mx.array([prompt]), cache=caches))
    if bits:
        caches = [c.to_quantized(32, bits) for c in caches]
    save_prompt_cache(str(file), caches, {"model": folder, "tokenizer_config": "{}"})
    args = ("--prompt", " jumps", "-m", N, "--prompt-cache-file", file)
    result = call("run", *FORMATS, "--", "mlx_lm.generate", *args)  # the file names the model
    assert result.status == 0 and f"{len(prompt)} tokens are packed in 3 layers" in result.err
    ours = call("generate", "--model", folder, *FORMATS, *args)
    assert ours.out.split("=" * 10)[1] == result.out.split("=" * 10)[1]


def test_generate_goes_on_with_a_file_of_ours(folder, tmp_path):
    file = tmp_path / "ours.safetensors"
    common = ("--model", folder, "-m", N, "--prompt-cache-file", file)
    assert call("generate", *common, *FORMATS, "-p", PROMPT).status == 0
    with packed_only() as counted:
        result = call("run", "--", "mlx_lm.generate", *common, "--prompt", "why")
    assert result.status == 0 and counted, result.err
    other = write_chat_folder(tmp_path / "other", "llama", head_dim=16)
    more = ("--model", other, "-m", N, "--prompt-cache-file", file, "--prompt", "a")
    assert "does not fit" in call("run", "--", "mlx_lm.generate", *more).error()
    file.write_bytes(b"nothing")
    assert str(file) in call("run", "--", "mlx_lm.generate", *more).error()


@pytest.mark.parametrize("batch", [1, 3])
def test_benchmark(folder, batch):
    result, counted = run("benchmark", "--model", folder, "-p", 40, "-g", 3, "-n", 1, "-b", batch)
    assert "Averages: prompt_tps=" in result.out
    assert max(shape[0] for _, shape in counted) == batch


DATA = [[(5 * i * i + 3 * i + 7 * row) % 90 + 2 for i in range(24)] for row in range(6)]


def packed_caches(loaded):
    """What a command gives a model."""
    options = {"centre": "auto", "tokenizer": loaded.tokenizer, "sink": 0, "recent": 0}
    return make_prompt_cache(loaded.model, "turbo4", "turbo3", **options)


def expected_loss(folder) -> float:
    """Mean negative log likelihood of DATA through packed caches, a new one for each batch."""
    loaded, losses = models.load(folder), []
    model = loaded.model
    for at in range(0, len(DATA), 4):
        rows = mx.array(DATA[at : at + 4])
        logits = model(rows[:, :-1], cache=packed_caches(loaded))
        losses.append(nn.losses.cross_entropy(logits, rows[:, 1:], reduction="none").flatten())
    return mx.concatenate(losses).mean().item()


def test_perplexity_reads_packed_caches(folder, monkeypatch):
    monkeypatch.setattr("mlx_lm.perplexity.load_data", lambda *a, **k: mx.array(DATA))
    result, counted = run("perplexity", "--model", folder, "--batch-size", 4)
    found = float(re.search(r"Perplexity: ([\d.]+)", result.out).group(1))
    assert found == pytest.approx(math.exp(expected_loss(folder)), rel=1e-4)
    assert len(counted) == 2 * 3  # batches, layers
    own = models.load(folder).model
    plain = nn.losses.cross_entropy(own(mx.array(DATA)[:, :-1]), mx.array(DATA)[:, 1:]).mean()
    assert abs(found - math.exp(plain.item())) > 1e-3  # packing is seen


def test_tokens_of_evaluations_do_not_see_each_other_as_they_were_made(folder, monkeypatch):
    """With protected tokens a whole text in one call is read in steps of 32."""
    data = mx.array([[(5 * i * i + 3 * i) % 90 + 2 for i in range(300)]])
    monkeypatch.setattr("mlx_lm.perplexity.load_data", lambda *a, **k: data)
    formats = ("-ctk", "turbo2", "-ctv", "turbo2", "--recent", "32", "--no-calibrate")
    with packed_only() as counted:
        result = call("run", *formats, "--", "mlx_lm.perplexity", "--model", folder)
    found = float(re.search(r"Perplexity: ([\d.]+)", result.out).group(1))
    assert [shape[2] for _, shape in counted[::3]] == [32] * 9 + [11]
    model, losses = models.load(folder).model, []
    held = make_prompt_cache(model, "turbo2", "turbo2", recent=32)
    for start in range(0, 299, 32):
        stop = min(start + 32, 299)
        logits = model(data[:, start:stop], cache=held)
        target = data[:, start + 1 : stop + 1]
        losses.append(nn.losses.cross_entropy(logits, target, reduction="none").flatten())
    expected = math.exp(mx.concatenate(losses).mean().item())
    assert found == pytest.approx(expected, rel=1e-4)
    whole = model(data[:, :-1])
    plain = nn.losses.cross_entropy(whole, data[:, 1:]).mean()
    assert abs(found - math.exp(plain.item())) > 1e-3


def lora_data(folder, tmp_path):
    letters = models.load(folder).tokenizer
    for name in ("train", "valid", "test"):
        lines = [json.dumps({"text": letters.decode(row)}) for row in DATA]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return ("--model", folder, "--data", tmp_path, "--batch-size", 2)


def test_evaluation_of_lora_reads_packed_caches(folder, tmp_path):
    args = lora_data(folder, tmp_path)
    result, counted = run("lora", *args, "--test", "--adapter-path", "")
    assert "Test loss" in result.out and len(counted) == 3 * 3
    exact = call("run", "-ctk", "f16", "-ctv", "f16", "--", "mlx_lm.lora", *args, "--test",
                 "--adapter-path", "")  # fmt: skip
    loss = [float(re.search(r"Test loss ([\d.]+)", x.out).group(1)) for x in (result, exact)]
    assert loss[0] == pytest.approx(loss[1], rel=0.2) and loss[0] != loss[1]


def test_training_is_not_packed_and_its_evaluation_is(folder, tmp_path):
    args = ("--train", "--iters", 2, "--num-layers", 1, "--val-batches", 1, "--steps-per-eval", 2)
    result, counted = run(
        "lora", *lora_data(folder, tmp_path), *args, "--adapter-path", tmp_path / "adapters"
    )
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()
    assert len(counted) == 2 * 3  # two evaluations of one batch


class FakeHarness:
    """lm_eval as mlx_lm.evaluate uses it: it asks the model for likelihoods and for texts."""

    def __init__(self, requests, untils) -> None:
        self.requests, self.untils, self.found = requests, untils, {}

    def modules(self) -> dict[str, types.ModuleType]:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
        found = {name: types.ModuleType(name) for name in names}
        found["lm_eval.api.model"].LM = type("LM", (), {})
        found["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
        found["lm_eval"].simple_evaluate = self.evaluate
        return found

    def evaluate(self, model, **_: object) -> dict:
        request = lambda args: types.SimpleNamespace(args=args)  # noqa: E731
        self.found["likelihoods"] = model.loglikelihood([request(r) for r in self.requests])
        self.found["texts"] = model.generate_until([request(r) for r in self.untils])
        return {"results": {"a task": {"acc": 1.0}}}


def test_evaluate(folder, text, tmp_path, monkeypatch):
    loaded = models.load(folder)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    requests = [(prompt, " jumps over"), (prompt, " sleeps"), ("the dog", " barks")]
    harness = FakeHarness(requests, [(prompt, {"until": ["\0"], "max_gen_toks": N})])
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    with mock.patch.dict(sys.modules, harness.modules()):
        with mock.patch("importlib.metadata.version", lambda name: "0"):
            result, _ = run("evaluate", "--model", folder, "--tasks", "a", "--output-dir", tmp_path)
    sys.modules.pop("mlx_lm.evaluate", None)
    assert harness.found["texts"] == [text] and '"acc": 1.0' in result.out
    for (before, after), (found, _) in zip(requests, harness.found["likelihoods"]):
        encode = loaded.tokenizer.encode
        tokens = encode(before + after, add_special_tokens=False)
        n = len(encode(before, add_special_tokens=False))
        cache = packed_caches(loaded)
        logits = loaded.model(mx.array([tokens[:-1]]), cache=cache)
        losses = nn.losses.cross_entropy(logits[0], mx.array(tokens[1:]), reduction="none")
        assert found == pytest.approx(-losses[n - 1 :].sum().item(), abs=1e-3)


def test_evaluate_without_lm_eval_says_what_to_install(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    with mock.patch.dict(sys.modules, {"lm_eval": None}):
        result = call("run", "--", "mlx_lm.evaluate", "--model", folder, "--tasks", "a")
    assert "pip install lm-eval" in result.error()


def test_a_task_in_another_folder_is_refused_before_it_is_evaluated(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    with mock.patch.dict(sys.modules, FakeHarness([], []).modules()):
        with mock.patch("importlib.metadata.version", lambda name: "0"), nothing_loads():
            args = ("--model", folder, "--tasks", "tasks/mine.yaml")
            result = call("run", "--", "mlx_lm.evaluate", *args)
    sys.modules.pop("mlx_lm.evaluate", None)
    assert "with --tasks mine.yaml" in result.error()


@pytest.mark.slow
def test_server_is_serve(folder, text):
    """A process of its own, asked over HTTP."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_turbokv.run", *FORMATS, "--", "mlx_lm.server", "--model",
               folder, "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = io.StringIO()
    threading.Thread(target=lambda: said.writelines(process.stderr), daemon=True).start()
    try:
        wait_until_ready(process, port)
        body = {"model": "default_model", "max_tokens": N, "temperature": 0,
                "messages": [{"role": "user", "content": PROMPT}]}  # fmt: skip
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=120) as answer:
            found = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        process.terminate()
        process.wait(60)
    assert found == text and "KV cache turbo4/turbo3+0,0" in said.getvalue()


def test_a_missing_back_end_and_bad_formats_are_said_before_anything_is_loaded():
    words = ("--", "mlx_lm.generate", "--model", "x")
    with nothing_loads():
        assert "not available" in call("run", "--backend", "metal", *words).error()
        assert "nearest is turbo4" in call("run", "-ctk", "q4_0", *words).error()


def test_models_that_cannot_be_loaded_are_one_sentence(tmp_path):
    for model in ("/absent/model.gguf", str(tmp_path)):
        said = call("run", "--", "mlx_lm.generate", "--model", model).error()
        assert model in said
