"""Pages on quality of the default model: calibrated policies, centred keys, a report."""

from __future__ import annotations

from mlx_turbokv.evaluate.statistics import ratio
from mlx_turbokv.report import order, summary
from mlx_turbokv.report.recommendation import recommendation

from . import commands, interval, read, source, table

BOUNDARY = "la-v7"
UNIFORM = (
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "turbo3/turbo2",
)  # fmt: skip
WITH_CALIBRATED = (
    "q8_0/q8_0", "la-v7", "mode-10", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5", "mlx-kv4:64",
    "mlx-kv3:64", *UNIFORM[:-1],
)  # fmt: skip


def policy_name(config: str) -> str:
    """…/bits-3.5.json is a policy calibrated for 3.5 bits."""
    if not config.endswith(".json"):
        return config
    budget = config.split("/")[-1].removeprefix("bits-").removesuffix(".json")
    return f"**calibrated** for {budget if budget.startswith('la') else budget + ' bits'}"


def _by_config(record: dict) -> dict[str, dict]:
    return {r["config"]: r for r in record["results"]}


def _ratio(found: dict[str, dict], name: str, other: str = BOUNDARY) -> dict:
    """KLD over another configuration's, paired over windows."""
    return ratio(found[name]["kld_by_window"], found[other]["kld_by_window"])


def calibration() -> str:
    """Calibrated policies, one pair in every layer, Boundary V and mlx-lm's caches."""
    record = read("quality")
    found = _by_config(record)
    policies = [r for name, r in found.items() if name.endswith(".json")]
    shown = sorted([*policies, *(found[name] for name in WITH_CALIBRATED)],
                   key=lambda r: -r["bits_per_value"])  # fmt: skip
    rows = [
        [policy_name(r["config"]), f"{r['bits_per_value']:.3f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.5f} ± {r['kld']['se']:.5f}",
         f"{100 * r['same_top']['mean']:.1f} %", interval(_ratio(found, r["config"]), ".3f")]
        for r in shown
    ]  # fmt: skip
    header = ["K/V", "bits/value", "K bits", "V bits", "KLD", "same top", f"KLD / `{BOUNDARY}`'s"]
    uniform = {found[name]["bits_per_value"]: found[name] for name in UNIFORM}
    equal = [r["kld"]["mean"] / uniform[bits]["kld"]["mean"]
             for r in policies if (bits := r["bits_per_value"]) in uniform]  # fmt: skip
    checked = read("calibration")["policies"]
    factors = [at["measured_over_predicted"]["mean"] for at in checked]
    most = max(checked, key=lambda at: at["measured_over_predicted"]["mean"])
    notes = [
        *(_saved(read(name)) for name in ("quality", "quality_long")),
        "Much of the gain is the balance between K and V, which one pair of formats in every layer "
        f"can have too: `turbo6/turbo5` has {interval(_ratio(found, 'turbo6/turbo5'), '.3f')} "
        f"times the KLD of `{BOUNDARY}`. At equal bits, calibrated policies have {min(equal):.2f} "
        f"to {max(equal):.2f} times the KLD of one pair in every layer.",
        f"On the calibration windows the whole assignments measured {min(factors):.2f} to "
        f"{max(factors):.2f} times what was predicted, the most at {most['bits_per_value']:.2f} "
        "bits.",
    ]
    return "\n\n".join([
        "# Calibrated policies",
        "The policies in [benchmarks/policies](../../benchmarks/policies), calibrated on the "
        "package's sample without centring ([how](../calibrate.md)), on "
        f"{record['n_windows']} windows of {record['n_ctx']} of wikitext-2, without protected "
        "tokens or centred keys; some of them with both: [quality.md](quality.md). "
        "How many windows a calibration needs: "
        "[research.md](research.md#windows-that-a-calibration-needs). With centred keys: "
        "[centred-keys.md](centred-keys.md).",
        "\n".join(f"- {note}" for note in notes),
        "In brackets: 95 % interval, paired bootstrap over windows.",
        table(header, rows), source("quality"), "The calibration:", source("calibration"),
    ])  # fmt: skip


def _saved(record: dict) -> str:
    """What a calibrated policy saves at Boundary V's bits, and at its divergence."""
    found = _by_config(record)
    bits = found[BOUNDARY]["bits_per_value"]
    policies = {name: r["bits_per_value"] for name, r in found.items() if name.endswith(".json")}
    same = next(name for name in policies if name.endswith(f"bits-{BOUNDARY}.json"))
    least = min((name for name in policies if _ratio(found, name)["interval"][1] <= 1),
                key=policies.__getitem__)  # fmt: skip
    return (
        f"Over {record['n_windows']} windows of {record['n_ctx']:,} tokens, the calibrated policy "
        f"for the bits of `{BOUNDARY}` ({bits:.3f} per value) has "
        f"{interval(_ratio(found, same), '.3f')} times its KLD. The smallest budget whose KLD is "
        f"below `{BOUNDARY}`'s with the whole interval, {interval(_ratio(found, least), '.3f')} "
        f"times, is {policies[least]:.2f} bits: {policies[least] / bits:.2f} of its bits."
    )


