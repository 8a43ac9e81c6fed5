"""Figures of quality: perplexity, calibrated policies, needles, the paper's claims, the report."""

from __future__ import annotations

from paper_tables import difference_cell

from mlx_turbokv.evaluate.statistics import ratio
from mlx_turbokv.evaluate.tables import needle_table, perplexity_table
from mlx_turbokv.report import summary

from . import figure, read, table

SHOWN = (
    "f16/f16", "q8_0/q8_0", "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "la-v5", "la-v6", "la-v7",
    "mode-10", "turbo6/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "mlx-kv8:64", "mlx-kv4:64", "mlx-kv3:64",
)  # fmt: skip
BESIDE_CALIBRATED = (
    "q8_0/q8_0", "la-v7", "mode-10", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5",
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "mlx-kv4:64", "mlx-kv3:64",
)  # fmt: skip
EQUAL_BITS = (
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "turbo3/turbo2",
)  # fmt: skip
SHORT, LONG, BOUNDARY = "quality", "quality_long", "la-v7"


@figure
def perplexity() -> str:
    """Perplexity and divergence of a few configurations, with the command that made them."""
    record = read(SHORT)
    found = _by_config(record)
    shown = perplexity_table(record | {"results": [found[name] for name in SHOWN]})
    notes = "\n".join(perplexity_table(record).notes)
    return "\n\n".join([_heading(record), shown.markdown(), notes, f"`{record['command']}`"])


@figure
def all_pairs() -> dict[str, str]:
    """Every configuration, at both contexts."""
    return {"short": _whole_table(read(SHORT)), "long": _whole_table(read(LONG))}


def _whole_table(record: dict) -> str:
    results = record["results"]
    boundary = _by_config(record)[BOUNDARY]["kld_by_window"]
    front = summary.front_of(results[1:])
    rows = []
    for r in sorted(results[1:], key=lambda r: (-r["bits_per_value"], r["kld"]["mean"])):
        name = _policy_name(r["config"]) + (" ●" if r["config"] in front else "")
        rows.append([
            name, f"{r['bits_per_value']:.3f}", f"{r['k_bits_per_value']:.2f}",
            f"{r['v_bits_per_value']:.2f}", _with_interval(r["delta_nll"], "+.4f"),
            _with_interval(r["kld"], ".5f"), f"{r['kld']['p99.9']:.3f}",
            f"{100 * r['same_top']['mean']:.1f} %",
            _ratio_text(ratio(r["kld_by_window"], boundary)),
        ])  # fmt: skip
    header = ["K/V", "bits/value", "K bits", "V bits", "Δnll", "KLD", "KLD 99.9 %", "same top"]
    about = (
        f"{_heading(record)} f16/f16 has a perplexity of {results[0]['ppl']['ppl']:.3f}. In "
        "brackets: 95 % intervals, bootstrap over windows; the ratios are paired. ● Nothing here "
        "has both fewer bits and a smaller KLD."
    )
    whole = table([*header, f"KLD / `{BOUNDARY}`'s"], rows)
    return "\n\n".join([about, whole, f"`{record['command']}`"])


@figure
def against_boundary() -> dict[str, str]:
    """Two pairs of formats beside Boundary V: bits and ratio of the KLD."""
    found = _by_config(read(SHORT))
    texts = {}
    for key, name in (("more", "turbo6/turbo5"), ("less", "turbo4/turbo3")):
        texts[f"{key}_ratio"] = f"{_ratio(found, name)['mean']:.3f}"
        texts[f"{key}_bits"] = f"{found[name]['bits_per_value']:.2f}"
    return texts | {"bits": f"{found[BOUNDARY]['bits_per_value']:.2f}"}


