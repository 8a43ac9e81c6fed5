"""lm-eval through packed caches, on a task that is made of local files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from chat_models import write_chat_folder
from command_calls import call

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.loading import models

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.slow

TASK = """task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: animals.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
"""
ITEMS = [
    {
        "question": f"the {animal} is in the {place} and the {animal} says",
        "choices": ["meow and more", "woof and so on", "moo"],
        "label": (i * 7 + j) % 3,
    }
    for i, animal in enumerate(("cat", "dog", "cow"))
    for j, place in enumerate(("house", "yard", "meadow", "barn"))
]
FORMATS = "turbo3", "turbo2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The task's folder, which is the current one."""
    (tmp_path / "animals.yaml").write_text(TASK)
    (tmp_path / "animals.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    from lm_eval import evaluator

    # the thousands of tasks that come with it are not read
    manager = partial(evaluator.TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", manager)
    return tmp_path


def likelihood(loaded, before: str, after: str) -> float:
    """Log-likelihood of a continuation: the prompt in one call, what follows in a second one."""
    encode = loaded.tokenizer.encode
    prompt, tokens = encode(before), encode(before + after)
    cache, rest = make_prompt_cache(loaded.model, *FORMATS), tokens[len(prompt) :]
    logits = [loaded.model(mx.array([prompt]), cache=cache)[0, -1:]]
    if len(rest) > 1:
        logits.append(loaded.model(mx.array([rest[:-1]]), cache=cache)[0])
    losses = nn.losses.cross_entropy(mx.concatenate(logits), mx.array(rest))
    return -losses.sum().item()


def test_accuracy_is_that_of_the_likelihoods_through_packed_caches(folder: Path) -> None:
    (folder / "model").mkdir()
    model = write_chat_folder(folder / "model", "llama", head_dim=32)
    args = ("--model", model, "--tasks", "animals.yaml", "--no-apply-chat-template")
    formats = ("-ctk", FORMATS[0], "-ctv", FORMATS[1])
    result = call("run", *formats, "--", "mlx_lm.evaluate", *args)
    assert result.status == 0, result.err
    assert "KV cache turbo3/turbo2 (3 x turbo3/turbo2 layers)" in result.err
    (path,) = folder.glob("eval_*animals.yaml")
    found = json.loads(path.read_text())["animals"]

    loaded, right = models.load(str(model)), []
    for item in ITEMS:
        scores = [likelihood(loaded, item["question"], f" {x}") for x in item["choices"]]
        right.append(scores.index(max(scores)) == item["label"])
    assert found["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)  # or the test would show nothing
