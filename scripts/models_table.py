"""What is compressed in every architecture of the installed mlx-lm, as tiny models have it.

python scripts/models_table.py && python scripts/results.py
python scripts/models_table.py --mlx-vlm && python scripts/results.py

With --mlx-vlm the language models of the installed mlx-vlm, each of which is also run through
packed caches: a prompt in uneven cuts, decoded tokens, a trim, and more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "helpers")]

import mlx.core as mx  # noqa: E402
from architecture_cases import Q8_TOLERANCE, TURBO4_TOLERANCE  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from record import record  # noqa: E402
from tiny_models import HELPERS, architectures, run_session, shared_model  # noqa: E402
from tiny_vlm import language_models, tiny_language_model  # noqa: E402
from tiny_vlm_configs import NEEDS_METAL, NOT_BY_TOKENS, WITHOUT_CACHES  # noqa: E402

from mlx_turbokv import make_prompt_cache  # noqa: E402
from mlx_turbokv.cli.output import write_json  # noqa: E402
from mlx_turbokv.model.caches import own_caches  # noqa: E402
from mlx_turbokv.model.kv_layers import KVLayers, kv_layers  # noqa: E402

REMARKS = {
    "bitnet": "without Metal, tested with plain operations in place of mlx-lm's Metal kernel",
    "muse_spark": "tested on GPUs alone: mlx-lm has its attention's kernels for nothing else",
    "olmo": "mlx-lm needs the package ai2-olmo for it, and takes prompts only a token at a time",
}
VLM_REMARKS = {
    "bitnet": "not run: mlx-vlm has its kernels for Metal alone",
    "diffusion_gemma": "not run: it writes whole blocks of tokens (a test runs it)",
    "muse_spark": "not run: mlx-vlm has its kernels for Metal alone",
    "nemotron_parse": "not run: its decoder starts from an image (a test runs it)",
    "z1t": "not run: attention-free, with caches that cannot be asked for a trim",
}
PREFILL_CUTS, N_DECODE = [5, 1, 17, 14], 20
TOLERANCES = {"q8_0": Q8_TOLERANCE, "turbo4": TURBO4_TOLERANCE}


def rows() -> list[dict]:
    """What happens to the caches of every architecture."""
    return [_row(name, shared_model(name), REMARKS.get(name, "")) for name in architectures()]


def vlm_rows(names: list[str], kept: list[dict], save: Callable[[list[dict]], None]) -> list[str]:
    """The same of mlx-vlm's language models, with the errors of logits through packed caches.

    Args:
        kept: rows that are there already.
        save: called with all rows after each new one.

    Returns:
        what quantisation does not explain.
    """
    rows, failures = {row["architecture"]: row for row in kept}, []
    for name in names:
        if name not in rows:
            model = tiny_language_model(name)
            row = _row(name, model, VLM_REMARKS.get(name, ""))
            if not row["compressed"]:
                row["grows"] = _grows(model)  # with the context
            rows[name] = row | {"error": _errors(name, model)}
            print(rows[name], flush=True)
            save([rows[name] for name in names if name in rows])
        for fmt, error in rows[name]["error"].items():
            if not error <= TOLERANCES[fmt]:
                failures.append(f"{name}, {fmt}: the logits' error is {error:.3f}.")
    return failures


def _errors(name: str, model) -> dict[str, float]:
    """Root mean square of the logits' error over their standard deviation, by format."""
    if name in NOT_BY_TOKENS or (name in NEEDS_METAL and not mx.metal.is_available()):
        return {}
    own = run_session(model, own_caches(model), PREFILL_CUTS, N_DECODE)
    errors = {}
    for fmt in TOLERANCES:
        packed = run_session(model, make_prompt_cache(model, fmt, fmt), PREFILL_CUTS, N_DECODE)
        error = mx.sqrt(mx.mean(mx.square(packed - own))) / mx.std(own)
        errors[fmt] = round(error.item(), 4)
    return errors


def _grows(model) -> bool:
    """Whether the model's own caches hold more after 72 tokens than after 48."""
    caches, sizes = own_caches(model), []
    for _ in range(3):
        mx.eval(getattr(out := model(mx.array([list(range(24))]), cache=caches), "logits", out))
        arrays = [x for _, x in tree_flatten([cache.state for cache in caches])]
        sizes.append(sum(x.nbytes for x in arrays if isinstance(x, mx.array)))
    return sizes[2] > sizes[1]


def _row(name: str, model, remark: str) -> dict:
    found = kv_layers(model)
    return {
        "architecture": name,
        "caches": len(own_caches(model)),
        "compressed": len(found.layers),
        "added_with_sliding": len(kv_layers(model, compress_sliding=True).layers)
        - len(found.layers),
        "left_alone": _left_alone(found),
        "remark": remark,
    }


def _left_alone(found: KVLayers) -> list[str]:
    counts: dict[str, int] = {}
    for entry in found.skipped:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    return [f"{count} × {reason}" for reason, count in counts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlx-vlm", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep rows that --json has")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = args.json or ROOT / "benchmarks" / ("models_vlm.json" if args.mlx_vlm else "models.json")
    what = "caches by architecture"
    if not args.mlx_vlm:
        write_json(str(path), record(what=what, helpers=sorted(HELPERS), rows=rows()))
        return

    def save(found: list[dict]) -> None:
        about = {"mlx_vlm": version("mlx-vlm"), "helpers": sorted(WITHOUT_CACHES)}
        write_json(str(path), record(what=what, **about, rows=found))

    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if args.resume else []
    if failures := vlm_rows(language_models(), kept, save):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
