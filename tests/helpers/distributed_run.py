"""One rank of test_distributed.py: generates with split tiny models and writes its results.

mlx.launch -n 2 --backend ring tests/helpers/distributed_run.py FOLDER ARCHITECTURE:HOW...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx_turbokv  # noqa: F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from paced import paced
from varied_models import varied_model

POLICY = "boundary:1,1"
# nine tiles and most of a tenth: five tiles leave the protected tail
PROMPT = [(7 * i * i + 3 * i + 1) % 89 for i in range(312)]
N_TOKENS = 12


def run(architecture: str, how: str) -> dict:
    """Tokens of the split model and the formats of this rank's layers.

    Args:
        how: tensor, pipeline, or alone; "late" after it attaches before the model is split,
            "sliding" packs sliding windows too, and "paced" has attention calls wait for others.
    """
    if how.endswith("-paced"):
        with paced():
            return run(architecture, how.removesuffix("-paced"))
    mx.set_default_device(mx.cpu)
    model = varied_model(architecture, num_hidden_layers=6)
    options = {"k": "q8_0", "v": "turbo6", "policy": POLICY}
    options["compress_sliding"] = "sliding" in how
    if how.endswith("-late"):
        mlx_turbokv.attach(model, **options)
    if how.startswith("tensor"):
        model.shard(mx.distributed.init())
    elif how.startswith("pipeline"):
        model.model.pipeline(mx.distributed.init())
    if not how.endswith("-late"):
        mlx_turbokv.attach(model, **options)
    caches = make_prompt_cache(model)
    steps = generate_step(
        mx.array(PROMPT), model, max_tokens=N_TOKENS, prompt_cache=caches, prefill_step_size=64
    )
    tokens = [int(token) for token, _ in steps]
    # Generation runs one step ahead: a rank that ends earlier would break the other.
    mx.eval(mx.distributed.all_sum(mx.ones(1)))
    formats = [
        f"{cache.k_format}/{cache.v_format}" if hasattr(cache, "k_format") else "none"
        for cache in caches
    ]
    heads = [cache.keys.shape[1] for cache in caches if hasattr(cache, "k_format")]
    protected = [str(getattr(cache, "protection", "none")) for cache in caches]
    return {"tokens": tokens, "formats": formats, "heads": heads, "protected": protected}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    found = {name: run(*name.split(":")) for name in names}
    rank = mx.distributed.init().rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
