"""Tiny models with a chat template, as mlx-lm keeps them; the vocabulary is of single letters."""

from __future__ import annotations

import json
from pathlib import Path

from model_folder import write_model_folder

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
