#!/usr/bin/env python3
"""llama.cpp's loss on the windows of a record of `perplexity`, from the same GGUF file.

    python scripts/llama_cpp_loss.py --library FOLDER --model FILE --text FILE \
        --record perplexity.json --json benchmarks/gemma_llama_cpp.json

FOLDER has llama.cpp's shared libraries, from a build of it or from the npm package
@node-llama-cpp/linux-x64 (its bins/linux-x64). On a CPU llama.cpp rounds activations to 8 bits, so
the losses differ a little at each token, either way.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import click  # noqa: E402
import numpy as np  # noqa: E402
import record  # noqa: E402

from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import read_json  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402
from mlx_turbokv.evaluate.windows import first_scored  # noqa: E402
from mlx_turbokv.loading.gguf.hyperparameters import config_from_gguf  # noqa: E402
from mlx_turbokv.loading.gguf.reader import open_gguf  # noqa: E402
from mlx_turbokv.loading.gguf.tokenizer import build_tokenizer  # noqa: E402
from mlx_turbokv.model.text_windows import cut_windows  # noqa: E402

I32 = ctypes.c_int32


class Parameters(ctypes.Structure):
    """Of a model or a context: llama.cpp fills them, and theirs are the first bytes of these."""

    _fields_ = [("bytes", ctypes.c_byte * 1024)]


class Batch(ctypes.Structure):
    """llama.cpp's llama_batch."""

    _fields_ = [
        ("n_tokens", I32), ("token", ctypes.POINTER(I32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(I32)), ("n_seq_id", ctypes.POINTER(I32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(I32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


class LlamaCpp:
    """A model in llama.cpp, with a context of n_ctx tokens.

    Raises: InputError: the folder lacks a library, or the model does not load.
    """

    def __init__(self, folder: Path, model: Path, n_ctx: int, n_vocab: int) -> None:
        libraries = {}
        for name in ("ggml-base", "ggml", "llama"):
            found = sorted([*folder.glob(f"lib{name}.so*"), *folder.glob(f"lib{name}.v*.so")])
            if not found:
                raise InputError(f"{folder} has no library lib{name}.so of llama.cpp.")
            libraries[name] = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        libraries["ggml"].ggml_backend_load_all_from_path(str(folder).encode())
        self.api, self.n_vocab = _declared(libraries["llama"]), n_vocab
        loaded = self.api.llama_model_load_from_file(
            str(model).encode(), self.api.llama_model_default_params()
        )
        if not loaded:
            raise InputError(f"llama.cpp does not load {model}.")
        parameters = self.api.llama_context_default_params()
        sizes = ctypes.cast(ctypes.byref(parameters), ctypes.POINTER(ctypes.c_uint32))
        sizes[0], sizes[1] = n_ctx, n_ctx  # n_ctx and n_batch come first
        self.context = self.api.llama_init_from_model(loaded, parameters)
        self.batch = self.api.llama_batch_init(n_ctx, 0, 1)

    def losses(self, window: np.ndarray) -> np.ndarray:
        """Loss of each scored position's next token, in nats; [n_ctx - n_ctx // 2 - 1]."""
        first, last = first_scored(len(window)), len(window) - 1
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(window)
        for i, token in enumerate(window):
            self.batch.token[i], self.batch.pos[i] = int(token), i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = first <= i < last
        if self.api.llama_decode(self.context, self.batch):
            raise InputError("llama.cpp cannot read a window.")
        losses = []
        for i in range(first, last):
            pointer = self.api.llama_get_logits_ith(self.context, i)
            logits = np.ctypeslib.as_array(pointer, (self.n_vocab,)).astype(np.float64)
            largest = logits.max()
            log_sum = largest + np.log(np.exp(logits - largest).sum())
            losses.append(log_sum - logits[window[i + 1]])
        return np.array(losses)


def _declared(api: ctypes.CDLL) -> ctypes.CDLL:
    """llama.cpp's functions with their types."""
    pointer = ctypes.c_void_p
    types = {
        "llama_model_default_params": (Parameters, []),
        "llama_context_default_params": (Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
        "llama_init_from_model": (pointer, [pointer, Parameters]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_batch_init": (Batch, [I32, I32, I32]),
        "llama_decode": (I32, [pointer, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, I32]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(api, name)
        function.restype, function.argtypes = result, arguments
    return api


@click.command()
@click.option("--library", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--library-version", required=True, help="Of llama.cpp, for the record.")
@click.option("--model", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--text", required=True, metavar="FILE|sample|wikitext-2")
@click.option("--record", "record_path", required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def command(library, library_version, model, text, record_path, json_path) -> None:
    """Measure llama.cpp's loss on the windows of a record, and write both."""
    ours, file, source = read_json(record_path, "perplexity"), open_gguf(model), load_text(text)
    if ours["text"]["sha256"] != source.sha256:
        raise InputError(f"{text} is not the text of {record_path}.")
    n_ctx = ours["n_ctx"]
    windows = cut_windows(
        build_tokenizer(file.metadata), source.text, n_ctx, ours["n_windows"]
    )  # fmt: skip
    llama = LlamaCpp(library, model, n_ctx, config_from_gguf(file)["vocab_size"])
    nll = []
    for i, window in enumerate(windows):
        nll.append(float(llama.losses(window).mean()))
        print(f"window {i}: {nll[-1]:.4f}, here {ours['results'][0]['nll_by_window'][i]:.4f}")
    report = record.record(
        what="llama.cpp's loss on the windows of a record of perplexity",
        llama_cpp=library_version,
        record=record_path.name,
        model=ours["model"],
        n_ctx=n_ctx,
        nll_by_window=nll,
        nll_by_window_here=ours["results"][0]["nll_by_window"],
    )
    record.write(json_path, report)


if __name__ == "__main__":
    run(command)
