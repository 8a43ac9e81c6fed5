"""Needle in a haystack: prompts, exact scoring, log-probabilities, resuming and the command."""

from __future__ import annotations

import json
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from characters import Characters, loaded
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from tiny_models import tiny_model

from mlx_turbokv.cli import needle as cli
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import configuration, haystack, needle
from mlx_turbokv.evaluate.checkpoint import Journal
from mlx_turbokv.evaluate.haystack import Case, Haystack, Prompt, is_found, make_cases
from mlx_turbokv.evaluate.tables import Table, needle_cells
from mlx_turbokv.policy import Protection

TEXT = " ".join(f"Sentence {i} says that {i} follows {i - 1}." for i in range(1, 60))
LOGP_TOLERANCE = 1e-3  # nats over an answer: float32 through a cache against float64 of one pass


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def hay():
    return Haystack(Characters(), TEXT)


@pytest.mark.parametrize("kind", haystack.KINDS)
@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("context", [900, 1501])
def test_a_prompt_hides_the_needle_at_its_depth(hay, kind, depth, context):
    prompt = hay.prompt(Case(kind, context, depth))
    text = Characters().decode(prompt.tokens)
    fact = re.search(rf"[^.]*{re.escape(prompt.answer)}\.", text)
    before = re.findall(r"Sentence \d+ says", text[: fact.start()])
    everything = re.findall(r"Sentence \d+ says", text)
    assert text.count(prompt.answer) == 1
    assert len(before) == round(depth * len(everything)) and len(everything) >= 4
    assert context - 60 <= len(prompt.tokens) + len(prompt.answer_tokens) <= context
    assert Characters().decode(prompt.answer_tokens) == f" {prompt.answer}"
    # The prompt ends with the words of the fact up to the answer.
    assert text.endswith(fact.group().strip().split(prompt.answer)[0].strip())


def test_distractors_have_other_places_and_numbers(hay):
    prompt = hay.prompt(Case("distractors", 2000, 0.5))
    text = Characters().decode(prompt.tokens)
    facts = re.findall(r"special number of (\w+) is (\d{6})\.", text)
    assert len(facts) == 1 + haystack.N_DISTRACTORS == len(set(facts))
    asked = re.search(r"What is the special number of (\w+)\?", text).group(1)
    assert dict(facts)[asked] == prompt.answer
    assert len(dict(facts)) == len(facts) == len(set(dict(facts).values()))


def test_the_papers_password_is_a_case(hay):
    assert hay.prompt(Case("password", 800, 0.5)).answer == "turbo-rainbow-42"


def test_prompts_follow_from_the_case_alone(hay):
    a, b = (hay.prompt(Case("number", 900, 0.5, i)) for i in (0, 1))
    assert Haystack(Characters(), TEXT).prompt(Case("number", 900, 0.5)) == a != b


def test_a_short_text_is_repeated():
    hay = Haystack(Characters(), "One is here. Two is there.")
    prompt = hay.prompt(Case("password", 1000, 0.5))
    assert Characters().decode(prompt.tokens).count("One is here.") > 10


def test_a_context_without_room_is_refused(hay):
    with pytest.raises(InputError, match="too short for a needle"):
        hay.prompt(Case("password", 100, 0.5))


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_hiding_keeps_every_sentence_in_order(sentences, depths):
    facts = [(depth, f"F{i}") for i, depth in enumerate(depths)]
    hidden = haystack._hidden(sentences, facts)
    assert [x for x in hidden if not x.startswith("F")] == sentences
    assert sorted(x for x in hidden if x.startswith("F")) == sorted(f for _, f in facts)
    before = hidden.index("F0") - sum(x.startswith("F") for x in hidden[: hidden.index("F0")])
    assert before == round(depths[0] * len(sentences))


@pytest.mark.parametrize(
    ("response", "found"),
    [(" 123456.", True), ('"123456"', True), (" 1234567", False), (" 12345", False),
     (" not 123456", False), (" 654321, 123456", False), ("123456\nand", True)],
)  # fmt: skip
def test_only_the_exact_answer_counts(response, found):
    assert is_found(response, "123456") is found


