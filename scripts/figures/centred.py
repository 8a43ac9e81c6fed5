"""Figures of centred keys."""

from __future__ import annotations

from . import figure, read, table


@figure
def centred() -> str:
    """Keys alone quantised, centred and not, at several contexts."""
    record = read("centred_keys")
    parts = record["parts"]
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
    return "\n\n".join([about, table(["K/V", *names.values()], rows), f"`{record['command']}`"])
