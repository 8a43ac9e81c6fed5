"""The page on Gemma 3 270M: its loss beside llama.cpp's, and which of its layers to protect."""

from __future__ import annotations

import boundary_layers
import numpy as np
from few_windows import NOTE, interval_of

from mlx_turbokv.quant.formats import as_format

from . import ROOT, read, source, table

BOUNDARY = "boundary_gemma"
LONG = 32768  # tokens


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
    growing, window = layers["growing"], layers["window"]
    named_raw = [i for i in growing if i < 2 or i >= n - 2]
    parts = [
        "## Boundary layers by ordinal and by raw index",
        f"The paper's open end: its code protects layers by raw index. Of the {n} layers here, "
        f"{_listed(growing)} grow with the context and the others have windows of {window:,} "
        f"tokens. By default only those {len(growing)} are packed, and policies count them alone: "
        "2+2 by ordinal protects all of them (`q8_0/q8_0`), 2+2 by raw index "
        f"{_listed(named_raw)}. So at equal bits the question is which of them a choice protects. "
        "With the windows packed too (`--compress-sliding`, as the paper's code does) an ordinal "
        "is the raw index. A window's cache does not grow: at long contexts protecting such a "
        "layer costs next to nothing, and almost all bits are those of the layers that grow.",
        f"K {formats['k']}, V {formats['v']}, and {formats['protected_v']} in the layers that are "
        "protected; no tokens are. Gains are of KLD over no protection with the same layers "
        f"packed, paired over windows; in brackets 95 % intervals. {NOTE} At "
        f"{LONG:,}: V bits of what so many tokens keep, {window:,} of them in a window.",
    ]
    if max(map(int, record["tables"]), default=0) <= window:
        parts[-1] += " The texts measured here are not longer than a window."
    for n_ctx, part in record["tables"].items():
        rows = {row["config"]: row for row in part["rows"]}
        for packs_windows in (False, True):
            found = [
                (about["protected"], rows[name]) for name, about in record["choices"].items()
                if name in rows and about["packs_windows"] == packs_windows
            ]  # fmt: skip
            if found:
                what = "All layers packed" if packs_windows else "Layers that grow packed"
                header = ["protected layers", "V bits", f"at {LONG:,}", "KLD", "gain", "Δnll"]
                parts += [
                    f"{what}, {part['n_windows']} windows of {int(n_ctx):,} tokens:",
                    table(header, _lines(found, layers, packs_windows)),
                ]
                parts += [] if packs_windows else [_single(found, named_raw)]
    return "\n\n".join(part for part in parts if part)


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _names(layers: dict, packs_windows: bool) -> dict[tuple[int, ...], str]:
    """What choices of layers are called, by their raw indices."""
    growing, every = layers["growing"], layers["all"]

    def ends(indices: list[int], first: int, last: int) -> tuple[int, ...]:
        return tuple(sorted({*indices[:first], *indices[len(indices) - last :]}))

    raw = {f"{a}+{b} by raw index": ends(every, a, b) for a, b in boundary_layers.RAW}
    if packs_windows:
        names = {chosen: name for name, chosen in raw.items()}
        names |= {ends(growing, 1, 1): "the first and the last that grow"}
        return names | {tuple(growing): "all that grow", tuple(every): "all"}
    names = {tuple(i for i in chosen if i in growing): name for name, chosen in raw.items()}
    names |= {ends(growing, 1, 1): "1+1 by ordinal", ends(growing, 2, 2): "2+2 by ordinal"}
    return names


def _lines(found: list, layers: dict, packs_windows: bool) -> list[list[str]]:
    """The measured choices, fewest protected layers first, the least KLD first among them."""
    plain = next((row for protected, row in found if not protected), None)
    names, lines = _names(layers, packs_windows), []
    for protected, row in sorted(found, key=lambda x: (len(x[0]), x[1]["kld"]["mean"])):
        label, name = _listed(protected), names.get(tuple(protected))
        if name is not None and protected:
            label = f"{name} ({label})" if len(protected) < len(layers["all"]) else name
        gain = "–" if plain is None or not protected else _gain(plain, row)
        long = _bits_at(protected, layers, packs_windows, LONG)
        kld = _over_windows(row["kld_by_window"], ".5f")
        loss = _over_windows(row["delta_nll_by_window"], "+.4f")
        lines.append([label, f"{row['v_bits']:.2f}", f"{long:.2f}", kld, gain, loss])
    return lines


def _bits_at(protected: list[int], layers: dict, packs_windows: bool, tokens: int) -> float:
    """V bits a value of what the packed layers keep of so many tokens; heads are alike."""
    bits = [
        as_format(x).bits_per_value(32) for x in (boundary_layers.V, boundary_layers.PROTECTED_V)
    ]
    kept = {i: tokens if i in layers["growing"] else min(tokens, layers["window"])
            for i in (layers["all"] if packs_windows else layers["growing"])}  # fmt: skip
    return sum(n * bits[i in protected] for i, n in kept.items()) / sum(kept.values())


def _single(found: list, named_raw: list[int]) -> str:
    """How the one layer that raw indices name compares with each other one."""
    single = {protected[0]: row for protected, row in found if len(protected) == 1}
    if len(named_raw) != 1 or named_raw[0] not in single or len(single) < 2:
        return ""
    own = np.array(single[named_raw[0]]["kld_by_window"])
    others = [
        f"{i}: {_difference(own - np.array(row['kld_by_window']))}"
        for i, row in single.items() if i != named_raw[0]
    ]  # fmt: skip
    return (
        f"One protected layer: how much more KLD is left with {named_raw[0]}, the one that raw "
        f"indices name, than with {'; with '.join(others)}."
    )


def _gain(plain: dict, row: dict) -> str:
    return _difference(np.array(plain["kld_by_window"]) - np.array(row["kld_by_window"]))


def _difference(apart: np.ndarray) -> str:
    return _over_windows(apart, "+.5f")


def _over_windows(values: np.ndarray | list[float], spec: str) -> str:
    """A mean over windows with its interval."""
    values = np.asarray(values)
    ends, mean = interval_of(values), f"{values.mean():{spec}}"
    return mean if ends is None else f"{mean} ({ends[0]:{spec}} to {ends[1]:{spec}})"
