"""The plan command and what it computes."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import KVCache
from tiny_models import shared_model, tiny_config, tiny_model

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.cache.summary import leaves
from mlx_turbokv.cli.entry import run
from mlx_turbokv.cli.plan import command
from mlx_turbokv.errors import InputError
from mlx_turbokv.loading.known_shapes import KNOWN
from mlx_turbokv.loading.model_shape import hypothetical_shape, shape_from_config
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.policy import LayerList, Uniform, load_policy
from mlx_turbokv.policy.recommended import label, recommended
from mlx_turbokv.report.plan import make_plan, raw_index_v_bits, runs


def plan_json(*args: str) -> dict:
    result = CliRunner().invoke(command, [*args, "--output", "json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


# The paper's effective bits per value of V, counted over KV layers.
PAPER = {
    ("phi-4", "la-v7"): "3.10",
    ("phi-4", "mode-10"): "3.70",
    ("Qwen2.5-7B", "la-v7"): "3.36",
    ("Qwen2.5-7B", "mode-10"): "4.21",
}


@pytest.mark.parametrize(("model", "policy"), PAPER)
def test_bits_per_value_are_the_papers(model: str, policy: str) -> None:
    (row,) = plan_json("--model", model, "--config", f"q8_0/turbo2:32@{policy}")["rows"]
    assert f"{row['v_bits']:.2f}" == PAPER[model, policy]
    assert "raw_index_v_bits" not in row


def test_a_hybrid_is_counted_over_its_kv_layers_beside_the_papers_figure() -> None:
    plan = plan_json("--model", "Qwen3.5-27B", "--config", "q8_0/turbo2:32@la-v7")
    assert plan["layers"] == 64
    assert plan["kv_layer_indices"] == list(range(3, 64, 4))
    (row,) = plan["rows"]
    assert row["v_bits"] == pytest.approx((4 * 8.5 + 12 * 2.5) / 16)
    assert f"{row['raw_index_v_bits']:.2f}" == "2.88"
    result = CliRunner().invoke(
        command, ["--model", "Qwen3.5-27B", "--config", "q8_0/turbo2:32@la-v7"]
    )
    assert "4.00" in result.stdout and "2.88" in result.stdout
    assert "1 of the 4 KV layers to protect are protected" in result.stdout


@pytest.mark.parametrize(
    ("name", "kv_layers", "kv_heads", "head_dim"),
    [
        ("phi-4", 40, 10, 128),
        ("Qwen2.5-7B", 28, 4, 128),
        ("Llama-3.1-8B", 32, 8, 128),
        ("Qwen3.5-27B", 16, 4, 256),
    ],
)
def test_known_models(name: str, kv_layers: int, kv_heads: int, head_dim: int) -> None:
    model = shape_from_config(KNOWN[name], name)
    assert {(s.n_kv_heads, s.k_head_dim, s.v_head_dim) for s in model.shapes} == {
        (kv_heads, head_dim, head_dim)
    }
    assert len(model.shapes) == kv_layers


def test_bytes_against_hand_made_figures() -> None:
    plan = plan_json("--model", "Llama-3.1-8B", "--config", "q8_0/turbo3+0,0", "-c", "1000")
    values = 1000 * 32 * 8 * 128
    assert plan["f16_bytes"] == {"1000": 2 * 2 * values}
    assert plan["rows"][0]["bytes"] == {"1000": values * (8.5 + 3.125) / 8}
    # 8,030,261,248 parameters, as Meta's model card rounds to 8.03 B
    plan = plan_json("--model", "Llama-3.1-8B", "--weight-bits", "16", "--gpu-memory", "1GB")
    assert plan["weight_bytes"] == 2 * 8_030_261_248


def test_plan_is_what_caches_take() -> None:
    model = shared_model("jamba")
    shape = shape_from_config(tiny_config("jamba"), "tiny")
    plan = make_plan(shape, [("x", Uniform("q8_0", "turbo2"))], [1024])
    planned = plan.rows[0].bytes_at[1024] - plan.uncompressed_bytes_at[1024]
    caches = [c for c in make_prompt_cache(model, "q8_0", "turbo2") if hasattr(c, "k_format")]
    rows = mx.random.normal((1, 2, 1024, 32))
    for cache in caches:
        cache.update_and_fetch(rows, rows)
    assert planned <= sum(c.nbytes for c in caches) <= 1.1 * planned


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "gpt_oss", "jamba", "baichuan_m1"])
def test_what_is_left_alone_is_counted_as_mlx_lm_keeps_it(name: str) -> None:
    """A bfloat16 model runs 600 tokens; its caches tell their bytes themselves."""
    shape = shape_from_config(tiny_config(name), "tiny")
    model = tiny_model(name)
    model.set_dtype(mx.bfloat16)
    caches = own_caches(model)
    model(mx.zeros((1, 599), mx.int32), cache=caches)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    alone = sum(c.nbytes for c in leaves(caches) if type(c) is not KVCache)
    plan = make_plan(shape, [("x", Uniform("q8_0", "turbo2"))], [1, 600])
    assert plan.uncompressed_bytes_at[600] == alone
    kv = sum(2 * 600 * s.n_values for s in shape.shapes)
    assert plan.f16_bytes_at[600] == alone + kv
    assert 0 < plan.uncompressed_bytes_at[1] <= alone


def test_windows_that_are_packed_are_counted_packed_and_bounded() -> None:
    plans = []
    for compress in (False, True):
        shape = shape_from_config(tiny_config("gemma3"), "tiny", compress)
        policy = Uniform("q8_0", "turbo2").protecting(0, 0)
        plans.append(make_plan(shape, [("x", policy)], [10, 5000, 6000]))
    alone, packed = plans
    assert packed.uncompressed_bytes_at == {10: 0, 5000: 0, 6000: 0}
    assert packed.f16_bytes_at == alone.f16_bytes_at
    caches = make_prompt_cache(shared_model("gemma3"), "q8_0", "turbo2", compress_sliding=True)
    rows = mx.random.normal((1, 2, 1, 32))
    for cache in caches[::2]:
        for _ in range(300):
            cache.update_and_fetch(rows, rows)
    grown = {n: packed.rows[0].bytes_at[n] - 3 * 2 * n * (34 + 10) for n in (10, 5000, 6000)}
    assert grown[5000] == grown[6000] == 3 * 2 * (16 + 128) * (34 + 10)
    assert grown[10] == 3 * 2 * 10 * (34 + 10)
    assert sum(c.nbytes for c in caches[::2]) <= grown[5000]


def test_memory_goes_to_windows_and_states_first(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma3")))
    args = ["--model", str(tmp_path), "--gpu-memory", "256MB", "-ctk", "q8_0", "-ctv", "turbo2"]
    args += ["--sink", "0", "--recent", "0"]
    plan = plan_json(*args, "--prefill-step-size", "1", "-c", "4096")
    free = plan["memory_bytes"] - plan["weight_bytes"]
    window = 3 * 2 * 16 * 32 * 2 * 2
    # a step of one token reads its own activations, and a byte of mask for each token
    fixed = plan["scratch_bytes"]["4096"] - 4096
    assert plan["rows"][0]["max_tokens"] == (free - window - fixed) // (3 * 2 * (34 + 10) + 1)
    sliding = plan_json(*args, "--compress-sliding")
    assert (plan["kv_layers"], sliding["kv_layers"]) == (3, 6)
    assert sliding["windows"] == [16, None] * 3
    text = CliRunner().invoke(command, [*args, "-c", "4096"]).stdout
    assert "Every row counts 3 windows as mlx-lm keeps them: 12.0 KiB." in text
    text = CliRunner().invoke(command, [*args, "-c", "4", "-c", "9"]).stdout
    assert "keeps them: 3.0 KiB at 4, 6.8 KiB at 9." in text


def test_a_boundary_that_does_not_pay_is_said_so() -> None:
    def notes(n_layers: int) -> list[str]:
        shape = hypothetical_shape(n_layers, 8, 128)
        return make_plan(shape, [("la-v7", load_policy("la-v7"))], [1]).rows[0].notes

    assert notes(26) == []
    (note,) = notes(25)
    assert "la-v7 takes more bits than turbo3 in every layer" in note and "V takes 3.15" in note


def test_raw_indices_matter_on_hybrids_alone() -> None:
    dense = hypothetical_shape(8, 2, 64)
    assert raw_index_v_bits(load_policy("la-v7"), dense) is None
    hybrid = shape_from_config(tiny_config("qwen3_5"), "tiny")
    assert raw_index_v_bits(Uniform("q8_0", "turbo2"), hybrid) is None
    listed = LayerList((("q8_0", "q8_0"), ("f16", "f16"), ("f16", "f16")))
    assert raw_index_v_bits(listed, hybrid) is None


def test_runs_of_equal_layers() -> None:
    formats = load_policy("la-v7").formats(7)
    assert [(first, last, str(v)) for first, last, (_, v) in runs(formats)] == [
        (0, 1, "q8_0"),
        (2, 4, "turbo2"),
        (5, 6, "q8_0"),
    ]


def test_memory_limits_the_tokens() -> None:
    plan = plan_json(
        "--kv-layers", "2", "--kv-heads", "1", "--head-dim", "128", "--gpu-memory", "1",
        "-ctk", "q8_0", "-ctv", "q8_0",
    )  # fmt: skip
    assert plan["rows"][0]["max_tokens"] == (1 << 30) // (2 * 2 * 136)


def test_default_rows_are_the_recommended_settings_as_they_are_typed() -> None:
    rows = plan_json("--model", "phi-4", "-c", "4096")["rows"]
    assert [row["name"] for row in rows] == [label(policy) for policy in recommended()]
    assert rows[0]["bits"] == 16 and any(row["typed"].startswith("--policy la-v7") for row in rows)
    for row in rows:
        (typed,) = plan_json("--model", "phi-4", "-c", "4096", *row["typed"].split())["rows"]
        assert {**typed, "name": row["name"], "notes": row["notes"]} == row
        (named,) = plan_json("--model", "phi-4", "-c", "4096", "--config", row["name"])["rows"]
        assert named == row


def test_a_config_json_is_enough(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma2")))
    for source in (tmp_path, tmp_path / "config.json"):
        assert plan_json("--model", str(source))["kv_layers"] == 3


def test_markdown_is_a_table() -> None:
    result = CliRunner().invoke(command, ["--model", "phi-4", "-c", "2048", "--markdown"])
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(recommended())
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "phi-4", "--boundary", "30,20"], "larger than the model"),
        (["--model", "phi-4", "--policy", "la-v9"], "Unknown policy 'la-v9'"),
        (["--model", "phi-4", "-ctv", "turbo9"], "Unknown KV format 'turbo9'"),
        (["--model", "phi-4", "-c", "0"], "--context"),
        (["--model", "phi-4", "-c", "nan"], "such as 32768 or 128K"),
        (["--model", "phi-4", "-c", "1e300"], "such as 32768 or 128K"),
        (["--model", "phi-4", "-c", "9999999999M"], "such as 32768 or 128K"),
        (["--model", "phi-4", "-c", "1.0001K"], "such as 32768 or 128K"),
        (["--model", "phi-4", "--memory", "-1"], "such as 16GB"),
        (["--model", "phi-4", "--memory", "nan"], "such as 16GB"),
        (["--model", "phi-4", "--memory", "1e300"], "such as 16GB"),
        (["--model", "phi-4", "--memory", "0"], "such as 16GB"),
        (["--model", "phi-4", "--memory", "1B"], "such as 16GB"),
        (["--model", "phi-4", "--memory", "1iB"], "such as 16GB"),
        (["--model", "phi-4", "--gpu-memory", "inf"], "such as 16GB"),
        (["--model", "phi-4", "--gpu-memory", "9", "--memory", "9"], "cannot be given together"),
        (["--model", "phi-4", "--weight-bits", "nan"], "--weight-bits"),
        (["--model", "phi-4", "--weight-bits", "-4"], "--weight-bits"),
        (["--model", "phi-4", "--weight-bits", "1e300"], "--weight-bits"),
        (["--kv-layers", "2", "--prefill-step-size", "4"], "--prefill-step-size has no effect"),
        (["--model", "phi-4", "--kv-layers", "2"], "cannot be given together"),
        (["--kv-layers", "2", "--head-dim", "88", "-ctv", "turbo2"], "head_dim 88"),
        (["--kv-layers", "0"], "--kv-layers"),
        (["--model", "phi-4", "--policy", "none.json"], "No such file"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, args)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("Error: ") and words in line


def test_a_model_with_nothing_to_compress_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("deepseek_v3")))
    with pytest.raises(InputError, match="no KV layer.*MLA latent"):
        CliRunner().invoke(command, ["--model", str(tmp_path)], catch_exceptions=False)


def test_an_architecture_that_mlx_lm_lacks_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="'nothing'"):
        CliRunner().invoke(command, ["--model", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize("offline", [True, False], ids=["told to be", "no network"])
def test_a_hub_id_without_a_network_names_the_shapes_at_once(monkeypatch, offline) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    asked = []  # the hub's package, which tries for half a minute
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: asked.append(args))
    with pytest.raises(InputError) as raised:
        CliRunner().invoke(
            command, ["--model", "some-one/Qwen3-8B-Instruct-5bit"], catch_exceptions=False
        )
    assert not asked
    said = str(raised.value)
    assert "config.json" in said and "Qwen3-8B, Qwen3-14B" in said
    assert said.endswith("Qwen3-8B is the most like it.")


def test_a_name_that_is_no_hub_id_names_the_shapes() -> None:
    with pytest.raises(InputError, match=r"no model at qwen\?3.*Llama-3.1-8B"):
        CliRunner().invoke(command, ["--model", "qwen?3"], catch_exceptions=False)