def test_cases_come_mixed_and_each_once():
    cases = make_cases([512, 1024, 512], [0, 0.5, 1], haystack.KINDS, 2)
    assert len(cases) == len(set(cases)) == 2 * 3 * 3 * 2
    assert [c.repeat for c in cases] == [0] * 18 + [1] * 18
    start = cases[:9]  # half of the first repeat
    assert {c.context for c in start} == {512, 1024} and {c.depth for c in start} == {0, 0.5, 1}
    assert {c.kind for c in start} == set(haystack.KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([512], [0.5], ["pin"]), "accepted are password"),
        (([512], [1.5], ["number"]), "from 0 to 1"),
        (([512], [0.5], ["number"], 0), "at least 1"),
    ],
)
def test_bad_cases_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make_cases(*arguments)


class Echo:
    """A model that says a text it knows, whatever it reads; its cache only counts."""

    layers = [None]

    def __init__(self, says: list[int]):
        self.says = says

    def __call__(self, tokens, cache):
        start, n = cache[0].offset, tokens.shape[1]
        cache[0].update_and_fetch(*[mx.zeros((1, 1, n, 4))] * 2)
        following = [self.says[i + 1] for i in range(start, start + n)]
        return 20.0 * (mx.arange(96) == mx.array(following)[:, None])[None]


@pytest.mark.parametrize("wrong", [None, 1, 3])
def test_a_model_that_knows_the_answer_finds_it(wrong):
    tokens = Characters().encode("The secret is")
    answer = Characters().encode(" abc-42")
    spoken = list(answer)
    if wrong is not None:
        spoken[wrong] = 0 if spoken[wrong] else 1
    model, prompt = Echo([*tokens, *spoken, 1, 1, 1, 1]), Prompt(tokens, answer, "abc-42")
    plain = configuration.Prepared("f16/f16", lambda: [KVCache()])
    result = needle.ask(model, Characters(), prompt, plain)
    assert result["found"] is (wrong is None)
    assert result["rank"] == (len(answer) if wrong is None else wrong)
    assert (result["logp"] > -1e-3) is (wrong is None)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