@figure
def peers() -> str:
    """A pair of formats beside mlx-lm's cache of about as many bits."""
    found = _by_config(read(SHORT))
    ours, theirs = found["turbo4/turbo4"], found["mlx-kv4:64"]
    return (
        f"`turbo4/turbo4`, at {ours['bits_per_value']:.2f} bits, has "
        f"{_ratio_text(ratio(ours['kld_by_window'], theirs['kld_by_window']))} times the KLD of "
        f"mlx-lm's `kv_bits=4`, at {theirs['bits_per_value']:.2f} (its scales in half precision)."
    )


@figure
def on_cpu() -> dict[str, str]:
    """The same windows on a CPU, where mlx-lm's rows go through its own attention."""
    found = {_file_name(name): r for name, r in _by_config(read(SHORT)).items()}
    record = read("calibrate_64")
    rows = {_file_name(r["config"]): r for r in record["results"][1:]}
    # A file of the same name may hold other formats by layer.
    same = [n for n, r in rows.items() if n in found and r["layers"] == found[n]["layers"]]
    same = [n for n in same if rows[n]["centred"] == found[n]["centred"]]
    ratios = {n: rows[n]["kld"]["mean"] / found[n]["kld"]["mean"] for n in same}
    return {
        "device": record["environment"]["device"],
        "windows": str(record["n_windows"]),
        "configs": ", ".join(map(_policy_name, ratios)),
        "ratios": f"{min(ratios.values()):.3f} to {max(ratios.values()):.3f}",
    }


@figure
def calibrated() -> str:
    """Calibrated policies beside uniform formats, Boundary V and mlx-lm's caches."""
    record = read(SHORT)
    found = _by_config(record)
    policies = [r for name, r in found.items() if name.endswith(".json")]
    shown = policies + [found[name] for name in BESIDE_CALIBRATED]
    rows = [
        [_policy_name(r["config"]), f"{r['bits_per_value']:.3f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.5f} ± {r['kld']['se']:.5f}",
         f"{100 * r['same_top']['mean']:.1f} %", _ratio_text(_ratio(found, r["config"]))]
        for r in sorted(shown, key=lambda r: -r["bits_per_value"])
    ]  # fmt: skip
    about = f"{_heading(record)} In brackets: 95 % interval, paired bootstrap over windows."
    header = ["K/V", "bits/value", "K bits", "V bits", "KLD", "same top", f"KLD / `{BOUNDARY}`'s"]
    text = " ".join([_worth(record), _worth(read(LONG)), _equal_bits(found), _calibration_notes()])
    return "\n\n".join([text, about, table(header, rows)])


def _worth(record: dict) -> str:
    """What a calibrated policy saves at Boundary V's bits, and at its divergence."""
    found = _by_config(record)
    bits = found[BOUNDARY]["bits_per_value"]
    policies = {name: r["bits_per_value"] for name, r in found.items() if name.endswith(".json")}
    same_bits = next(name for name in policies if name.endswith(f"bits-{BOUNDARY}.json"))
    enough = [name for name in policies if _ratio(found, name)["interval"][1] <= 1]
    least = min(enough, key=policies.get)
    return (
        f"Over {record['n_windows']} windows of {record['n_ctx']:,} tokens, the calibrated policy "
        f"for the bits of `{BOUNDARY}` ({bits:.3f} per value) has "
        f"{_ratio_text(_ratio(found, same_bits))} times its KLD, and the smallest budget whose KLD "
        f"is below it with the whole interval, {_ratio_text(_ratio(found, least))} times, is "
        f"{policies[least]:.2f} bits: {policies[least] / bits:.2f} of its bits."
    )


def _equal_bits(found: dict[str, dict]) -> str:
    """Calibrated policies beside one pair of formats in every layer."""
    uniform = {found[name]["bits_per_value"]: found[name] for name in EQUAL_BITS}
    beside = [
        r["kld"]["mean"] / uniform[r["bits_per_value"]]["kld"]["mean"]
        for name, r in found.items()
        if name.endswith(".json") and r["bits_per_value"] in uniform
    ]
    return (
        "Much of the gain is the balance between K and V, which one pair of formats in every layer "
        f"can strike too: `turbo6/turbo5` has {_ratio_text(_ratio(found, 'turbo6/turbo5'))} times "
        f"the KLD of `{BOUNDARY}`. At equal bits, calibrated policies have {min(beside):.2f} to "
        f"{max(beside):.2f} times the KLD of one pair in every layer."
    )


