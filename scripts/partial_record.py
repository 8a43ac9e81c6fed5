"""The record of an interrupted `perplexity` run, from the windows that it finished.

    python scripts/partial_record.py RUN.json.partial OUT.json --like RECORD.json [--model …]

Versions and device are taken from --like, a record of the same machine; the model is loaded for its
shapes alone. The record says that the run was cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_turbokv  # noqa: E402, F401: before mlx.core, so that OpenBLAS is used
from mlx_turbokv.cli.output import write_json  # noqa: E402
from mlx_turbokv.evaluate.checkpoint import Checkpoint  # noqa: E402
from mlx_turbokv.evaluate.configuration import prepare_layers  # noqa: E402
from mlx_turbokv.evaluate.perplexity import ConfigResult, Evaluation  # noqa: E402
from mlx_turbokv.evaluate.record import command_line  # noqa: E402
from mlx_turbokv.evaluate.table import as_text  # noqa: E402
from mlx_turbokv.models import load  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("partial", type=Path)
    parser.add_argument("out")
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--text-name", default="wiki.test.raw")
    parser.add_argument("--command", help="what was run")
    given = parser.parse_args()
    settings = json.loads(given.partial.read_text(encoding="utf-8").splitlines()[0])["settings"]
    like = json.loads(given.like.read_text(encoding="utf-8"))
    if like["environment"]["device"] != settings["device"]:
        sys.exit(f"{given.like} is of another device than {settings['device']}.")
    checkpoint = Checkpoint(given.partial, settings)
    model = load(given.model).model
    results = []
    for name, layers, backend, *_ in settings["configurations"]:
        config = prepare_layers(model, [tuple(pair) for pair in layers], name, "reference")
        config = type(config)(**{**vars(config), "backend": backend})
        results.append(ConfigResult(config))
    n = next(i for i in range(len(checkpoint.windows) + 1) if i not in checkpoint.windows)
    for index in range(n):
        found = checkpoint.get(index)
        for result in results:
            stats, result.kv_bytes = found[result.config.name]
            result.windows.append(stats)
    evaluation = Evaluation(settings["n_ctx"], results)
    backends = [r.config.backend for r in results if r.config.backend != "mlx-lm"]
    record = {
        "what": "perplexity and divergence by cache configuration",
        "model": like["model"],
        "text": {"name": given.text_name, "sha256": settings["text_sha256"]},
        "n_ctx": settings["n_ctx"],
        "n_windows": n,
        "cut_off": f"the run was cut off: its {n} finished windows",
        "reference": results[0].config.name,
        "backend": backends[0] if backends else "mlx-lm",
        "command": given.command or command_line(),
        "environment": like["environment"],
        "results": evaluation.summary(),
    }
    write_json(given.out, record)
    print(as_text(record["results"]))


if __name__ == "__main__":
    main()
