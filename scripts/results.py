#!/usr/bin/env python3
"""Writes docs/results from the records in benchmarks/: one Markdown page a subject, and a plot.

python scripts/results.py            # write the pages and the plot
python scripts/results.py --check    # exit with 1 if a page differs from the records
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from pages import (  # noqa: E402
    accuracy,
    apple,
    gemma,
    kernels,
    models,
    needles,
    paper,
    plot,
    protected,
    quality,
    settings,
    tables,
)

FOLDER = ROOT / "docs/results"
# page: (its maker, what it has)
PAGES: dict[str, tuple[Callable[[], str], str]] = {
    "quality": (tables.quality, "quality against bits of three trained models, with protected "
                "tokens and without, beside mlx-lm and llama.cpp"),
    "calibration": (quality.calibration, "calibrated policies"),
    "centred-keys": (quality.centred_keys, "keys centred and not, policies calibrated with them"),
    "lm-eval": (accuracy.accuracy, "accuracy on a task of lm-eval"),
    "needle": (needles.needle, "facts hidden in long texts"),
    "needle-protected": (
        needles.needle_protected, "the same with protected tokens, by bits of the others"
    ),
    "paper": (paper.paper, "the paper's claims and tables"),
    "gemma": (gemma.gemma, "Gemma 3 270M from a GGUF file: its loss beside llama.cpp's, and which "
              "layers to protect"),
    "report": (quality.report, "a report of the default model in one table"),
    "whole-models": (models.whole_models, "speed and memory of models of known shapes"),
    "memory": (models.memory, "bytes of the cache of known models"),
    "kernels": (kernels.kernels, "times of attention, packing and dequantising"),
    "kernels-turns": (kernels.turns, "the same of an earlier commit's kernels and these, in turns"),
    "kernels-protected": (protected.protected, "decode with protected tokens and without"),
    "kv-bits": (kernels.kv_bits, "times of mlx-lm's kv_bits attention"),
    "kernel-counters": (kernels.counters, "instructions and bytes, counted on an NVIDIA GPU"),
    "decode-log": (models.decode_log, "steps of tuning decode attention"),
    "apple-kernels": (apple.kernels, "registers, spills and loops of every variant on Apple GPUs"),
    "gpu-check": (kernels.gpu_check, "checks of the kernels on an NVIDIA GPU"),
    "long-checks": (models.long_checks, "checks that take longer than tests may"),
    "models": (models.models, "what is compressed in every architecture of mlx-lm"),
    "models-vlm": (models.models_vlm, "the same of mlx-vlm's language models"),
    "research": (models.research, "settled research"),
}  # fmt: skip
# pages of docs/ that consist of figures, by where they lie from docs/results
GUIDES: dict[str, Callable[[], str]] = {"../apple.md": apple.apple}
# what stands between marks in other pages
INSERTED: dict[str, dict[str, Callable[[], str]]] = {
    "../../README.md": {"settings": settings.settings, "memory": models.memory_in_readme},
    "../centred-keys.md": {"scales": tables.scales_measured},
}
_MARKED = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def index() -> str:
    """The list of pages."""
    lines = [f"- [{name}.md]({name}.md): {about}" for name, (_, about) in PAGES.items()]
    return (
        "# Results\n\nMade by `scripts/results.py` from the records in "
        "[benchmarks/](../../benchmarks); not edited by hand.\n\n" + "\n".join(lines)
    )


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    made = {f"{name}.md": make() for name, (make, _) in PAGES.items()}
    made |= {"README.md": index(), **{name: make() for name, make in GUIDES.items()}}
    found = {name: f"{text}\n" for name, text in made.items()}
    for name, makers in INSERTED.items():
        found[name] = inserted((FOLDER / name).read_text(encoding="utf-8"), makers)
    return found


def inserted(text: str, makers: dict[str, Callable[[], str]]) -> str:
    """A page with what its makers make between the marks of their names; nothing leaves it."""

    def replaced(match: re.Match) -> str:
        made = makers[match[2]]()
        return f"{match[1]}{made}\n{match[4]}" if made else match[0]

    return _MARKED.sub(replaced, text)


def differing() -> list[str]:
    """Files of docs/results that are not what the records make, missing and left-over ones too."""
    made = pages()
    names = {*made, *(path.name for path in FOLDER.glob("*.md"))}
    paths = {name: FOLDER / name for name in names}
    found = {name: p.read_text(encoding="utf-8") for name, p in paths.items() if p.is_file()}
    return sorted(name for name in names if made.get(name) != found.get(name))


def main() -> None:
    changed = differing()
    if "--check" in sys.argv:
        if changed:
            sys.exit(f"docs/results: {', '.join(changed)} differ from the records.")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = pages()
    for name in changed:
        if name in made:
            (FOLDER / name).write_text(made[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    plot.draw(FOLDER / "kld-by-bits.svg")
    print(f"written: {', '.join(changed) or 'nothing has changed'}")


if __name__ == "__main__":
    main()
