"""Figures of what limits centred keys, and of what was tried around them."""

from __future__ import annotations

import numpy as np

from mlx_turbokv.evaluate.statistics import ratio

from . import figure, read, table

BITS = (2, 3, 4)
BUILT = 32  # positions of a block
SHOWN_LAYERS = 8
# of bits: where a difference is no difference
SAME_BITS = 0.01
EXACT = {
    "nothing": "", "the first key": ", first key exact",
    "the loudest 1 % of the tokens": ", loudest tokens exact",
    "as many others": ", as many others exact",
    "the 4 pairs of a head that weigh most": ", loudest pairs exact",
    "the 4 pairs that weigh least": ", quietest pairs exact",
}  # fmt: skip
EQUAL = {
    "a norm per 32 values (`turboN:32`)": ("turbo", "turbo{}:32/f16 centred"),
    "one norm for all heads of a layer": ("norms", "{} bits, one norm a layer"),
    "the same, the first key exact": ("norms", "{} bits, one norm a layer, first key exact"),
    "pairs scaled by (energy / queries') ** 1/8": ("scales", "{} bits, scales to the 0.125"),
    "the same, ** 1/4": ("scales", "{} bits, scales to the 0.25"),
    "the same, ** 1/4, the first key exact": ("scales", "{} bits, scales to the 0.25, first key exact"),
    "bits by energy": ("energy", "{} bits by energy"),
    "bits by energy, scaled": ("energy", "{} bits by energy, scaled"),
    "bits by energy, scaled, one norm a head": ("energy", "{} bits by energy, scaled, one norm"),
    "bits by energy, not centred": ("energy", "{} bits by energy, not centred"),
    "not centred": ("turbo", "turbo{}/f16"),
}  # fmt: skip


def _part(name: str) -> dict:
    return read("centred_keys_tried")["parts"][name]


def _rows(name: str) -> dict[str, dict]:
    return {row["config"]: row for row in _part(name)["rows"]}


def _kld(row: dict) -> str:
    return f"{row['kld']['mean']:.4f}"


def about(part: dict) -> str:
    """The conditions of a part, for people."""
    return (
        f"The default model in {part['model']['dtype']}, {part['windows']} windows of "
        f"{part['n_ctx']} of wikitext-2 (sha256 {part['text_sha256'][:12]}…), means and energies "
        f"from {part['calibration_windows']} windows of the package's sample; {part['device']}, "
        f"mlx {part['mlx']}. KLD against f16, values in f16."
    )