@pytest.mark.parametrize("step", [7, 2048])
def test_scores_agree_with_one_pass_without_a_cache(name, step, hay):
    """Pure attention is trimmed back after the answer; a recurrent state must be copied."""
    model = tiny_model(name)
    prompt = Prompt([(5 * i) % 90 for i in range(40)], [3, 60, 22, 7], "x")
    config = configuration.prepare(model, "f16/f16")
    result = needle.ask(model, Characters(), prompt, config, step)
    whole = model(mx.array([prompt.tokens + prompt.answer_tokens]))[0, len(prompt.tokens) - 1 : -1]
    logits = np.array(whole.astype(mx.float32), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = logp[np.arange(4), prompt.answer_tokens].sum()
    assert result["logp"] == pytest.approx(expected, abs=LOGP_TOLERANCE)
    n = 4 + needle.SPARE_TOKENS
    steps = generate_step(
        mx.array(prompt.tokens), model, max_tokens=n, prompt_cache=config.make_caches()
    )
    assert result["response"] == Characters().decode([t for t, _ in steps])


def _records() -> list[dict]:
    """Three cases of two configurations: f16 finds two, the other one of these and a third."""
    found = {"f16/f16": (True, True, False), "q8_0/turbo2": (True, False, True)}
    logp = {"f16/f16": (-1.0, -2.0, -6.0), "q8_0/turbo2": (-1.5, -4.0, -5.0)}
    return [
        {
            "case": f"number/{c}/0.5/{i}", "kind": "number", "context": c, "depth": 0.5,
            "repeat": i, "prompt_tokens": c - 12,
            "results": {n: {"found": found[n][i], "logp": logp[n][i]} for n in found},
        }
        for i, c in enumerate((512, 512, 1024))
    ]  # fmt: skip


def test_rates_are_counted_against_what_f16_finds():
    configs = [configuration.Prepared(n, list) for n in ("f16/f16", "q8_0/turbo2")]
    reference, other = needle.summarise(_records(), configs)
    assert (reference["found"], reference["found_of_reference"], reference["n"]) == (2, 2, 3)
    assert (other["found"], other["found_of_reference"], other["reference_found"]) == (2, 1, 2)
    assert other["found_beyond_reference"] == 1
    difference = np.array([-0.5, -2.0, 1.0])
    assert other["delta_logp"]["mean"] == pytest.approx(difference.mean())
    assert other["delta_logp"]["se"] == pytest.approx(difference.std(ddof=1) / np.sqrt(3))
    by_context = [(x["context"], x["found"], x["n"]) for x in other["by_context"]]
    assert by_context == [(512, 1, 2), (1024, 1, 1)]
    text = Table(*needle_cells([reference, other])).text().splitlines()
    assert text[2].split()[:4] == ["q8_0/turbo2", "?", "2/3", "1/2"]


def test_bits_count_the_protected_tokens_of_the_prompts():
    protected = configuration.Prepared(
        "f16/f16", list, k_bits=4.0, v_bits=3.0, bits=3.5,
        protection=Protection(32, 128), protected_bits=(8.5, 8.5, 8.5),
    )  # fmt: skip
    (row,) = needle.summarise([r | {"prompt_tokens": 1000} for r in _records()], [protected])
    stored_fine = 1000 - (1000 - 128) // 32 * 32 + 32
    assert row["bits_per_value"] == pytest.approx(3.5 + 5 * stored_fine / 1000)
    assert row["protected"] == "32,128"


def test_an_interrupted_run_goes_on_where_it_stopped(model, hay, tmp_path):
    cases = make_cases([700], [0, 0.5, 1], ["password"])
    configs = [configuration.prepare(model, n) for n in ("f16/f16", "q8_0/turbo3")]
    whole = needle.run_cases(model, hay, cases, configs)

    def stop(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    path, settings = tmp_path / "n.partial", {"model": "tiny"}
    with pytest.raises(KeyboardInterrupt):
        needle.run_cases(model, hay, cases, configs, Journal(path, settings), stop)
    kept, steps = Journal(path, settings), []
    assert [part["case"] for part in kept.parts] == [cases[0].name]
    again = needle.run_cases(model, hay, cases, configs, kept, lambda *a: steps.append(a[2]))
    assert steps[0] == "kept" and len(steps) == 5
    assert json.dumps(again) == json.dumps(whole)


def test_the_time_limit_keeps_what_was_measured(model, hay):
    configs = [configuration.prepare(model, "f16/f16")]
    cases = make_cases([700], [0], ["number"])
    assert needle.run_cases(model, hay, cases, configs, deadline=0) == []


@pytest.fixture
def call(model, tmp_path, monkeypatch):
    """`call(*arguments)`: the command on a tiny model, two cases at most."""
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: loaded(model))
    text = tmp_path / "hay.txt"
    text.write_text(TEXT)
    arguments = [
        "--text",
        str(text),
        "-c",
        "700",
        "--needle",
        "password",
        "--config",
        "q8_0/turbo2",
    ]
    return lambda *more: CliRunner().invoke(cli.command, [*arguments, *map(str, more)])


def test_the_command_writes_a_record_and_a_heatmap(call, tmp_path):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "n.json", tmp_path / "n.png"
    result = call("--depths", 2, "--json", out, "--plot", png)
    assert result.exception is None, result.output
    record = json.loads(out.read_text())
    assert [r["config"] for r in record["summary"]] == ["f16/f16", "q8_0/turbo2"]
    assert len(record["cases"]) == 2 and record["not_measured"] == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "n.json.partial").exists()
    again = CliRunner().invoke(cli.command, ["--from", str(out), "--output", "markdown"])
    assert again.exception is None and "| q8_0/turbo2 |" in again.output


def test_a_missing_matplotlib_is_named_before_the_run(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, plot = tmp_path / "n.json", ["--depths", 1, "--plot", tmp_path / "n.png"]
    for result in (call(*plot), call(*plot, "--json", out)):
        assert isinstance(result.exception, InputError)
        assert str(result.exception).endswith("pip install matplotlib.")
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--needle", "pin"], ["--needle", ""], ["--config", "q7/turbo2"], ["--from", "missing.json"]],
)
def test_the_command_refuses_before_it_loads_a_model(arguments):
    assert isinstance(CliRunner().invoke(cli.command, arguments).exception, InputError)
