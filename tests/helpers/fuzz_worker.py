"""Reads mutated files in a process of its own, with limits on its time and its memory.

    python fuzz_worker.py KIND FOLDER FIRST COUNT

prints a JSON line before and after each mutation. What ends otherwise than by a use of the file or
by an InputError of one line is a defect.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mlx_turbokv  # noqa: F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import fuzz_mutations
import mlx.core as mx
from centred_model import centred_model
from gguf_files import small_model, write_small_gguf
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_caches
from mlx_lm.models.cache import save_prompt_cache
from tiny_models import tiny_model

from mlx_turbokv.cache import checkpoint, files
from mlx_turbokv.cache.factory import make_prompt_cache
from mlx_turbokv.cache.file_options import Asked
from mlx_turbokv.centring.references import References, load_references, save_references
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import assemble
from mlx_turbokv.loading import models
from mlx_turbokv.loading.model_shape import shape_from_config
from mlx_turbokv.model.fingerprint import fingerprint
from mlx_turbokv.policy import load_policy

SECONDS = 20
BYTES = 2 << 30
LONGEST_SENTENCE = 1500
Use = Callable[[random.Random], None]
TOKENS = list(range(1, 41))


class Hang(BaseException):
    """A mutation took longer than SECONDS."""


def cache_files(folder: Path, backend: str) -> Use:
    """Prompt caches of models with every kind of cache: continued, trimmed and saved again."""
    bases = []
    options = [
        ("llama", {"k": "turbo4", "v": "turbo2"}),
        ("llama", {"k": "q8_0", "v": "turbo3", "max_kv_size": 30}),
        ("centred", {"k": "turbo3", "v": "f16"}),
        ("gemma3_text", {"k": "q8_0", "v": "q8_0", "compress_sliding": True}),
        ("falcon_h1", {"k": "q8_0", "v": "turbo4"}),
        ("llama4", {"k": "f16", "v": "f16"}),
    ]
    makers = {"llama": lambda: small_model("llama")[0], "centred": centred_model}
    for i, (name, kwargs) in enumerate(options):
        model = makers[name]() if name in makers else tiny_model(name)
        kwargs = {**kwargs, "backend": backend}
        caches = make_prompt_cache(model, **kwargs)
        mx.eval(model(mx.array([TOKENS]), cache=caches))
        path = folder / f"base-{i}.safetensors"
        messages, mark = [{"role": "user", "content": "a"}], checkpoint.take(caches, len(TOKENS))
        files.save(path, files.Saved(caches, TOKENS, messages, mark), "m", model)
        bases.append((path, model, kwargs))
    for bits in (None, 8):  # what mlx_lm.cache_prompt writes
        model, kwargs = small_model("llama", head_dim=32)[0], {"k": "turbo4", "v": "turbo2"}
        caches = mlx_lm_caches(model)
        mx.eval(model(mx.array([TOKENS]), cache=caches))
        caches = [c.to_quantized(32, bits) if bits else c for c in caches]
        path = folder / f"mlx-lm-{bits}.safetensors"
        save_prompt_cache(str(path), caches, {"model": "m", "tokenizer_config": "{}"})
        bases.append((path, model, {**kwargs, "backend": backend}))

    def use(rng: random.Random) -> None:
        base, model, kwargs = rng.choice(bases)
        path = folder / "changed.safetensors"
        shutil.copy(base, path)
        if rng.random() < 0.5:  # an earlier version's file names no fingerprint
            fuzz_mutations.safetensors_files.edit(path, lambda _, m: m.pop("0.fingerprint", None))
        fuzz_mutations.change_safetensors(path, rng)
        fresh = make_prompt_cache(model, **kwargs)
        saved = files.load(path, "m", model, fresh, Asked(formats=rng.random() < 0.3))
        mx.eval(model(mx.array([[1]]), cache=saved.caches))
        mx.eval(model(mx.array([[2, 3, 4]]), cache=saved.caches))
        if saved.checkpoint is not None:
            checkpoint.restore(saved.caches, saved.checkpoint)
            mx.eval(model(mx.array([[1]]), cache=saved.caches))
            saved.tokens = [*saved.tokens[: saved.checkpoint.n_tokens], 1]
            files.save(path, saved, "m", model)
            return
        for cache in saved.caches:
            if cache.is_trimmable():
                cache.trim(2)
        saved.tokens.extend([1, 2, 3, 4])
        files.save(path, saved, "m", model)

    return use


def gguf_files(folder: Path, backend: str) -> Use:
    """Models, planned and run."""
    bases = []
    for architecture in ("llama", "qwen2", "qwen3"):
        (folder / architecture).mkdir()
        bases.append(write_small_gguf(folder / architecture, architecture))

    def use(rng: random.Random) -> None:
        path = folder / "changed.gguf"
        shutil.copy(rng.choice(bases), path)
        fuzz_mutations.change_gguf(path, rng)
        config, name, _ = models.load_config(path)
        shape_from_config(config, name)
        loaded = models.load(path)
        tokens = loaded.tokenizer.encode("the cat") or [0]
        loaded.tokenizer.decode(tokens)
        mx.eval(loaded.model(mx.array([tokens[:8]])))

    return use


def policy_files(folder: Path, backend: str) -> Use:
    """Policies, applied to a model of three layers."""
    document = {
        "version": 1, "model": {"name": "m"}, "layers": [{"k": "q8_0", "v": "turbo2"}] * 3
    }  # fmt: skip
    text = json.dumps(document)

    def use(rng: random.Random) -> None:
        path = folder / "changed.json"
        path.write_bytes(fuzz_mutations.changed_text(text, rng))
        policy = load_policy(path)
        policy.formats(3)
        policy.notes(3)

    return use


def reference_files(folder: Path, backend: str) -> Use:
    """Key references, used to centre a model's keys."""
    model = centred_model()
    heads, dim = 2, 32
    means = {i: mx.ones((heads, dim)) for i in range(3)}
    save_references(folder / "p", References(means, frozenset(), fingerprint(model), {"a": 1}))

    def use(rng: random.Random) -> None:
        for end in ("json", "safetensors"):
            shutil.copy(folder / f"p.keys.{end}", folder / f"changed.keys.{end}")
        if rng.random() < 0.6:
            path = folder / "changed.keys.json"
            path.write_bytes(fuzz_mutations.changed_text(path.read_text(), rng))
        else:
            fuzz_mutations.change_safetensors(folder / "changed.keys.safetensors", rng)
        path = folder / "changed.keys.json"
        load_references(path, model)
        caches = make_prompt_cache(model, "turbo4", "turbo2", centre=path, backend=backend)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=caches))

    return use


