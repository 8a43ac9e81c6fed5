"""Options of every command: odd values and senseless pairs are one sentence, before any work."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import mlx.core as mx
import pytest
from command_calls import COMMANDS, call, command_of, nothing_loads, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ODD_NUMBERS = (
    "nan", "-nan", "inf", "-inf", "-1", "0", "-0", "1e300", "-1e300", "1e-300", "1e999", "0x10",
    "1_000", "", " ", "3", "2.5", str(2**31), str(2**63), str(2**64), str(-(2**64)), "9" * 5000,
)  # fmt: skip
ODD_TEXTS = (
    "", " ", ".", "/", "/absent/folder/file", "/dev/null/x", "x" * 5000, "é", "\U0001f600", "a/b",
    "a:b", "mlx-kv5:64", "mlx-kv8:", "foo:64", "a/b/c", "@", "turbo3/", "/turbo3", ":", ",", "2,2",
    "boundary:", "boundary:99999999999999999999,1", "last:" + "9" * 5000, "[" * 100_000, "{}",
    "\udcff", "None", "mode-" + "9" * 5000, "--", "q8_0/turbo3@la-v7", "²",
)  # fmt: skip


def _options(name: str) -> list[tuple[str, bool]]:
    command = command_of(name)
    found = []
    for param in command.get_params(click.Context(command)):
        if isinstance(param, click.Option) and not {"--help", "--version"} & set(param.opts):
            found += [(opt, param.is_flag) for opt in (*param.opts, *param.secondary_opts)]
    if name == "serve":
        from mlx_turbokv.serve.options import server_parser

        for action in server_parser()._actions:
            if action.dest != "help":
                found += [(opt, action.nargs == 0) for opt in action.option_strings]
    return found


def _values() -> st.SearchStrategy[str]:
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
    return st.one_of(
        st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), text,
        st.integers().map(str), st.floats().map(repr),
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_values_are_refused_in_one_sentence_or_accepted(name, monkeypatch, tmp_path):
    """Never a traceback, another status, or a second sentence."""
    known = _options(name)
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))

    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow],
        database=None, derandomize=True,
    )  # fmt: skip
    @given(st.lists(st.tuples(st.sampled_from(known), _values()), min_size=1, max_size=4))
    def check(chosen):
        args: list[str] = []
        for (option, is_flag), value in chosen:
            args += [option] if is_flag else [option, value]
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            with nothing_loads(), monkeypatch.context() as context:
                context.chdir(folder)
                result = call(name, *args)
            left = [path.name for path in Path(folder).iterdir()]
        assert result.status in (None, 2), (args, result)
        if result.status == 2:
            assert "\n" not in result.error().strip() and result.out == "", (args, result)
            assert left == [], (args, left)

    check()


NUMBERS = [
    ("generate", "--temp", ("nan", "inf", "-1", "1e300", "1e-300")),
    ("generate", "--top-p", ("nan", "2", "-0.5")),
    ("generate", "--min-p", ("nan", "2")),
    ("generate", "--xtc-probability", ("nan", "-1")),
    ("generate", "--xtc-threshold", ("nan", "0.6")),
    ("generate", "--top-k", ("-1", "1.5")),
    ("generate", "--seed", ("-1", str(2**64), "nan")),
    ("generate", "--max-tokens", ("0", "-2")),
    ("generate", "--max-kv-size", ("0", "3", "4", "-5", str(2**63))),
    ("generate", "--prefill-step-size", ("0", str(2**63))),
    ("bench", "--seed", ("-1", str(2**64))),
    ("bench", "--weight-bits", ("-4", "0", "7", "nan")),
    ("bench", "--time-limit", ("nan", "inf", "-1")),
    ("bench", "--context", ("0", "-1", str(2**31), "1e5")),
    ("bench", "--prompt-tokens", ("0", str(2**31))),
    ("bench", "--generation-tokens", ("0", str(2**31))),
    ("bench", "--dtype", ("int4",)),
    ("needle", "--depth", ("nan", "-0.1", "1.5", "inf")),
    ("needle", "--time-limit", ("nan", "-1")),
    ("needle", "--repeats", ("0", str(2**40))),
    ("needle", "--depths", ("0", str(2**40))),
    ("needle", "--context", ("0", str(2**40))),
    ("perplexity", "--chunks", ("0", "-1")),
    ("perplexity", "--ctx-size", ("3", "-512", str(2**40))),
    ("calibrate", "--ctx-size", ("3", str(2**40))),
    ("calibrate", "--chunks", ("0",)),
    ("calibrate", "--held-out-chunks", ("0",)),
    ("calibrate", "--budget", ("nan", "inf", "-1", "0", "1e300", "129")),
    ("calibrate", "--refine", ("-1",)),
    ("calibrate", "--batch-size", ("0", str(2**40))),
    ("plan", "--context", ("0", "-5", str(2**64))),
    ("plan", "--memory", ("nan", "inf", "0", "-1", "1e300")),
    ("plan", "--weight-bits", ("nan", "-4", "0", "65", "1e300")),
    ("plan", "--kv-layers", ("0", "-1", str(2**40))),
    ("plan", "--kv-heads", ("0", "-1", str(2**40))),
    ("plan", "--head-dim", ("0", "-1", str(2**40))),
    ("plan", "--v-head-dim", ("0", "-1", str(2**40))),
    ("report", "--ctx-size", ("3", str(2**40))),
    ("report", "--depths", (str(2**40),)),
    ("serve", "--temp", ("nan", "-1", "inf")),
    ("serve", "--top-p", ("nan", "2")),
    ("serve", "--min-p", ("nan", "2")),
    ("serve", "--top-k", ("-1",)),
    ("serve", "--max-tokens", ("0", "-1")),
    ("serve", "--port", ("-1", "65536")),
    ("serve", "--num-draft-tokens", ("0",)),
    ("serve", "--decode-concurrency", ("0",)),
    ("serve", "--prompt-concurrency", ("-1",)),
    ("serve", "--prefill-step-size", ("0",)),
    ("serve", "--prompt-cache-size", ("-1",)),
    ("serve", "--prompt-cache-bytes", ("", "GB", "10Q", "-5")),
    ("serve", "--chat-template-args", ("[1]", "[" * 100_000, "nope")),
]  # fmt: skip
WITH = {
    ("bench", "--weight-bits"): ["--shape", "phi-4"],
    ("plan", "--weight-bits"): ["--memory", "16"],
    ("plan", "--kv-heads"): ["--kv-layers", "4"],
    ("plan", "--head-dim"): ["--kv-layers", "4"],
    ("plan", "--v-head-dim"): ["--kv-layers", "4"],
    ("generate", "--top-p"): ["--temp", "1"],
    ("generate", "--min-p"): ["--temp", "1"],
    ("generate", "--top-k"): ["--temp", "1"],
    ("generate", "--xtc-probability"): ["--temp", "1"],
    ("generate", "--xtc-threshold"): ["--temp", "1", "--xtc-probability", "0.5"],
    ("serve", "--num-draft-tokens"): ["--draft-model", "x"],
}


@pytest.mark.parametrize(("command", "option", "values"), NUMBERS)
def test_numbers_outside_a_sensible_range(command, option, values):
    for value in values:
        sentence = refused(command, option, value, *WITH.get((command, option), []))
        assert option in sentence or value in sentence, sentence


SENSELESS = [
    ("generate", ["--max-kv-size", "64", "--sink", "32"], "--sink has no effect with --max-kv"),
    ("chat", ["--max-kv-size", "64", "--recent", "32"], "--recent has no effect with --max-kv"),
    (
        "cache_prompt",
        [
            "--prompt",
            "a",
            "--prompt-cache-file",
            "x.safetensors",
            "--max-kv-size",
            "64",
            "--sink",
            "0",
        ],
        "--sink has no effect with --max-kv-size",
    ),
    ("generate", ["-ctk", "q8_0", "-ctv", "f16", "--sink", "64"], "--sink 64 has no effect"),
    ("serve", ["-ctk", "f16", "-ctv", "f16", "--recent", "64"], "--recent 64 has no effect"),
    ("plan", ["-ctk", "f16", "-ctv", "q8_0", "--recent", "64"], "--recent 64 has no effect"),
    ("generate", ["--xtc-threshold", "0.2", "--temp", "1"], "--xtc-threshold has no effect"),
    ("generate", ["--min-tokens-to-keep", "3", "--temp", "1"], "--min-tokens-to-keep has no"),
    ("generate", ["--num-draft-tokens", "4"], "--num-draft-tokens has no effect"),
    ("generate", ["--pipeline"], "--pipeline has no effect"),
    ("generate", ["--ignore-chat-template", "--system-prompt", "a"], "--system-prompt has no"),
    ("generate", ["--ignore-chat-template", "--prefill-response", "a"], "--prefill-response has"),
    ("generate", ["--ignore-chat-template", "--chat-template-config", "{}"], "--chat-template-con"),
    ("generate", ["--output", "json", "--verbose", "F"], "--verbose has no effect"),
    ("chat", ["--xtc-threshold", "0.2", "--temp", "1"], "--xtc-threshold has no effect"),
    ("chat", ["-ctk", "turbo4", "--keys", "x", "--max-kv-size", "64"], "--keys has no effect"),
    ("chat", ["--max-tokens", "0"], "--max-tokens 0"),
    ("generate", ["-ctk", "q8_0", "--keys", "missing.json"], "--keys has no effect"),
    ("generate", ["-ctk", "q8_0", "--no-centre"], "--no-centre has no effect"),
    ("generate", ["--policy", "mode-1", "--keys", "missing.json"], "--keys has no effect"),
    ("generate", ["-ctk", "turbo4", "--keys", "missing.json"], "missing.keys.json"),
    ("generate", ["-ctk", "turbo4", "--keys", "x", "--max-kv-size", "64"], "--keys"),
    ("serve", ["-ctk", "q8_0", "--keys", "missing.json"], "--keys has no effect"),
    ("serve", ["-ctk", "turbo4", "--keys", "missing.json"], "missing.keys.json"),
    ("serve", ["--num-draft-tokens", "4"], "--num-draft-tokens has no effect"),
    ("serve", ["--use-default-chat-template", "--chat-template", "x"], "--chat-template"),
    ("perplexity", ["--config", "q8_0/turbo2", "--keys", "k"], "--keys has no effect"),
    ("perplexity", ["--keys", "missing.json"], "missing.keys.json"),
    ("perplexity", ["--markdown", "--output", "json"], "--markdown"),
    ("needle", ["--config", "la-v7", "--no-centre"], "--no-centre has no effect"),
    ("needle", ["--depths", "3", "--depth", "0.5"], "--depths"),
    ("needle", ["--json", "a.json", "--plot", "a.json"], "a.json"),
    ("needle", ["--from", "x.json", "--context", "512"], "--context has no effect"),
    ("needle", ["--from", "x.json", "--json", "y.json"], "--json has no effect"),
    ("bench", ["--from", "x.json", "--model", "m"], "--model has no effect"),
    ("bench", ["--weight-bits", "4"], "--weight-bits has no effect"),
    ("bench", ["--shape", "phi-4", "--model", "m"], "--model"),
    ("bench", ["--shape", "phi-4", "--adapter-path", "a"], "--adapter-path has no effect"),
    ("bench", ["--shape", "phi-4", "--trust-remote-code"], "--trust-remote-code has no effect"),
    ("bench", ["--no-resume"], "--no-resume has no effect"),
    ("bench", ["--context", "64", "--prefill-step-size", "8"], "--prefill-step-size has no effect"),
    ("plan", ["--kv-heads", "4"], "--kv-heads has no effect"),
    ("plan", ["--head-dim", "64"], "--head-dim has no effect"),
    ("plan", ["--v-head-dim", "64"], "--v-head-dim has no effect"),
    ("plan", ["--weight-bits", "4"], "--weight-bits has no effect"),
    ("plan", ["--kv-layers", "4", "--memory", "4", "--weight-bits", "4"], "--weight-bits"),
    ("plan", ["--kv-layers", "4", "--compress-sliding"], "--compress-sliding has no effect"),
    ("plan", ["--kv-layers", "4", "--model", "m"], "--model"),
    ("plan", ["--markdown", "--output", "json"], "--markdown"),
    ("plan", ["--policy", "la-v7", "--keys", "missing.json"], "--keys has no effect"),
    ("calibrate", ["--held-out", "none", "--held-out-chunks", "4"], "--held-out-chunks has no"),
    ("calibrate", ["--held-out", "none", "--compare", "la-v7"], "--compare has no effect"),
    ("calibrate", ["--keys", "--no-centre"], "--no-centre"),
    ("report", ["--skip", "needle", "--needle-context", "512"], "--needle-context has no effect"),
    ("report", ["--skip", "needle", "--depths", "3"], "--depths has no effect"),
    ("report", ["--skip", "bench", "-n", "3"], "--num-trials has no effect"),
    ("report", ["--skip", "perplexity", "--chunks", "3"], "--chunks has no effect"),
    (
        "report",
        [word for part in ("perplexity", "needle", "plan", "bench") for word in ("--skip", part)],
        "--skip",
    ),
    ("doctor", ["--quick", "--full"], "--full"),
]


@pytest.mark.parametrize(("command", "args", "words"), SENSELESS)
def test_options_that_contradict_each_other_or_have_no_effect(
    command, args, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text(json.dumps({"what": "any"}))
    refused(command, *args, words=[words])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


SENSIBLE = [
    ("generate", ["--top-p", "1.0", "--top-k", "0", "--temp", "0"]),
    ("generate", ["--temp", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", str(2**64 - 1)]),
    ("generate", ["--max-kv-size", "5"]),
    ("generate", ["-ctk", "turbo4", "--no-centre"]),
    ("perplexity", ["--text", "sample", "--no-centre", "-c", "4"]),
    ("needle", ["--depth", "0.5", "--depth", "1", "--time-limit", "1e9"]),
    ("bench", ["--shape", "phi-4", "--weight-bits", "16", "--context", "131072"]),
    ("plan", ["--kv-layers", "4", "--kv-heads", "2", "--head-dim", "96"]),
    ("plan", ["-c", str(1 << 30), "--memory", "0.5", "--weight-bits", "4.5"]),
    ("serve", ["--temp", "0.5", "--prompt-cache-bytes", "4GB", "--chat-template-args", "{}"]),
    ("serve", ["--temp", "0", "--top-p", "0.9"]),  # a request may ask for another temperature
]


@pytest.mark.parametrize(("command", "args"), SENSIBLE)
def test_sensible_options_are_accepted(command, args):
    with nothing_loads():
        result = call(command, *args)
    assert result.status is None, result


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("plan", "run")])
def test_the_backend_comes_from_the_environment_unless_it_is_given(name, monkeypatch, tmp_path):
    """A missing or unknown one is refused before a model is loaded; auto given means auto."""
    more = {
        "bench": ["--shape", "phi-4"],
        "calibrate": ["--held-out", "none"],
        "cache_prompt": ["--prompt", "a", "--prompt-cache-file", "a.safetensors"],
        "convert_cache": ["from.safetensors", "to.safetensors"],
    }.get(name, [])
    if name == "convert_cache":
        monkeypatch.chdir(tmp_path)
        mx.save_safetensors("from.safetensors", {"0.0": mx.zeros(1)}, {"1.0": "KVCache"})
    text = ["--text", "sample"] if name in ("perplexity", "needle", "report", "calibrate") else []
    args = (name, *more, *text)
    monkeypatch.setenv("TURBOKV_BACKEND", "abacus")
    refused(*args, words=["TURBOKV_BACKEND", "abacus"])
    monkeypatch.setenv("TURBOKV_BACKEND", "metal")
    refused(*args, words=["metal", "not available"])
    with nothing_loads():
        for given_backend in ("auto", "reference"):
            assert call(*args, "--backend", given_backend).status is None
        monkeypatch.setenv("TURBOKV_BACKEND", "Reference")
        assert call(*args).status is None
        monkeypatch.setenv("TURBOKV_BACKEND", "")
        assert call(*args).status is None
    refused(*args, "--backend", "cuda", words=["cuda", "not available"])


def test_sampling_options_at_temperature_0_are_named_and_taken():
    """As mlx_lm.generate takes them; they change nothing."""
    with nothing_loads():
        result = call("generate", "-p", "a", "--top-p", "0.5", "--top-k", "5")
    assert result.status is None  # it went on to load the model
    assert "--top-p, --top-k: no effect at --temp 0" in result.err
