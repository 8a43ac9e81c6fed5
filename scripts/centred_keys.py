"""Centred keys on a model: what they bring, and what was tried around them.

Means are calibrated on one text (default: the package's sample) and measured on another. Parts:
formats (centred and not, at --ctx-size), contexts (512, 2,048 and 8,192 tokens), blocks (sizes of
a block of positions; reference back-end), sinks (first tokens' K and V in f16), layers (one
layer's keys quantised at a time). key_limits.py has what was tried on the quantiser itself.

    python scripts/centred_keys.py --text FILE --parts formats,contexts --json benchmarks/centred_keys.json

A finished part is kept in the JSON file and not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
from key_study import Study, packed_rows, run_parts  # noqa: E402

from mlx_turbokv.evaluate.configuration import Prepared  # noqa: E402
from mlx_turbokv.policy import LayerList  # noqa: E402

KEYS = ("turbo3", "turbo4", "turbo5", "turbo6")
PARTS = ("formats", "contexts", "blocks", "sinks", "layers")
BLOCKS = (16, 32, 64, 128, 256)


def configurations(study: Study, part: str) -> list[Prepared]:
    """What a part compares; the first is what the others are measured against."""
    configs = [study.config("f16/f16")]
    both = (False, True)
    if part == "formats":
        pairs = [f"{k}/f16" for k in KEYS] + ["turbo5/turbo3", "turbo4/turbo3"]
        configs += [study.config(pair, c) for pair in pairs for c in both]
    elif part.startswith("context"):
        configs += [study.config(f"{k}/f16", c) for k in KEYS for c in both]
    elif part == "blocks":
        configs += [study.config(f"{k}/f16") for k in ("turbo3", "turbo4")]
        configs += [
            study.config(f"{k}/f16", True, b, f"{k}/f16 centred, blocks of {b}")
            for k in ("turbo3", "turbo4") for b in BLOCKS
        ]  # fmt: skip
    elif part == "sinks":
        for k, v in (("turbo4", "f16"), ("turbo4", "turbo3"), ("turbo3", "turbo2")):
            for exact in ((0, 0), (1, 0), (0, 1), (1, 1), (4, 4)):
                label = f"{k}/{v} centred, K of {exact[0]} and V of {exact[1]} exact"
                configs.append(_packed(study, k, v, label, exact=exact))
            configs.append(_packed(study, k, v, f"{k}/{v} centred, the first too", bare=False))
            for exact in ((0, 0), (1, 0)):
                label = f"{k}/{v}, K of {exact[0]} exact"
                configs.append(_packed(study, k, v, label, exact=exact, centred=False))
    elif part == "layers":
        n = len(study.centres())
        for i in range(n):
            pairs = tuple(("turbo3" if i == j else "f16", "f16") for j in range(n))
            for centred in both:
                name = f"layer {i}" + (" centred" if centred else "")
                configs.append(study.config(LayerList(pairs, name), centred, label=name))
    return configs


def _packed(study: Study, k: str, v: str, label: str, **options) -> Prepared:
    return study.simulated(label, lambda _: packed_rows(k, v, study.backend), **options)


def sizes(part: str, n_ctx: int, chunks: int) -> tuple[int, int]:
    """Tokens of a window and windows; long contexts get fewer, so that all have as many tokens."""
    if part.startswith("context "):
        n_ctx = int(part.split()[1])
        chunks = max(1, chunks * 512 // n_ctx)
    return n_ctx, chunks


@click.command()
@click.option("--model", default=None, help="As the commands take it.")
@click.option("--text", default="wikitext-2", help="A text file, 'sample' or 'wikitext-2'.")
@click.option("--calibration", default="sample", help="The text of the means.")
@click.option("--calibration-windows", default=6, show_default=True)
@click.option("--backend", default=None, help="Which kernels; blocks need the reference's.")
@click.option("-c", "--ctx-size", default=512, show_default=True)
@click.option("--contexts", default="512,2048,8192", show_default=True)
@click.option("--chunks", default=64, show_default=True, help="Windows of --ctx-size tokens.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/centred_keys.json"))
def main(
    model,
    text,
    calibration,
    calibration_windows,
    backend,
    ctx_size,
    contexts,
    chunks,
    parts,
    json_path,
):
    study = Study(model, text, calibration, calibration_windows, backend)
    names = []
    for part in parts.split(","):
        names += [f"context {n}" for n in contexts.split(",")] if part == "contexts" else [part]

    def measure(part: str) -> dict:
        windows = study.windows(*sizes(part, ctx_size, chunks))
        return study.measured(part, windows, configurations(study, part))

    run_parts(study, names, measure, Path(json_path))


if __name__ == "__main__":
    main()
