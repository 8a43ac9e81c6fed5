"""Pages on models: speed and memory, architectures, and settled research."""

from __future__ import annotations

from collections.abc import Sequence

import bench_whole

from mlx_turbokv.evaluate.names import parse_policy
from mlx_turbokv.evaluate.tables import bytes_text
from mlx_turbokv.loading.known_shapes import known_config
from mlx_turbokv.loading.model_shape import shape_from_config
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION
from mlx_turbokv.report.plan import make_plan

from . import ROOT, SETTLED, commands, read, source, table

WHOLE = ("bench_llama", "bench_qwen", *bench_whole.RECORDS.values())
# hybrids whose recurrent layers mlx-lm runs by a Metal kernel, and elsewhere token by token
RECURRENT = ("Qwen3.5-27B",)
KNOWN = ("Llama-3.1-8B", "Qwen2.5-7B", "Qwen3.5-27B")
CACHES = ("f16/f16", "q8_0/q8_0", "la-v7", "turbo6/turbo5", "turbo5/turbo4", "turbo4/turbo3")
README_CACHES = ("f16/f16", "turbo5/turbo4", "turbo4/turbo3")
LATENT = "MLA latent"  # as the reason begins
CONTEXTS = (8192, 32768, 131072)
MEMORY_HEADER = ("K/V", "bits/value", *(f"{n:,} tokens" for n in CONTEXTS))


def whole_models() -> str:
    """Models of a known shape on a GPU, of those that were measured."""
    parts = [
        "# Speed and memory of whole models",
        "Medians; in brackets the median of the ratios to the first configuration in the same "
        "trial ([how](../evaluation.md#speed-and-memory)).",
    ]
    for name in WHOLE:
        if (ROOT / f"benchmarks/{name}.json").is_file():
            record = read(name)
            parts += [f"## {record['model']['name']}", _whole_model(record), source(name, record)]
    return "\n\n".join(parts)


def _whole_model(record: dict) -> str:
    """Speeds and memory by configuration, one line a point of the record."""
    by = {(row["kind"], row["tokens"], row["config"]): row for row in record["rows"]}
    points = list(dict.fromkeys(key[:2] for key in by))
    contexts, prompts = ([p for p in points if p[0] == kind] for kind in ("context", "prompt"))
    first = record["configs"][0]
    measured = [name for name in record["configs"] if any(key[2] == name for key in by)]

    def line(name: str, point: tuple[str, int], cell) -> list[str]:
        rows = [by.get((*point, config), {"error": None}) for config in measured]
        cells = ["–" if "error" in row else cell(row) for row in rows]
        return [f"{name} {point[1]:,} tokens", *cells]

    def speed(which: str):
        def cell(row: dict) -> str:
            ratio = None if row["config"] == first else row[f"{which}_of_first"]
            share = "" if ratio is None else f" ({ratio:.2f}×)"
            return f"{row[f'{which}_tps']['median']:,.0f}{share}"

        return cell

    def size(key: str):
        return lambda row: bytes_text(row[key])

    lines = [line("decode tok/s after", p, speed("generation")) for p in contexts]
    lines += [line("prefill tok/s,", p, speed("prompt")) for p in prompts]
    lines += [
        line("peak above weights, prefill of", p, size("peak_bytes_above_weights")) for p in prompts
    ]
    lines += [line("peak above weights, decode after", p, size("peak_bytes_above_weights"))
              for p in contexts[-1:]]  # fmt: skip
    lines += [line("KV bytes after", p, size("kv_bytes")) for p in contexts[-1:]]
    apart = max(
        (abs(trial / row["generation_tps"]["median"] - 1)
         for row in record["rows"] if "error" not in row
         for trial in row["generation_tps"]["trials"]),
        default=0.0,
    )  # fmt: skip
    about = (
        f"{record['weights']}; {record['num_trials']} trials of {record['generation_tokens']} "
        f"tokens, up to {apart:.0%} from their median."
    )
    if "note" in record:
        about += f" {record['note']}"
    if record["backend"] != "metal" and record["model"]["source"] in RECURRENT:
        about += (" Without Metal mlx-lm computes the recurrent layers token by token, which is "
                  "what prefill takes here.")  # fmt: skip
    if record["not_measured"]:
        about += f" Not measured within the time limit: {', '.join(record['not_measured'])} tokens."
    if left_out := [name for name in record["configs"] if name not in measured]:
        about += f" Not measured: {', '.join(left_out)}."
    return f"{about}\n\n{table(['', *measured], lines)}"


def memory() -> str:
    """Bytes of the caches of known models, computed from their shapes."""
    parts = [
        "# Memory of the KV cache",
        "Computed from the models' shapes (`mlx_turbokv.plan --model NAME`), not measured. All "
        "caches of one sequence, layers that are not packed included. The turbo pairs hold the "
        f"first {DEFAULT_PROTECTION.sink} tokens and the newest {DEFAULT_PROTECTION.recent} or "
        "more in 8.5 bits; `bits/value` is that of the others.",
    ]
    for name in KNOWN:
        n_layers = len(shape_from_config(known_config(name), name).layers.layers)
        made = table(MEMORY_HEADER, _memory_rows(name, CACHES))
        parts += [f"## {name}", f"{n_layers} KV layers.", made]
    return "\n\n".join(parts)


