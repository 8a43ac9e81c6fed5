"""Needle in a haystack: does the model find with a packed cache what it finds with f16?

For each case the prompt goes in once a configuration. Then the model generates greedily, and the
answer is scored exactly; and the answer is fed as it should be, which gives its log-probability: a
score that moves where a small model seldom finds anything. The first configuration is the f16
cache, so that a miss of the model is not taken for a miss of the cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from . import statistics
from .checkpoint import Journal
from .divergence import check_finite
from .first_piece import FirstPiece
from .haystack import Case, Haystack, Prompt, is_found
from .prepared import Prepared
from .windows import read_prompt

SPARE_TOKENS = 2  # generated beyond the answer's own, for a quote or a space
Progress = Callable[[int, int, str], None]


def run_cases(
    model: nn.Module,
    haystack: Haystack,
    cases: Sequence[Case],
    configs: Sequence[Prepared],
    journal: Journal | None = None,
    progress: Progress | None = None,
    deadline: float | None = None,
    prefill_step_size: int = 2048,
) -> list[dict]:
    """One record a case, with each configuration's result; cases the journal has are kept.

    Args:
        deadline: a ``time.perf_counter`` value after which no further case starts.

    Raises:
        InputError: a context too short for its question, or logits that are not numbers.
    """
    kept = {part["case"]: part for part in journal.parts} if journal else {}
    records, total = [], len(cases) * len(configs)
    for i, case in enumerate(cases):
        if (record := kept.get(case.name)) is None:
            if deadline is not None and time.perf_counter() > deadline:
                break
            prompt = haystack.prompt(case)
            record = _describe(case, prompt)
            first_piece = FirstPiece(model)
            for j, config in enumerate(configs):
                result = ask(
                    model, haystack.tokenizer, prompt, config, prefill_step_size, first_piece
                )
                record["results"][config.name] = result
                if progress:
                    progress(i * len(configs) + j + 1, total, f"{case.name} {config.name}")
            if journal:
                journal.add(record)
        elif progress:
            progress((i + 1) * len(configs), total, "kept")
        records.append(record)
    return records


def ask(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    config: Prepared,
    prefill_step_size: int = 2048,
    first_piece: FirstPiece | None = None,
) -> dict:
    """A configuration's answer to a prompt, and its score.

    Args:
        first_piece: of the prompt, shared by configurations.

    Returns:
        ``found``, the ``response``, ``logp``, the log-probability in nats of the whole answer, and
        ``rank``, how many tokens of the answer in a row would have been chosen from its start.
    """
    caches = config.make_caches()
    tokens = mx.array(prompt.tokens)
    read_prompt(model, tokens[None, :-1], caches, prefill_step_size, first_piece)
    trimmable = can_trim_prompt_cache(caches)
    again = caches if trimmable else copy.deepcopy(caches)
    answer = mx.array(prompt.answer_tokens)
    logits = model(mx.concatenate([tokens[-1:], answer[:-1]])[None], cache=caches)[0]
    logp, hits = _forced(logits, answer)
    check_finite(np.array(logp), f"configuration {config.name}")
    if trimmable:
        trim_prompt_cache(caches, len(prompt.answer_tokens))
    response = _greedy(model, tokenizer, tokens[-1:], again, len(prompt.answer_tokens))
    return {
        "found": is_found(response, prompt.answer),
        "response": response,
        "logp": logp,
        "rank": hits,
    }


def _forced(logits: mx.array, answer: mx.array) -> tuple[float, int]:
    logits = logits.astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    total = mx.take_along_axis(logp, answer[:, None], axis=-1).sum()
    right = np.array(mx.argmax(logits, axis=-1) == answer)
    return float(np.array(total)), int(np.cumprod(right).sum())


def _greedy(model: nn.Module, tokenizer: Any, token: mx.array, caches: list, n_answer: int) -> str:
    ends = set(getattr(tokenizer, "eos_token_ids", ()) or ())
    out: list[int] = []
    for _ in range(n_answer + SPARE_TOKENS):
        token = mx.argmax(model(token[None], cache=caches)[:, -1], axis=-1)
        if (value := int(np.array(token)[0])) in ends:
            break
        out.append(value)
    return tokenizer.decode(out)


def _describe(case: Case, prompt: Prompt) -> dict:
    return {
        "case": case.name,
        "kind": case.kind,
        "context": case.context,
        "depth": case.depth,
        "repeat": case.repeat,
        "prompt_tokens": len(prompt.tokens),
        "answer": prompt.answer,
        "answer_tokens": len(prompt.answer_tokens),
        "results": {},
    }


def summarise(records: Sequence[dict], configs: Sequence[Prepared]) -> list[dict]:
    """One record a configuration, over all cases, by kind and by context; the first is f16's."""
    names = [c.name for c in configs]
    n = max(1, round(float(np.mean([r["prompt_tokens"] for r in records]))))
    summary = []
    for config in configs:
        row = {
            "config": config.name,
            "bits_per_value": config.bits_at(n)[2],
            "backend": config.backend,
            "centred": config.centred,
            "protected": str(config.protection) if config.protection else None,
            **_rates(records, config.name, names[0]),
        }
        for key in ("kind", "context"):
            values = sorted({r[key] for r in records})
            row[f"by_{key}"] = [
                {key: value}
                | _rates([r for r in records if r[key] == value], config.name, names[0])
                for value in values
            ]
        summary.append(row)
    return summary


def _rates(records: Sequence[dict], name: str, reference: str) -> dict:
    """Rates and log-probabilities over cases; differences are paired, case by case."""
    mine = [r["results"][name] for r in records]
    theirs = [r["results"][reference] for r in records]
    of_reference = [a["found"] for a, b in zip(mine, theirs) if b["found"]]
    gained = sum(a["found"] and not b["found"] for a, b in zip(mine, theirs))
    delta = np.array([a["logp"] - b["logp"] for a, b in zip(mine, theirs)], np.float64)
    return {
        "n": len(mine),
        "found": sum(a["found"] for a in mine),
        "reference_found": len(of_reference),
        "found_of_reference": sum(of_reference),
        "found_beyond_reference": gained,
        "logp": statistics.mean_and_error(np.array([a["logp"] for a in mine])),
        "delta_logp": statistics.mean_with_interval(delta),
    }
