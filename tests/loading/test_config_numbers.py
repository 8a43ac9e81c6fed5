"""Numbers of a config.json that no model has: one sentence names the key and the value."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from command_calls import call
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv.errors import InputError
from mlx_turbokv.loading import models
from mlx_turbokv.loading.config import read_config
from mlx_turbokv.loading.config_numbers import NUMBERS
from mlx_turbokv.loading.known_shapes import KNOWN

SMALL = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
    "max_position_embeddings": 512,
}  # fmt: skip
WRONG = st.one_of(
    st.sampled_from([math.inf, -math.inf, math.nan, True, False, 10**30]),
    st.integers(max_value=-1), st.text(), st.dictionaries(st.text(), st.integers(), max_size=1),
    st.lists(st.text(), min_size=1, max_size=2),
)  # fmt: skip


def written(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("within", ["", "text_config"])
@pytest.mark.parametrize("key", NUMBERS)
@given(value=WRONG)
def test_a_number_that_no_model_has_is_named(tmp_path_factory, within, key, value) -> None:
    config = {**SMALL, key: value}
    if within:
        config = {"model_type": "gemma3", within: config}
    path = written(tmp_path_factory.mktemp("model"), config)
    with pytest.raises(InputError, match=rf"config\.json: {key} .* is not accepted: give") as error:
        read_config(path, str(path))
    assert repr(value)[:40] in str(error.value)


@pytest.mark.parametrize(
    "entry", [{"bits": -1}, {"bits": "4"}, {"group_size": 0.5}, {"layers.0": {"bits": math.inf}}]
)
def test_numbers_of_a_quantisation_are_checked(tmp_path: Path, entry: dict) -> None:
    path = written(tmp_path, {**SMALL, "quantization": {"bits": 4, "group_size": 64, **entry}})
    with pytest.raises(InputError, match=r"config\.json: (bits|group_size) .* is not accepted"):
        read_config(path, str(path))


@pytest.mark.parametrize("name", ["text_config", "quantization"])
def test_a_part_is_an_object(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, {**SMALL, name: 5})
    with pytest.raises(InputError, match=f"{name} 5 is not accepted: give an object"):
        read_config(path, str(path))


@pytest.mark.parametrize("config", [
    *KNOWN.values(),
    SMALL | {"head_dim": None, "text_config": None, "quantization": None},
    SMALL | {"max_position_embeddings": 1e6, "num_key_value_heads": [0, 2]},
    SMALL | {"quantization": {"bits": 4, "group_size": 64, "lm_head": False, "mode": "affine"}},
])  # fmt: skip
def test_what_models_have_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    path = written(tmp_path, config)
    assert read_config(path, str(path)) == config


@pytest.mark.parametrize(("key", "text"), [("hidden_size", "1e400"), ("num_attention_heads", "0")])
def test_commands_say_so_before_they_load(tmp_path: Path, key: str, text: str) -> None:
    path = written(tmp_path, {**SMALL, key: "HERE"})
    path.write_text(path.read_text().replace('"HERE"', text))
    said = f"{key} {float(text) if 'e' in text else text} is not accepted: give a whole number"
    assert said in call("plan", "--model", str(path)).error()
    with pytest.raises(InputError, match=re.escape(said)):
        models.load(tmp_path)
