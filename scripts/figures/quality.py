"""Figures of quality: perplexity, calibrated policies, needles, the paper's claims, the report."""

from __future__ import annotations

from mlx_turbokv.evaluate import needle_table
from mlx_turbokv.evaluate.statistics import ratio
from mlx_turbokv.evaluate.table import as_markdown, footnotes, heading
from mlx_turbokv.report import summary
from paper_tables import difference_cell

from . import figure, read, table


@figure
def perplexity() -> str:
    """Perplexity and divergence, with the command that made them."""
    record = read("perplexity")
    parts = [heading(record).replace("\n", "; ") + ".", as_markdown(record["results"])]
    return "\n\n".join([*parts, footnotes(record), f"`{record['command']}`"])


@figure
def calibrated() -> str:
    """Calibrated policies beside uniform formats, Boundary V and mlx-lm's caches."""
    record = read("calibrate")
    found = {r["config"]: r for r in record["results"]}
    boundary = found["la-v7"]
    policies = [r for name, r in found.items() if name.startswith("sample/")]
    ratios = {n: ratio(r["kld_by_window"], boundary["kld_by_window"]) for n, r in found.items()}
    shown = policies + [found[name] for name in BESIDE_CALIBRATED]
    rows = [
        [_policy_name(r["config"]), f"{r['bits_per_value']:.3f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.5f} ± {r['kld']['se']:.5f}",
         f"{100 * r['same_top']['mean']:.1f} %", _ratio_text(ratios[r["config"]])]
        for r in sorted(shown, key=lambda r: -r["bits_per_value"])
    ]  # fmt: skip
    at_its_bits = next(r for r in policies if r["config"].endswith("bits-la-v7.json"))
    enough = [r for r in policies if ratios[r["config"]]["interval"][1] <= 1]
    least = min(enough, key=lambda r: r["bits_per_value"])
    summary = (
        f"At the bits of `la-v7` ({boundary['bits_per_value']:.3f} per value), the calibrated "
        f"policy has {_ratio_text(ratios[at_its_bits['config']])} times its KLD. The smallest "
        f"budget here that does not exceed its KLD, with the whole interval, is "
        f"{least['bits_per_value']:.3f} bits: "
        f"{least['bits_per_value'] / boundary['bits_per_value']:.2f} of its bits."
    )
    checked = read("calibration")["policies"]
    factors = [at["measured_over_predicted"]["mean"] for at in checked]
    most = max(checked, key=lambda at: at["measured_over_predicted"]["mean"])
    summary += (
        f" On the calibration windows the whole assignments measured {min(factors):.2f} to "
        f"{max(factors):.2f} times what was predicted, the most at {most['bits_per_value']:.3f} bits."
    )
    uniform = {r["bits_per_value"]: r for r in record["results"] if r["config"] in EQUAL_BITS}
    beside = [
        r["kld"]["mean"] / uniform[r["bits_per_value"]]["kld"]["mean"]
        for r in policies if r["bits_per_value"] in uniform
    ]  # fmt: skip
    summary += (
        " Much of the gain is the balance between K and V, which one pair of formats in every layer "
        f"can strike too: `turbo6/turbo5` has {_ratio_text(ratios['turbo6/turbo5'])} times the KLD "
        f"of `la-v7`. At equal bits, calibrated policies have {min(beside):.2f} to "
        f"{max(beside):.2f} times the KLD of one pair in every layer."
    )
    long = read("calibrate_long")
    by_name = {r["config"]: r["kld_by_window"] for r in long["results"]}
    at_length = ratio(by_name["sample/bits-la-v7.json"], by_name["la-v7"])
    summary += (
        f" Over {long['n_windows']} windows of {long['n_ctx']:,} tokens "
        f"({long['environment']['device']}) the first of these ratios is "
        f"{_ratio_text(at_length)}."
    )
    few = {r["windows"]: max(r["mean_excess"]) for r in read("calibration_windows")["rows"]}
    summary += (
        f" Few windows are enough: on the windows left out, policies from one window are predicted "
        f"to cost at most {few[1]:.1%} more than the best ones, from four {few[4]:.1%}."
    )
    about = heading(record).replace("\n", "; ") + ". In brackets: 95 % interval, paired bootstrap."
    header = ["K/V", "bits/value", "K bits", "V bits", "KLD", "same top", "KLD / `la-v7`'s"]
    return "\n\n".join([summary, about, table(header, rows), f"`{record['command']}`"])


BESIDE_CALIBRATED = (
    "q8_0/q8_0", "la-v7", "mode-10", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5",
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
)  # fmt: skip
EQUAL_BITS = (
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "turbo3/turbo2",
)  # fmt: skip


def _policy_name(config: str) -> str:
    """sample/bits-3.5.json is a policy calibrated for 3.5 bits."""
    if not config.endswith(".json"):
        return config
    budget = config.split("/")[-1].removeprefix("bits-").removesuffix(".json")
    return f"**calibrated** for {budget if budget.startswith('la') else budget + ' bits'}"


def _ratio_text(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"


@figure
def needle() -> str:
    """What is still found, f16 beside every configuration."""
    record = read("needle")
    parts = [needle_table.heading(record).replace("\n", "; ") + "."]
    parts += [needle_table.as_markdown(record["summary"]), needle_table.footnotes(record)]
    if record["not_measured"]:
        n, left = len(record["cases"]), record["not_measured"]
        parts.append(f"{left} of {n + left} cases were left when the time was over.")
    return "\n\n".join([*parts, f"`{record['command']}`"])


@figure
def claims() -> str:
    """The paper's claims on the default model."""
    record = read("paper_claims")
    long = record["long"]
    about = (
        f"{record['model']['name']} on {record['text']['name']}, {record['n_windows']} windows of "
        f"{record['n_ctx']:,} and {long['n_windows']} of {long['n_ctx']:,}; "
        f"{record['environment']['device']}."
    )
    rows = [
        [
            entry["claim"],
            entry["where"],
            difference_cell(entry),
            entry["verdict"],
            entry["by_kld"]["verdict"] if "by_kld" in entry else "–",
        ]
        for entry in record["claims"]
    ]
    header = ["the paper says", "tokens", "difference, nats (95 %)", "by loss", "by divergence from f16"]
    return "\n\n".join([about, table(header, rows), f"`{record['command']}`"])


@figure
def report() -> str:
    """The summary of a report on the default model."""
    record = read("report")
    header, rows, front = summary.table_of(record)
    rows = [[f"{row[0]} ●" if row[0] in front else row[0], *row[1:]] for row in rows]
    quality, needles = record["perplexity"], record["needle"]
    about = (
        f"{record['model']['name']}, {record['environment']['device']}, back-end "
        f"{record['backend']}: {quality['n_windows']} windows of {quality['n_ctx']} of "
        f"{quality['text']['name']}, {len(needles['cases'])} needles at "
        f"{' and '.join(f'{n:,}' for n in needles['contexts'])} tokens."
    )
    parts = [about, table(header, rows), " ".join(summary.notes(record))]
    return "\n\n".join([*parts, f"`{quality['command']}`"])