def centred_keys() -> str:
    """Keys alone quantised, centred and not, and policies calibrated with centred keys."""
    parts = read("centred_keys")["parts"]
    kld = {(n, row["config"]): row["kld"]["mean"] for n, p in parts.items() for row in p["rows"]}

    def cell(name: str, config: str) -> str:
        if (name, config) not in kld:
            return ""
        plain, centred = kld[name, config], kld[name, f"{config} centred"]
        return f"{plain:.4f} → {centred:.4f} ({centred / plain:.2f})"

    configs = dict.fromkeys(c.removesuffix(" centred") for _, c in kld if c != "f16/f16")
    rows = [[config, *(cell(name, config) for name in parts)] for config in configs]
    record = parts["formats"]
    windows = ", ".join(f"{part['windows']} of {part['n_ctx']:,}" for part in parts.values())
    about = (
        f"The default model in {record['model']['dtype']} on wikitext-2 (sha256 "
        f"{record['text_sha256'][:12]}…), windows: {windows}; means from "
        f"{record['calibration_windows']} windows of the package's sample. KLD against f16, not "
        "centred → centred (ratio)."
    )
    header = ["K/V", *(f"{part['n_ctx']:,} tokens" for part in parts.values())]
    record = {**record, "command": record["command"]}
    return "\n\n".join([
        "# Centred keys", "[What it is](../centred-keys.md).", about, table(header, rows),
        source("centred_keys", record), *(
            [commands(*(p["command"] for p in parts.values() if p["command"] != record["command"]))]
        ),
        "## Calibrated with centred keys", _calibrated_keys(), source("calibrate_keys"),
    ])  # fmt: skip


def _calibrated_keys() -> str:
    record = read("calibrate_keys")
    held = _by_config(record["held_out"])
    bits = held[BOUNDARY]["bits_per_value"]

    def over(row: dict) -> dict:
        return row["kld_ratio_to"][BOUNDARY]

    policies = [held[at["policy"]] for at in record["policies"]]
    least = min((r for r in policies if over(r)["interval"][1] <= 1),
                key=lambda r: r["bits_per_value"])  # fmt: skip
    rows = [
        [policy_name(r["config"]), f"{r['bits_per_value']:.3f}",
         f"{r['bits_per_value'] / bits:.2f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.4f} ± {r['kld']['se']:.4f}",
         interval(over(r), ".3f")]
        for r in sorted(held.values(), key=lambda r: -r["bits_per_value"])
        if r["config"] != "f16/f16"
    ]  # fmt: skip
    header = ["K/V", "bits/value", f"of `{BOUNDARY}`'s", "K bits", "V bits", "KLD",
              f"KLD / `{BOUNDARY}`'s"]  # fmt: skip
    windows = record["held_out"]
    text = (
        f"With sensitivities measured on centred keys, {least['bits_per_value']:.2f} bits, "
        f"{least['bits_per_value'] / bits:.2f} of `{BOUNDARY}`'s {bits:.2f}, have "
        f"{interval(over(least), '.3f')} times its KLD. {windows['n_windows']} windows of "
        f"{windows['n_ctx']} of wikitext-2, calibrated on {record['calibration']['n_windows']} of "
        "the package's sample; all turbo keys centred; in brackets 95 % intervals, paired "
        "bootstrap."
    )
    return f"{text}\n\n{table(header, rows)}"


def report() -> str:
    """The summary of a report on the default model."""
    record = order.ordered(read("report"))
    shown, front = summary.table_of(record)
    rows = [[f"{row[0]} ●" if row[0] in front else row[0], *row[1:]] for row in shown.rows]
    measured, needles = record["perplexity"], record["needle"]
    about = (
        f"{record['model']['name']} in {record['model']['dtype']}: {measured['n_windows']} windows "
        f"of {measured['n_ctx']} of {measured['text']['name']}, {len(needles['cases'])} needles at "
        f"{', '.join(f'{n:,}' for n in needles['contexts'])} tokens."
    )
    speeds = [r["generation_tps"] for r in record["bench"]["rows"] if "error" not in r]
    apart = max(max(s["max"] - s["median"], s["median"] - s["min"]) / s["median"] for s in speeds)
    notes = [*shown.notes,
             f"Trials of generation lie up to {apart:.0%} from their median."]  # fmt: skip
    parts = [record[name] for name in ("perplexity", "needle", "bench") if record[name]]
    first = {**record, "command": parts[0]["command"]}
    return "\n\n".join([
        "# A report", "What `mlx_turbokv.report` writes, in one table.", about,
        recommendation(record) or "",
        table(shown.header, rows), " ".join(notes), source("report", first),
        commands(*(part["command"] for part in parts[1:])),
    ])  # fmt: skip
