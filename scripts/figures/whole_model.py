"""Figures of whole models on a GPU: speed, memory, and what a step takes of the CPU."""

from __future__ import annotations

from mlx_turbokv.evaluate.tables import bytes_text

from . import figure, read, table


@figure
def llama() -> str:
    """A model of Llama-3.1-8B's shape on a GPU."""
    return _whole_model(read("bench_llama"))


@figure
def qwen() -> str:
    """A model of Qwen2.5-7B's shape on a GPU."""
    return _whole_model(read("bench_qwen"))


def _whole_model(record: dict) -> str:
    """Speeds and memory by configuration, one line a point of the record."""
    by = {(row["kind"], row["tokens"], row["config"]): row for row in record["rows"]}
    points = list(dict.fromkeys(key[:2] for key in by))
    contexts, prompts = ([p for p in points if p[0] == kind] for kind in ("context", "prompt"))
    first = record["configs"][0]

    def line(name: str, point: tuple[str, int], cell) -> list[str]:
        rows = [by[(*point, config)] for config in record["configs"]]
        cells = ["–" if "error" in row else cell(row) for row in rows]
        return [f"{name} {point[1]:,} tokens", *cells]

    def speed(which: str):
        def cell(row: dict) -> str:
            share = "" if row["config"] == first else f" ({row[f'{which}_of_first']:.2f}×)"
            return f"{row[f'{which}_tps']['median']:,.0f}{share}"

        return cell

    def size(key: str):
        return lambda row: bytes_text(row[key])

    lines = [line("decode tok/s after", p, speed("generation")) for p in contexts]
    lines += [line("prefill tok/s,", p, speed("prompt")) for p in prompts]
    lines += [
        line("peak above weights, prefill of", p, size("peak_bytes_above_weights")) for p in prompts
    ]
    lines += [line("KV bytes after", p, size("kv_bytes")) for p in contexts[-1:]]
    environment = record["environment"]
    spread = max(
        abs(trial / row["generation_tps"]["median"] - 1)
        for row in record["rows"] if "error" not in row
        for trial in row["generation_tps"]["trials"]
    )  # fmt: skip
    about = (
        f"{record['model']['name']}'s shape, {record['weights']}; {environment['device']}, mlx "
        f"{environment['mlx']}: medians of {record['num_trials']} trials, configurations in turn, and "
        f"in brackets the median of the ratios to {first} in the same trial. Decode: "
        f"{record['generation_tokens']} tokens behind a cache that was filled with random K and V, "
        f"packed by the cache itself. Trials lie up to {spread:.0%} from their median."
    )
    return "\n\n".join([about, table(["", *record["configs"]], lines), f"`{record['command']}`"])


@figure
def step() -> dict[str, str]:
    """What a layer's cache and attention take of the CPU in a decode step."""
    record = read("step_overhead")
    by = {row["cache"]: row for row in record["rows"]}
    added = [row["added_us"] for name, row in by.items() if name != "f16"]
    return {
        "f16": f"{by['f16']['us']:.1f}",
        "added": f"{max(added):.1f}",
        "device": record["device"],
        "layers": str(record["layers"]),
    }