KINDS = {
    "cache": cache_files, "gguf": gguf_files, "policy": policy_files, "references": reference_files
}  # fmt: skip


def outcome(use: Use, seed: str) -> dict:
    """What one mutation ended in."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        use(random.Random(seed))
        return {"outcome": "used"}
    except InputError as error:
        text = str(error)
        wrong = "\n" in text or len(text) > LONGEST_SENTENCE
        return {"outcome": "no sentence" if wrong else "refused", "text": text[:3000]}
    except Hang:
        return {"outcome": "hang", "text": traceback.format_exc()[-3000:]}
    except BaseException:
        return {"outcome": "traceback", "text": traceback.format_exc()[-3000:]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        mx.clear_cache()


def limit_memory() -> None:
    """Let this process grow by BYTES from now on."""
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def hang(*_: object) -> None:
    raise Hang


def main() -> None:
    kind, folder, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    backend = "reference"
    if os.environ.get("FUZZ_KERNELS"):  # on the CPU, under the sanitizer
        from metal_host import HostMetal

        assemble.factory = HostMetal().metal_kernel
        backend = "metal"
    use = KINDS[kind](folder, backend)
    signal.signal(signal.SIGALRM, hang)
    outcome(use, "warm-up")
    limit_memory()
    for seed in range(first, first + count):
        print(json.dumps({"starts": seed}), flush=True)
        start = time.perf_counter()
        result = outcome(use, f"{kind} {seed}")
        result |= {"seed": seed, "seconds": time.perf_counter() - start}
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