def _calibration_notes() -> str:
    """How well the sum of the costs predicts the whole, and how many windows it takes."""
    checked = read("calibration")["policies"]
    factors = [at["measured_over_predicted"]["mean"] for at in checked]
    most = max(checked, key=lambda at: at["measured_over_predicted"]["mean"])
    few = {r["windows"]: max(r["mean_excess"]) for r in read("calibration_windows")["rows"]}
    return (
        f"On the calibration windows the whole assignments measured {min(factors):.2f} to "
        f"{max(factors):.2f} times what was predicted, the most at {most['bits_per_value']:.2f} "
        "bits. Few windows are enough: on the windows left out, policies from one window are "
        f"predicted to cost at most {few[1]:.1%} more than the best ones, from four {few[4]:.1%}."
    )


def _by_config(record: dict) -> dict[str, dict]:
    return {r["config"]: r for r in record["results"]}


def _file_name(config: str) -> str:
    """A policy file without its folder; any other name as it is."""
    return config.split("/")[-1] if config.endswith(".json") else config


def _ratio(found: dict[str, dict], name: str) -> dict:
    """KLD over Boundary V's, paired over windows."""
    return ratio(found[name]["kld_by_window"], found[BOUNDARY]["kld_by_window"])


def _heading(record: dict) -> str:
    return perplexity_table(record).heading.replace("\n", "; ") + "."


def _policy_name(config: str) -> str:
    """…/bits-3.5.json is a policy calibrated for 3.5 bits."""
    if not config.endswith(".json"):
        return config
    budget = config.split("/")[-1].removeprefix("bits-").removesuffix(".json")
    return f"**calibrated** for {budget if budget.startswith('la') else budget + ' bits'}"


def _ratio_text(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"


def _with_interval(found: dict, spec: str) -> str:
    low, high = found["interval"]
    return f"{found['mean']:{spec}} ({low:{spec}} to {high:{spec}})"


@figure
def needle() -> str:
    """What is still found, f16 beside every configuration."""
    record = read("needle")
    table = needle_table(record)
    parts = [table.heading.replace("\n", "; ") + ".", table.markdown(), "\n".join(table.notes)]
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
    header = [
        "the paper says",
        "tokens",
        "difference, nats (95 %)",
        "by loss",
        "by divergence from f16",
    ]
    return "\n\n".join([about, table(header, rows), f"`{record['command']}`"])


@figure
def report() -> str:
    """The summary of a report on the default model."""
    record = read("report")
    header, rows, front = summary.table_of(record)
    rows = [[f"{row[0]} ●" if row[0] in front else row[0], *row[1:]] for row in rows]
    quality, needles = record["perplexity"], record["needle"]
    about = (
        f"{record['model']['name']} in {record['model']['dtype']}, "
        f"{record['environment']['device']}, back-end {record['backend']}: "
        f"{quality['n_windows']} windows of {quality['n_ctx']} of {quality['text']['name']}, "
        f"{len(needles['cases'])} needles at "
        f"{', '.join(f'{n:,}' for n in needles['contexts'])} tokens."
    )
    notes = summary.notes(record)
    if record["bench"]:
        speeds = [r["generation_tps"] for r in record["bench"]["rows"] if "error" not in r]
        apart = max(
            max(s["max"] - s["median"], s["median"] - s["min"]) / s["median"] for s in speeds
        )
        notes.append(f"Trials of generation lie up to {apart:.0%} from their median.")
    parts = [about, table(header, rows), " ".join(notes)]
    measured = (record[name] for name in ("perplexity", "needle", "bench"))
    commands = dict.fromkeys(f"`{part['command']}`" for part in measured if part)
    return "\n\n".join([*parts, " ".join(commands)])
