"""mlx_turbokv run: mlx-vlm's commands with packed caches."""

from __future__ import annotations

import json
import sys
from unittest import mock

import pytest
from chat_models import write_chat_folder
from command_calls import call
from server_process import ask, running

from mlx_turbokv.cache.base import PackedCache

FORMATS = ("-ctk", "turbo4", "-ctv", "turbo3")
PROMPT = "the quick brown fox jumps over the lazy dog"
N = 8
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A folder that mlx-lm and mlx-vlm load: lfm2, with KV layers and recurrent ones."""
    path = write_chat_folder(tmp_path_factory.mktemp("run"), "lfm2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return str(path)


def test_without_mlx_vlm_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    result = call("run", "--", "mlx_vlm.generate", "--model", "x")
    assert "pip install mlx-vlm" in result.error()


class TestWithMlxVlm:
    """What needs mlx-vlm."""

    @pytest.fixture(autouse=True)
    def _needs_mlx_vlm(self) -> None:
        pytest.importorskip("mlx_vlm", reason="the extra vlm is not installed")

    def generate(self, folder: str, *options: str, formats: tuple[str, ...] = FORMATS):
        args = ("--model", folder, "--prompt", PROMPT, "--max-tokens", N, "--temperature", 0)
        return call("run", *formats, "--", "mlx_vlm.generate", *args, *options)

    def test_generate_uses_packed_caches_alone(self, folder) -> None:
        from mlx_vlm.models.cache import KVCache

        def refuse(self, keys, values):
            raise AssertionError("mlx-vlm's own cache was used")

        real, updates = PackedCache.update_and_fetch, []

        def update(self, keys, values):
            updates.append(keys.shape[2])
            return real(self, keys, values)

        with mock.patch.object(PackedCache, "update_and_fetch", update):
            with mock.patch.object(KVCache, "update_and_fetch", refuse):
                result = self.generate(folder)
        assert result.status == 0, result.err
        assert "KV cache turbo4/turbo3 (3 x turbo4/turbo3 layers)" in result.err
        assert max(updates) > len("the quick") and updates.count(1) >= 3 * (N - 1)

    def test_a_model_that_is_not_there_is_said_in_a_sentence(self) -> None:
        error = self.generate("/no/such/model").error()
        assert error == "There is no model at /no/such/model; give a hub id or a folder."

    def test_q8_0_generates_the_text_of_mlx_vlm(self, folder) -> None:
        own = self.generate(folder, formats=("-ctk", "f16", "-ctv", "f16")).out
        assert self.generate(folder, formats=("-ctk", "q8_0", "-ctv", "q8_0")).out == own
        assert own.strip()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--kv-bits", "4"), "-ctk turbo4"),
            (("--kv-quant-scheme", "turboquant"), "--kv-quant-scheme has no effect"),
            (("--draft-model", "x"), "--draft-model is not accepted"),
        ],
    )
    def test_options_of_its_own_caches_are_refused(self, folder, options, said) -> None:
        assert said in self.generate(folder, *options).error()

    def test_prefixes_on_disk_are_refused(self, folder, monkeypatch) -> None:
        monkeypatch.setenv("APC_DISK_ENABLED", "1")
        assert "mlx-vlm stores no packed caches on disk" in self.generate(folder).error()

    @pytest.mark.slow
    def test_the_server_keeps_packed_prefixes(self, folder, monkeypatch) -> None:
        monkeypatch.setenv("APC_ENABLED", "1")
        command = [sys.executable, "-m", "mlx_turbokv.run", *FORMATS, "--", "mlx_vlm.server"]
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": folder, "messages": messages, "max_tokens": N, "temperature": 0}
        with running("--model", folder, command=command) as (process, address):
            path = "/v1/chat/completions"
            answers = [ask(address, path, body, **JSON) for _ in range(2)]
        assert any("3 x turbo4/turbo3" in line for line in process.said)
        assert any("keeps packed caches in memory" in line for line in process.said)
        texts, cached = [], []
        for status, answer in answers:
            assert status == 200
            texts.append(answer["choices"][0]["message"]["content"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert texts[0] == texts[1] and cached[0] == 0 < cached[1]
