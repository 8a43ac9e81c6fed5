"""Ten prompts of 100 tokens, greedy, through a packed cache and through mlx-lm's own.

python scripts/greedy_agreement.py -ctk q8_0 -ctv q8_0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from record import record

import mlx_turbokv
from mlx_turbokv.cli.entry import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from greedy import compare  # noqa: E402

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List five things to pack for a week in the mountains.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a story about a fox who learned to read.",
    "How do vaccines train the immune system?",
    "Summarise the history of the printing press.",
    "Give three tips for a first job interview.",
    "Describe how bread is made from flour, water, salt and yeast.",
)
NEAR_TIE = 0.2  # nats: probabilities within a factor of 1.22


@click.command()
@click.option("--model", default=None, help="As for mlx_turbokv.generate.")
@click.option("-ctk", "--cache-type-k", default="q8_0", show_default=True)
@click.option("-ctv", "--cache-type-v", default="q8_0", show_default=True)
@click.option("--json", "json_file", default=None, help="Write the record to this file.")
def command(model, cache_type_k, cache_type_v, json_file) -> None:
    """Compare greedy generation through a packed cache with mlx-lm's own cache."""
    from mlx_turbokv.loading.models import load

    loaded = load(model)
    rows = []
    for text in PROMPTS:
        message = [{"role": "user", "content": text}]
        prompt = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True)
        result = compare(
            loaded.model,
            prompt,
            lambda: mlx_turbokv.make_prompt_cache(loaded.model, "f16", "f16"),
            lambda: mlx_turbokv.make_prompt_cache(loaded.model, cache_type_k, cache_type_v),
        )
        rows.append({"prompt": text, **vars(result)})
        verdict = "equal"
        if result.gap is not None:
            near = "a near-tie" if result.gap < NEAR_TIE else "NOT a near-tie"
            verdict = f"parts after {result.n_equal}, logits {result.gap:.4f} apart: {near}"
        click.echo(f"{text:62s} {verdict}")
    if json_file:
        formats = f"{cache_type_k}/{cache_type_v}"
        results = record(model=loaded.name, formats=formats, prompts=rows)
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(command)
