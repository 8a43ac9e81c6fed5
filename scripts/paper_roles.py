"""The configurations of the paper "Layer-Aware V Compression", by their roles in its claims."""

from __future__ import annotations

import os
from typing import Any

from unprotected_windows import Choice

LENGTHS = {512: 64, 2048: 16, 8192: 8, 16384: 4}  # tokens of a window: windows
RAW = {"raw 2+2": ("raw-2-2.json", "la-v7"), "raw 4+4": ("raw-4-4.json", "mode-10")}
K_BITS = (4, 3, 2)
N_BOUNDARY = 4  # layers: the first two and the last two
LONGEST_FOR_K = 2048  # tokens of a window; K's own bits are measured up to it
# What names of one pair end in; records of before tokens could be protected lack it.
UNPROTECTED = "+0,0"


def config_names(group: str) -> dict[str, str]:
    """The configuration of each role, the weightiest first; ``group`` is "" or ":32"."""
    v2, v3 = f"turbo2{group}", f"turbo3{group}"
    names = {"turbo2": f"q8_0/{v2}", "la-v7": "", "turbo3": f"q8_0/{v3}", "q8": "q8_0/q8_0"}
    policies = {"la-v7": "la-v7", "4+4": "mode-10", "la-v5": "la-v5", "la-v6": "la-v6"}
    names |= {role: f"q8_0/{v2}@{policy}" for role, policy in policies.items()}
    names["f16 2+2"] = f"q8_0/{v2}@boundary:2,2:f16"
    names["f16 4+4"] = f"q8_0/{v2}@boundary:4,4:f16"
    names["swapped"] = f"{v3}/q8_0"
    names = {role: name + UNPROTECTED for role, name in names.items()}
    return names if group else names | policies


def k_names(group: str) -> dict[str, str]:
    """K with few bits in every layer, in all but boundary layers, and in all but as many middle."""
    names = {}
    for bits in K_BITS:
        pair = f"turbo{bits}{group}/q8_0"
        names[f"K {bits}"] = pair + UNPROTECTED
        names[f"K {bits}, boundary"] = f"{pair}@boundary:2,2:q8_0/q8_0" + UNPROTECTED
        names[f"K {bits}, middle"] = f"{pair}@middle:{N_BOUNDARY}:q8_0/q8_0"
    return names


def raw_names(group: str) -> dict[str, str]:
    """Boundaries as raw layer indices give them, on a hybrid."""
    return {role: f"q8_0/turbo2{group}@{role.replace(' ', ':')}" for role in RAW}


def choices(model: Any, group: str) -> dict[str, Choice]:
    """The policies of names that are none of the package's; raw indices of a hybrid alone."""
    from mlx_turbokv.model.caches import own_caches
    from mlx_turbokv.model.kv_layers import kv_layers
    from mlx_turbokv.policy import LayerList, load_policy
    from mlx_turbokv.quant.formats import as_format

    layers, n_caches = kv_layers(model).layers, len(own_caches(model))
    start, found = max(0, (len(layers) - N_BOUNDARY) // 2), {}
    q8, names = as_format("q8_0"), k_names(group)
    for bits in K_BITS:
        k, name = as_format(f"turbo{bits}{group}"), names[f"K {bits}, middle"]
        pairs = ((q8 if start <= i < start + N_BOUNDARY else k, q8) for i in range(len(layers)))
        found[name] = Choice(LayerList(tuple(pairs), name))
    if len(layers) < n_caches:
        for role, name in raw_names(group).items():
            raw = load_policy(RAW[role][1], "q8_0", f"turbo2{group}").formats(n_caches)
            found[name] = Choice(LayerList(tuple(raw[x.index] for x in layers), name))
    return found


def plan(n_ctx: int, group: str, found: dict[str, Choice]) -> list[str]:
    """What is measured in windows of this length."""
    names = list(config_names(group).values())
    names += [name for name in raw_names(group).values() if name in found]
    if n_ctx <= LONGEST_FOR_K:
        names += k_names(group).values()
    return list(dict.fromkeys(names))


def roles_of(rows: list[dict]) -> dict[str, dict]:
    """Rows by role; policy files of older records are known by name, whatever their folder."""
    names = [row["config"].removesuffix(UNPROTECTED) for row in rows]
    names = [os.path.basename(name) if name.endswith(".json") else name for name in names]
    by_name = dict(zip(names, rows))
    group = ":32" if "q8_0/turbo2:32" in by_name else ""
    wanted = {**config_names(group), **k_names(group), **raw_names(group)}
    found = {}
    for role, name in wanted.items():
        for known in (name.removesuffix(UNPROTECTED), RAW[role][0] if role in RAW else ""):
            if known in by_name:
                found[role] = by_name[known]
    return found


def tables_of(record: dict) -> dict[int, tuple[int, dict[str, dict]]]:
    """(windows, rows by role) for each length of a record of ours or of ``perplexity``."""
    if "tables" in record:
        parts = record["tables"].items()
        return {int(n): (part["n_windows"], roles_of(part["rows"])) for n, part in parts}
    return {record["n_ctx"]: (record["n_windows"], roles_of(record["results"]))}
