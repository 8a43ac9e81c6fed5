"""Figures of centred keys."""

from __future__ import annotations

from mlx_turbokv.evaluate.statistics import ratio

from . import figure, read, table
from .kernels import with_anchors


@figure
def centred() -> str:
    """Keys alone quantised, centred and not, at several contexts."""
    parts = read("centred_keys")["parts"]
    record = parts["formats"]
    kld = {
        (name, row["config"]): row["kld"] for name, part in parts.items() for row in part["rows"]
    }

    def cell(name: str, config: str) -> str:
        pair = kld[name, config]["mean"], kld[name, f"{config} centred"]["mean"]
        return f"{pair[0]:.4f} → {pair[1]:.4f} ({pair[1] / pair[0]:.2f})"

    names = {name: f"{part['n_ctx']:,} tokens" for name, part in parts.items()}
    rows = []
    for config in dict.fromkeys(c.removesuffix(" centred") for _, c in kld if c != "f16/f16"):
        rows.append([config, *(cell(n, config) if (n, config) in kld else "" for n in names)])
    windows = ", ".join(f"{part['windows']} of {part['n_ctx']:,}" for part in parts.values())
    about = (
        f"The default model in {record['model']['dtype']} on wikitext-2 (sha256 "
        f"{record['text_sha256'][:12]}…), windows: {windows}; means from "
        f"{record['calibration_windows']} windows of the package's own sample; {record['device']}, "
        f"back-end {record['backend']}, mlx {record['mlx']}. KLD against f16, not centred → centred "
        "(ratio)."
    )
    commands = dict.fromkeys(f"`{part['command']}`" for part in parts.values())
    return "\n\n".join([about, table(["K/V", *names.values()], rows), *commands])


@figure
def calibrated_keys() -> dict[str, str]:
    """Policies calibrated with centred keys, beside Boundary V on the same held-out windows."""
    record = read("calibrate_keys")
    held = {r["config"]: r for r in record["held_out"]["results"]}
    boundary = held["la-v7"]["bits_per_value"]
    policies = [held[at["policy"]] for at in record["policies"]]
    least = min(
        (r for r in policies if r["kld_ratio_to"]["la-v7"]["interval"][1] <= 1),
        key=lambda r: r["bits_per_value"],
    )
    rows = [
        [_named(r["config"]), f"{r['bits_per_value']:.3f}",
         f"{r['bits_per_value'] / boundary:.2f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.4f} ± {r['kld']['se']:.4f}",
         _ratio(r["kld_ratio_to"]["la-v7"])]
        for r in sorted(held.values(), key=lambda r: -r["bits_per_value"])
        if r["config"] != "f16/f16"
    ]  # fmt: skip
    calibration = record["calibration"]
    about = (
        f"The default model in {record['model']['dtype']}: {record['held_out']['n_windows']} windows "
        f"of {record['held_out']['n_ctx']} of wikitext-2 (sha256 "
        f"{record['held_out']['text']['sha256'][:12]}…), calibrated on {calibration['n_windows']} "
        f"of the package's own sample; {record['environment']['device']}, back-end "
        f"{least['backend']}, mlx {record['environment']['mlx']}. In brackets: 95 % interval, paired "
        "bootstrap."
    )
    header = [
        "K/V, centred",
        "bits/value",
        "of `la-v7`'s",
        "K bits",
        "V bits",
        "KLD",
        "KLD / `la-v7`'s",
    ]
    before = {r["config"]: r for r in read("calibrate_64")["results"]}
    uncalibrated = before["with-keys/bits-3.25.json"]
    return {
        "table": "\n\n".join([about, table(header, rows), f"`{record['command']}`"]),
        "bits": f"{least['bits_per_value']:.2f}",
        "share": f"{least['bits_per_value'] / boundary:.2f}",
        "ratio": _ratio(least["kld_ratio_to"]["la-v7"]),
        "boundary_bits": f"{boundary:.2f}",
        "centred_afterwards": _ratio(
            ratio(uncalibrated["kld_by_window"], before["la-v7"]["kld_by_window"])
        ),
        "afterwards_bits": f"{uncalibrated['bits_per_value']:.2f}",
    }


def _named(config: str) -> str:
    if not config.endswith(".json"):
        return config
    return f"**calibrated** for {config.removeprefix('bits-').removesuffix('.json')} bits"


def _ratio(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"


@figure
def synthetic_keys() -> dict[str, str]:
    """The tiny Qwen2 whose key biases are as large and as slow as real ones."""
    record = read("synthetic_keys")
    found = {(row["k"], row["centred"]): row for row in record["rows"]}
    names = list(dict.fromkeys(row["k"] for row in record["rows"]))
    rows = [
        [
            k,
            *(
                f"{found[k, c]['kld']['mean']:.4f} ± {found[k, c]['kld']['se']:.4f}"
                for c in (False, True)
            ),
        ]
        for k in names
    ]
    about = (
        f"{record['models']} random models, {record['tokens']} tokens each; ± is one standard error "
        f"over models. {record['device']}, mlx {record['mlx']}."
    )
    return {
        "table": "\n\n".join(
            [about, table(["K", "not centred", "centred"], rows), f"`{record['command']}`"]
        ),
        "ratio": f"{record['bias_over_rest']:.0f}",
    }


@figure
def centred_decode() -> str:
    """What anchors add to the time of decode attention, from the kernels' record."""
    rows = [r for r in read("bench_kernels")["rows"] if r.get("part") == "centred"]
    return with_anchors(rows, lambda pair, us, plain: f"{us / plain - 1:+.1%} with {pair}")
