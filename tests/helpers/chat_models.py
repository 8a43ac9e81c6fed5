"""Tiny models with a chat template, as mlx-lm keeps them; the vocabulary is of single letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_lm import stream_generate
from model_folder import write_model_folder

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.loading import models

# Earlier answers lose what they begin with, as Qwen3's template drops earlier thinking.
DROPPED = 3
TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role == "assistant" and not loop.last -%}
{{ "[" + m.role[0] + "]" + m.content[DROP:] + "\\n" }}
{%- else -%}
{{ "[" + m.role[0] + "]" + m.content }}{% if not (loop.last and CONTINUE) %}{{ "\\n" }}{% endif %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[a]{%- endif -%}
"""


def write_chat_folder(
    folder: Path, architecture: str, drops: bool = False, context: int = 512, **changes: int
) -> Path:
    """A model folder with a chat template.

    Args:
        drops: whether the template drops the beginning of earlier answers.
        context: positions that the model was made for.
    """
    write_model_folder(folder, architecture, **changes)
    template = TEMPLATE.replace("DROP", str(DROPPED if drops else 0))
    template = template.replace("CONTINUE", "continue_final_message|default(false)")
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answers_read_at_once(folder: Path, questions: Sequence[str], n: int) -> list[tuple[str, int]]:
    """The oracle of a conversation: each turn's whole prompt read by a new cache.

    Args:
        n: tokens of an answer.

    Returns: each answer, and how many tokens its prompt has.
    """
    loaded, messages, found = models.load(str(folder)), [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        cache = make_prompt_cache(loaded.model, "q8_0", "q8_0")
        parts = stream_generate(
            loaded.model, loaded.tokenizer, prompt, max_tokens=n, prompt_cache=cache
        )
        answer = "".join(part.text for part in parts)
        messages.append({"role": "assistant", "content": answer})
        found.append((answer, len(prompt)))
    return found