@figure
def key_blocks() -> dict[str, str]:
    """Sizes of a block of positions."""
    part, found = _part("blocks"), _rows("blocks")
    left = {row["block"]: row for row in _part("drift")["rows"]}
    rows = [["not centred", "", "", *(_kld(found[f"turbo{b}/f16"]) for b in (3, 4))]]
    for size, row in left.items():
        cells = [f"{row['mean']:.1%}", f"{row['mean_and_slope']:.1%}"]
        klds = [_kld(found[f"turbo{b}/f16 centred, blocks of {size}"]) for b in (3, 4)]
        rows.append([f"blocks of {size}", *cells, *klds])
    header = ["", "left of mu", "with a slope", "turbo3", "turbo4"]

    def halved(bits: int) -> str:
        """Blocks of half the built size, over those."""
        return _times(
            *(found[f"turbo{bits}/f16 centred, blocks of {n}"] for n in (BUILT // 2, BUILT))
        )

    return {
        "table": "\n\n".join([about(part), table(header, rows), f"`{part['command']}`"]),
        "halved_3": halved(3),
        "halved_4": halved(4),
        "slope": f"{left[BUILT]['mean_and_slope']:.0%}",
        "half": f"{left[BUILT // 2]['mean']:.0%}",
    }


@figure
def key_sinks() -> dict[str, str]:
    """First tokens' keys and values exact, and the first key centred or not."""
    part, found = _part("sinks"), _rows("sinks")
    pairs = ("turbo4/f16", "turbo4/turbo3", "turbo3/turbo2")
    labels = {
        "as built: the first key whole": " centred, K of 0 and V of 0 exact",
        "the first key centred too": " centred, the first too",
        "K of 1 exact": " centred, K of 1 and V of 0 exact",
        "V of 1 exact": " centred, K of 0 and V of 1 exact",
        "K and V of 1 exact": " centred, K of 1 and V of 1 exact",
        "K and V of 4 exact": " centred, K of 4 and V of 4 exact",
        "not centred": ", K of 0 exact",
        "not centred, K of 1 exact": ", K of 1 exact",
    }
    rows = []
    for label, end in labels.items():
        cells = []
        for pair in pairs:
            row, built = found[pair + end], found[f"{pair} centred, K of 0 and V of 0 exact"]
            cells.append(_kld(row) + ("" if row is built else f" ({_times(row, built)})"))
        rows.append([label, *cells])
    text = about(part).replace(", values in f16", "; in brackets over what is built, 95 % interval")
    built = found["turbo4/turbo3 centred, K of 0 and V of 0 exact"]
    return {
        "table": "\n\n".join([text, table(["first tokens", *pairs], rows), f"`{part['command']}`"]),
        "both_of_4": _times(found["turbo4/turbo3 centred, K of 4 and V of 4 exact"], built),
        "both_of_1": _times(found["turbo4/turbo3 centred, K of 1 and V of 1 exact"], built),
    }


@figure
def key_layers() -> dict[str, str]:
    """Layer by layer: what turbo3 keys of it alone cost, and where their energy is."""
    part, channels = _part("layers"), _part("channels")
    found, layers = _rows("layers"), channels["layers"]
    alone = {
        i: [found[f"layer {i}{end}"]["kld"]["mean"] for end in ("", " centred")]
        for i in range(len(layers))
    }
    order = sorted(alone, key=lambda i: -alone[i][1])
    rows = []
    for i in order[:SHOWN_LAYERS]:
        at = layers[i]
        rows.append([
            str(i), *(f"{x:.5f}" for x in alone[i]), f"{at['energy_left']:.0%}",
            f"{at['loud_pairs_share']:.0%}", f"{at['loud_pairs_weight']:.0%}",
            f"{at['loud_tokens_share']:.1%}", f"{at['loudest_energy']:.1f}",
        ])  # fmt: skip
    header = [
        "layer", "not centred", "centred", "energy left", "4 loudest pairs", "weighted",
        "loudest 1 % of tokens", "loudest token",
    ]  # fmt: skip
    centred = np.array([alone[i][1] for i in order])
    return {
        "table": "\n\n".join(
            [about(part), table(header, rows), f"`{part['command']}`, `{channels['command']}`"]
        ),
        "shown": str(SHOWN_LAYERS),
        "n": str(len(order)),
        "share": f"{centred[:SHOWN_LAYERS].sum() / centred.sum():.0%}",
        "pairs_share": f"{np.mean([at['loud_pairs_share'] for at in layers]):.0%}",
        "tokens_share": f"{np.mean([at['loud_tokens_share'] for at in layers]):.1%}",
    }


@figure
def key_exact() -> dict[str, str]:
    """What is gained where some pairs, or some tokens, stay exact."""
    part, found = _part("exact"), _rows("exact")
    rows = []
    for label, end in EXACT.items():
        cells = []
        for bits in BITS:
            row, plain = found[f"{bits} bits{end}"], found[f"{bits} bits"]
            cells.append(_kld(row) + (f" ({_times(row, plain)})" if end else ""))
        rows.append([label, *cells])
    text = about(part).replace(
        "values in f16", "values in f16; in brackets over nothing exact, 95 % interval"
    )
    header = ["exact", *(f"turbo{b}" for b in BITS)]
    plain = found["3 bits"]
    return {
        "table": "\n\n".join([text, table(header, rows), f"`{part['command']}`"]),
        "pairs": _times(found["3 bits, loudest pairs exact"], plain),
        "tokens": _times(found["3 bits, loudest tokens exact"], plain),
    }


@figure
def key_schemes() -> dict[str, str]:
    """Other ways to spend the bits of centred keys, against turbo at the same bits."""
    part, turbo = _part("scales"), _rows("turbo")
    curve = [turbo[f"turbo{b}/f16 centred"] for b in (2, 3, 4, 5)]
    rows, ratios = [["as built", *(f"{_kld(turbo[f'turbo{b}/f16 centred'])}" for b in BITS)]], {}
    for label, (name, config) in EQUAL.items():
        found, cells = None if name == "energy" else _rows(name), []
        for bits in BITS:
            row = (found or _rows(f"energy {bits}"))[config.format(bits)]
            ratios[label, bits], text = _over_turbo(row, curve)
            cells.append(f"{_kld(row)} ({text})")
        rows.append([label, *cells])
    text = about(part).replace(
        "values in f16", "values in f16; in brackets, over centred turbo keys of the same bits: with "
        "a 95 % interval where there is such a format, else between the formats on either side"
    )  # fmt: skip
    fewer = _part(f"energy {BITS[0]}")
    if fewer["windows"] != part["windows"]:
        text += f" Bits by energy: the first {fewer['windows']} of the windows, on {fewer['device']}, beside the same of turbo."
    header = ["", *(f"{b}.25 bits or near" for b in BITS)]
    commands = [f"`{_part(name)['command']}`" for name in ("turbo", "scales", f"energy {BITS[0]}")]

    def between(label: str) -> str:
        found = sorted(ratios[label, b] for b in BITS)
        return f"{found[0]:.2f} to {found[-1]:.2f}"

    return {
        "table": "\n\n".join([text, table(header, rows), *commands]),
        "energy": between("bits by energy"),
        "scales": between("pairs scaled by (energy / queries') ** 1/8"),
        "energy_bare": between("bits by energy, not centred"),
        "one_norm": between("bits by energy, scaled, one norm a head"),
        "per_32": between("a norm per 32 values (`turboN:32`)"),
        "layer": between("one norm for all heads of a layer"),
    }


def _over_turbo(row: dict, curve: list[dict]) -> tuple[float, str]:
    """KLD over that of turbo keys at the bits of a row; the latter between two formats by bits."""
    for at in curve:
        if abs(at["k_bits"] - row["k_bits"]) < SAME_BITS:
            over = _times(row, at)
            return float(over.split(",")[0]), over
    n = len(row["kld_by_window"])  # the first windows of both
    bits, logs = (
        [at["k_bits"] for at in curve],
        [np.log(np.mean(at["kld_by_window"][:n])) for at in curve],
    )
    slope = (logs[1] - logs[0]) / (bits[1] - bits[0])
    log = np.interp(row["k_bits"], bits, logs) + min(0, row["k_bits"] - bits[0]) * slope
    over = row["kld"]["mean"] / float(np.exp(log))
    return over, f"{over:.2f} at {row['k_bits']:.2f} bits"


def _times(row: dict, other: dict) -> str:
    n = min(len(row["kld_by_window"]), len(other["kld_by_window"]))  # the first windows of both
    found = ratio(row["kld_by_window"][:n], other["kld_by_window"][:n])
    low, high = found["interval"]
    return f"{found['mean']:.2f}, {low:.2f} to {high:.2f}"
