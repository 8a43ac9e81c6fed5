"""Keys with a bias as large and as slow as Qwen2.5's: what K formats cost, centred by it and not.

The model is the tiny random Qwen2 of tests/centred_model.py: no trained one was at hand. Its own
biases are all that is taken out, as they are by themselves.

    python scripts/synthetic_keys.py --json benchmarks/synthetic_keys.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "helpers")]

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from centred_model import BIAS_OVER_REST, SLOWEST_SHARE, centred_model  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv.cache import make_prompt_cache  # noqa: E402
from mlx_turbokv.evaluate import statistics  # noqa: E402
from mlx_turbokv.evaluate.divergence import Reference  # noqa: E402

FORMATS = ("turbo3", "turbo4", "turbo5", "turbo6")
N_MODELS, N_TOKENS = 8, 150


def divergence(model, k: str, centre: bool, tokens: mx.array) -> float:
    """Mean KLD from exact keys."""

    def logits(*formats, **options):
        caches = make_prompt_cache(model, *formats, backend="reference", **options)
        return model(tokens, cache=caches)[0]

    exact, read = logits("f16", "f16"), logits(k, "f16", centre=centre)
    return float(np.mean(Reference(exact, mx.zeros((len(exact),), mx.int32)).compare(read).kld))


@click.command()
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/synthetic_keys.json"))
def main(json_path: str) -> None:
    models = [centred_model(seed) for seed in range(N_MODELS)]
    tokens = [mx.random.randint(0, m.args.vocab_size, (1, N_TOKENS), key=mx.random.key(i)) for i, m in enumerate(models)]  # fmt: skip
    rows = []
    for k in FORMATS:
        for centred in (False, True):
            kld = np.array([divergence(m, k, centred, t) for m, t in zip(models, tokens)])
            rows.append({"k": k, "centred": centred, "kld": statistics.mean_and_error(kld), "most": float(kld.max())})  # fmt: skip
            print(rows[-1], flush=True)
    result = record(models=N_MODELS, tokens=N_TOKENS, bias_over_rest=BIAS_OVER_REST, slowest_share=SLOWEST_SHARE, rows=rows)  # fmt: skip
    Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
