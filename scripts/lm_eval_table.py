"""Accuracy of models through packed caches: lm-eval by mlx_lm.evaluate, one task of BIG-bench.

    pip download --no-deps bigbench==1.0.0
    python scripts/lm_eval_table.py bigbench-1.0.0.tar.gz --limit 200 --json benchmarks/lm_eval.json

The task is goal_inference (which of four goals does a step serve?), its data what the package
``bigbench`` of the Python package index brings. Each item follows examples that are not among the
items, so that its prompt is longer than the tokens that caches protect. All configurations answer
the same items; ``mlx-kv4`` among them is mlx-lm's own quantised cache. A model's rows replace those
that the record has of it. With --answers FOLDER a configuration that has ended is kept there, and
the same command goes on after the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from record import record, write  # noqa: E402

from mlx_turbokv.cli.output import print_status  # noqa: E402
from mlx_turbokv.evaluate.configuration import (  # noqa: E402
    check_name,
    is_peer,
    parse_policy,
    prepare,
)
from mlx_turbokv.loading import blas  # noqa: E402
from mlx_turbokv.loading.default_model import default_model_file  # noqa: E402

TASK = "goal_inference"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/goal_step_wikihow/goal_inference/task.json"
N_EXAMPLES = 200  # items from which the examples before a question are drawn
SEED = 0
YAML = f"""task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: test.jsonl, shots: shots.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: shots
doc_to_text: "Q: {{{{input}}}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
- {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_task(archive: Path, folder: Path) -> None:
    """The task's files: items in an order of our own, the first of them as examples."""
    with tarfile.open(archive) as files:
        examples = json.load(files.extractfile(MEMBER))["examples"]
    items = []
    for example in examples:
        choices, scores = zip(*example["target_scores"].items())
        if list(scores).count(1) == 1:
            text = example["input"].strip()
            items.append({"input": text, "choices": choices, "label": scores.index(1)})
    random.Random(SEED).shuffle(items)
    for name, part in (("shots", items[:N_EXAMPLES]), ("test", items[N_EXAMPLES:])):
        lines = "".join(json.dumps(item) + "\n" for item in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(YAML, encoding="utf-8")


def answers(folder: Path, config: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """What lm-eval found, item by item: acc, acc_norm (by length), log-likelihood of what is right.

    Runs what ``mlx_turbokv run … -- mlx_lm.evaluate --tasks goal_inference.yaml`` runs.
    """
    import lm_eval

    evaluate, found = lm_eval.simple_evaluate, {}

    def keeping(*given, **options):
        found.update(evaluate(*given, **options))
        return found

    command = ["--model", args.model, "--tasks", f"{TASK}.yaml", "--limit", str(args.limit),
               "--num-shots", str(args.num_shots), "--no-apply-chat-template",
               "--output-dir", str(folder / "results")]  # fmt: skip
    attaching = attached(config)
    with contextlib.chdir(folder), mock.patch.object(lm_eval, "simple_evaluate", keeping):
        attaching.run("evaluate", command)
    if not attaching.has_packed:
        raise SystemExit(f"mlx_lm.evaluate made no cache of {config}")
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return {
        **{name: [float(sample[name]) for sample in samples] for name in ("acc", "acc_norm")},
        "log_likelihood": [sample["filtered_resps"][sample["target"]][0] for sample in samples],
    }


def attached(config: str):
    """mlx-lm's command with caches of a configuration."""
    from mlx_turbokv.loading.attached import Attaching

    class PeerCaches(Attaching):
        """With a quantised cache of mlx-lm or llama.cpp."""

        def _attach(self, model, name: str, tokenizer) -> None:
            make = prepare(model, config).make_caches

            def make_cache():
                self.n_caches += 1
                return make()

            make_cache.turbokv_previous = vars(model).get("make_cache")
            model.make_cache = make_cache

    if is_peer(config):
        return PeerCaches(print_status, lambda *_: None)
    policy = parse_policy(config)
    return Attaching(print_status, lambda *_: None, policy=policy, centre="auto")


def kept_answers(folder: Path, config: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """As ``answers``; those of a run that has ended come from --answers, and are kept there."""
    if args.answers is None:
        return answers(folder, config, args)
    about = {"config": config, "limit": args.limit, "num_shots": args.num_shots,
             "model": Path(args.model).name, "mlx": version("mlx")}  # fmt: skip
    name = "-".join(re.sub(r"[^\w.+]", "_", str(part)) for part in about.values())
    path = args.answers / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())["answers"]
    given = answers(folder, config, args)
    args.answers.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "answers": given}))
    return given


def row(config: str, given: dict[str, list[float]], first: dict[str, list[float]]) -> dict:
    """Means of a configuration, and of the differences to the first, item by item."""
    found: dict = {"config": config, "items": len(given["acc"])}
    for name, values in given.items():
        apart = [a - b for a, b in zip(values, first[name], strict=True)]
        found[name] = {"mean": mean_and_error(values), "difference": mean_and_error(apart)}
        found[name]["changed"] = sum(x != 0 for x in apart)
    return found


def mean_and_error(values: list[float]) -> list[float]:
    """The mean, and its standard error."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return [mean, (variance / n) ** 0.5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="bigbench-1.0.0.tar.gz")
    parser.add_argument("--model", help="the default model where not given")
    parser.add_argument("--configs", nargs="+", default=["f16/f16", "la-v7", "turbo4/turbo4"])
    parser.add_argument("--limit", type=int, default=200, help="items")
    parser.add_argument("--num-shots", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answers", type=Path, metavar="FOLDER",
                        help="of configurations that have ended, item by item")  # fmt: skip
    args = parser.parse_args()
    blas.require_mlx()
    for config in args.configs:
        check_name(config)
    args.model = args.model or str(default_model_file())
    if Path(args.model).exists():  # the task runs in a folder of its own
        args.model = str(Path(args.model).resolve())
    if args.json is not None:
        args.json = args.json.resolve()
    if args.answers is not None:
        args.answers = args.answers.resolve()
    rows, first = [], None
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        write_task(args.archive, Path(name))
        for config in args.configs:
            started = time.perf_counter()
            given = kept_answers(Path(name), config, args)
            first = first or given
            protected = "" if is_peer(config) else str(parse_policy(config).protection or "")
            rows.append(row(config, given, first) | {"protected": protected or None})
            print(f"{time.perf_counter() - started:.0f} s", rows[-1], flush=True)
            about = record(num_shots=args.num_shots, rows=rows)
            models = {**kept.get("models", {}), Path(args.model).stem: about}
            write(args.json, {"task": TASK, "data": "bigbench==1.0.0", "models": models})


if __name__ == "__main__":
    main()