def memory_in_readme() -> str:
    """The same of fewer caches, in one table."""
    rows = [
        [name if i == 0 else "", *row]
        for name in KNOWN
        for i, row in enumerate(_memory_rows(name, README_CACHES))
    ]
    return table(["model", *MEMORY_HEADER], rows)


def _memory_rows(name: str, caches: Sequence[str]) -> list[list[str]]:
    shape = shape_from_config(known_config(name), name)
    plan = make_plan(shape, [(c, parse_policy(c)) for c in caches], CONTEXTS)
    return [
        [row.name, f"{row.bits:.2f}", *(bytes_text(row.bytes_at[n]) for n in CONTEXTS)]
        for row in plan.rows
    ]


def models() -> str:
    """What is compressed in every architecture of mlx-lm."""
    record = read("models")
    return "\n\n".join([
        "# What is compressed, by architecture",
        f"A tiny random model of each model file of mlx-lm {record['mlx_lm']} "
        "([models.md](../models.md)). [Those of mlx-vlm](models-vlm.md).",
        _architectures(record["rows"], []),
        f"Modules of mlx_lm.models that hold no model: {', '.join(record['helpers'])}.",
        source("models", record),
    ])  # fmt: skip


def models_vlm() -> str:
    """What is compressed in every language model of mlx-vlm."""
    record = read("models_vlm")
    rows = record["rows"]
    growing = [row for row in rows if row["compressed"] or row["grows"]]
    latent = [row for row in growing if LATENT in _kinds(row)]
    n_packed = sum(row["compressed"] > 0 for row in growing)
    n_other = len(growing) - len(latent)
    return "\n\n".join([
        "# What is compressed in mlx-vlm's models",
        f"A tiny random language model of each package of mlx-vlm {record['mlx_vlm']} that has one "
        f"([models.md](../models.md#vision-models)): {len(rows)}. {len(growing)} have a cache that "
        f"grows with the context, of which {len(latent)} keep MLA latents in it. Of the other "
        f"{n_other}, {n_packed} ({n_packed / n_other:.1%}) are compressed, "
        f"{n_packed / len(growing):.1%} of all that grow. Error: of the logits after a prompt in "
        "uneven cuts, decoded tokens, a trim and more, against the model's own cache; root mean "
        "square over their standard deviation, through random weights.",
        _architectures(rows, ["error, q8_0", "error, turbo4"]),
        "Packages of mlx_vlm.models without a model that reads tokens through a cache: "
        f"{', '.join(record['helpers'])}.",
        source("models_vlm", record),
    ])  # fmt: skip


def _kinds(row: dict) -> set[str]:
    """The reasons why caches of a model are left alone, without their numbers."""
    return {" ".join(text.split(" × ", 1)[1].split()[:2]) for text in row["left_alone"]}


def _architectures(rows: list[dict], more: list[str]) -> str:
    lines = []
    for row in rows:
        added = row["added_with_sliding"]
        cells = [
            row["architecture"],
            row["caches"],
            row["compressed"],
            f"+{added}" if added else "",
        ]
        errors = [f"{row['error'][name.split()[-1]]:.3f}" if row["error"] else "–" for name in more]
        lines.append([*map(str, cells), *errors, "; ".join(row["left_alone"]), row["remark"]])
    header = ["architecture", "caches", "compressed", "with --compress-sliding", *more,
              "left alone, and why", "remark"]  # fmt: skip
    return table(header, lines)


def _topics(page: str) -> list[str]:
    record, parts = read("research"), []
    for topic in record["topics"]:
        if topic["page"] != page:
            continue
        parts += [f"## {topic['title']}", topic["conclusion"], topic["conditions"],
                  table(topic["header"], topic["rows"])]  # fmt: skip
        files = [f"`{name}`" for name in (*topic["scripts"], *topic["records"])]
        commit = topic.get("commit", SETTLED)
        parts.append(f"In commit {commit}: {', '.join(files)}.")
        parts += [commands(*topic["commands"], commit=commit)] if topic["commands"] else []
    return parts


def research() -> str:
    """Settled research: conclusions and tables."""
    about = (
        "Questions that are settled: the conclusion, its table, and where to find the script and "
        f"the full record (commit {SETTLED} where no other is named; figures here: "
        "[benchmarks/research.json](../../benchmarks/research.json))."
    )
    return "\n\n".join(["# Settled research", about, *_topics("research")])


def decode_log() -> str:
    """The log of tuning decode."""
    about = "Figures: [benchmarks/research.json](../../benchmarks/research.json)."
    return "\n\n".join(["# Log of tuning decode attention", about, *_topics("decode-log")])


def long_checks() -> str:
    """Checks that take longer than tests may."""
    load = read("serve_load")
    about = (
        f"Checks that take longer than tests may. Scripts that the tree no longer has are in "
        f"commit {SETTLED}; figures: [benchmarks/research.json](../../benchmarks/research.json)."
    )
    server = (
        f"{load['requests']} requests from {load['clients']} clients, {load['disconnected']} of "
        f"which disconnect: {load['answered_as_without_load']} of {load['answered']} answers are "
        f"those without load, resident memory grows by {load['growth_after_load']:.2%}."
    )
    return "\n\n".join(["# Long checks", about, "## A server under load", server,
                        source("serve_load", load), *_topics("long-checks")])  # fmt: skip
