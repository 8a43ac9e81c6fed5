"""The page on Gemma 3 270M: its loss beside llama.cpp's, and which of its layers to protect."""

from __future__ import annotations

import boundary_layers
import numpy as np

from mlx_turbokv.evaluate.statistics import bootstrap_interval

from . import ROOT, interval, read, source, table

BOUNDARY = "boundary_gemma"


def gemma() -> str:
    """Loss beside llama.cpp's, and boundary layers by ordinal and by raw index."""
    record = read("gemma_llama_cpp")
    parts = [
        "# Gemma 3 270M",
        "From a GGUF file (Q4_K_M), with an f16 cache. What formats of K and V cost it: "
        "[quality.md](quality.md).",
        _losses(record),
        source("gemma_llama_cpp", record),
    ]
    if (ROOT / f"benchmarks/{BOUNDARY}.json").is_file():
        found = read(BOUNDARY)
        parts += [boundaries(found), source(BOUNDARY, found)]
    return "\n\n".join(parts)


def _losses(record: dict) -> str:
    """Both losses on the same windows, and how far they are apart."""
    here, there = (np.array(record[key]) for key in ("nll_by_window_here", "nll_by_window"))
    apart = here - there
    error = apart.std(ddof=1) / len(apart) ** 0.5
    lines = [
        ["mlx_turbokv (float32)", f"{here.mean():.4f}", f"{np.exp(here.mean()):.3f}"],
        [f"llama.cpp {record['llama_cpp']}", f"{there.mean():.4f}", f"{np.exp(there.mean()):.3f}"],
    ]
    return "\n\n".join([
        f"Loss of the same {len(here)} windows of {record['n_ctx']} tokens of wikitext-2, f16 "
        f"cache. The difference is {apart.mean():+.4f} ± {error:.4f} nats a token, in the farthest "
        f"window {apart[np.abs(apart).argmax()]:+.4f}: llama.cpp rounds activations to 8 bits on "
        "a CPU.",
        table(["", "nats a token", "PPL"], lines),
    ])  # fmt: skip


def boundaries(record: dict) -> str:
    """What protecting layers by ordinal and by raw index gains, at equal bits."""
    layers, formats, n = record["layers"], record["formats"], len(record["layers"]["all"])
    growing = layers["growing"]
    last_two = [i for i in growing if i < 2 or i >= n - 2]
    parts = [
        "## Boundary layers by ordinal and by raw index",
        f"The paper's open end: its code protects layers by raw index. Of the {n} layers here, "
        f"{_listed(growing)} grow with the context and the others have windows of "
        f"{layers['window']:,} tokens. By default only those {len(growing)} are packed: 2+2 by "
        f"ordinal protects all of them (q8_0/q8_0), 2+2 by raw index {_listed(last_two)} alone. "
        "So the question at equal bits is which of them a choice protects. With the windows packed "
        "too (`--compress-sliding`, as the paper's code does), all layers have an ordinal, which "
        "is the raw index. A window's cache does not grow: at long contexts the bits of those that "
        "grow are all that counts, and a boundary of windows buys nothing there.",
        f"K {formats['k']}, V {formats['v']}, and {formats['protected_v']} in the layers that are "
        "protected. Gains are of KLD over no protection with the same layers packed; in brackets "
        "95 % intervals, bootstrap over windows, those of gains paired.",
    ]
    for n_ctx, part in record["tables"].items():
        rows = {row["config"]: row for row in part["rows"]}
        named = _named(layers)
        for packs_windows in (False, True):
            lines = _lines(rows, record["choices"], packs_windows, named)
            if lines:
                what = "All layers packed" if packs_windows else "Layers that grow packed"
                header = ["protected layers", "V bits", "KLD", "gain", "Δnll"]
                parts += [f"{what}, {part['n_windows']} windows of {int(n_ctx):,} tokens:",
                          table(header, lines)]  # fmt: skip
    return "\n\n".join(parts)


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _named(layers: dict) -> dict[tuple[int, ...], str]:
    """What choices of layers are called, by their raw indices."""
    growing, all_layers = layers["growing"], layers["all"]
    names = {
        tuple(
            sorted({*all_layers[:a], *all_layers[len(all_layers) - b :]})
        ): f"{a}+{b} by raw index"
        for a, b in boundary_layers.RAW
    }
    names[tuple(sorted({growing[0], growing[-1]}))] = "1+1 by ordinal"
    names[tuple(growing)] = "all that grow"
    names[tuple(all_layers)] = "all"
    inside = [i for i in growing if i < 2 or i >= len(all_layers) - 2]
    names.setdefault(tuple(inside), "2+2 by raw index, of those that grow")
    names[()] = "none"
    return names


def _lines(rows: dict, choices: dict, packs_windows: bool, named: dict) -> list[list[str]]:
    """The measured choices, fewest protected layers first, the largest gain first among them."""
    found = [
        (about["protected"], rows[name]) for name, about in choices.items()
        if name in rows and about["packs_windows"] == packs_windows
    ]  # fmt: skip
    plain = next((row for protected, row in found if not protected), None)
    lines = []
    for protected, row in sorted(found, key=lambda x: (len(x[0]), x[1]["kld"]["mean"])):
        name = named.get(tuple(protected))
        label = _listed(protected) if name is None or not protected else (
            f"{name} ({_listed(protected)})" if len(protected) < 8 else name
        )  # fmt: skip
        gain = "–" if plain is None or not protected else _gain(plain, row)
        lines.append([label, f"{row['v_bits']:.2f}", interval(row["kld"], ".5f"), gain,
                      interval(row["delta_nll"], "+.4f")])  # fmt: skip
    return lines


def _gain(plain: dict, row: dict) -> str:
    apart = np.array(plain["kld_by_window"]) - np.array(row["kld_by_window"])
    ends = bootstrap_interval(apart)
    mean = f"{apart.mean():+.5f}"
    return mean if ends is None else f"{mean} ({ends[0]:+.5f} to {ends[1]:+.5f})"
