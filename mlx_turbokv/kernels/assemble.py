"""Kernel source: finds metal/, joins the files, and builds the callable kernels.

The files under metal/ are the only copy of the kernels. MLX is handed their text as `header`, on
CUDA a line that includes it, and one call into it as `source`; nothing is spliced into the text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..files import cache_dir, write_text

# what makes Metal kernels; None is mx.fast.metal_kernel. Tests put a CPU executor here.
factory: Callable | None = None
SHARED_FILES = ("common.h", "hadamard.h")
# the other files that a kernel needs, in order
NEEDS = {
    "decode.metal": (
        *("attention.h", "anchor.h", "lut.h", "decode_config.h", "decode_split.h"),
        *(
            "decode_queries.h",
            "decode_columns.h",
            "decode_keys.h",
            "decode_anchors.h",
            "decode_values.h",
        ),
        *("decode_softmax.h", "decode_join.h"),
    ),
    "merge.metal": ("attention.h",),
    "pack.metal": ("anchor.h", "pack_quantize.h", "pack_words.h"),
    "dequantize.metal": ("anchor.h", "dequantize.h"),
    "segments.metal": ("anchor.h", "dequantize.h", "whole_tile.h"),
}
# MLX hashes the text at every launch: what the compiler does not need is left out, lines stay
_COMMENT_OR_INDENT = re.compile(r"^ +|(?: *)//.*$", re.M)
# how a kernel knows its threads: attributes in Metal, macros of compat/cuda.h in CUDA. The masks
# tell compilers the ranges.
GROUP = "threadgroup_position_in_grid"
LANE = "simdgroup_index_in_threadgroup & 7u, thread_index_in_simdgroup & 31u"
THREAD = f"{GROUP}, {LANE}"


class Launch(NamedTuple):
    """One or two kernels as a call on arrays, and its parameters: the same for a step's layers."""

    call: Callable
    params: mx.array
    k_constants: mx.array
    v_constants: mx.array


@cache
def metal_folder() -> Path:
    """The folder of the kernel sources: in the wheel, or next to the package in a checkout.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "metal", package.parent / "metal"):
        if (folder / SHARED_FILES[0]).is_file():
            return folder
    raise FileNotFoundError(f"mlx_turbokv's kernel sources are not in {package / 'metal'}.")


@cache
def header_text(file: str, backend: str) -> str:
    """The text of one kernel file with what it needs before it.

    Args:
        file: such as ``decode.metal``.
        backend: ``metal`` or ``cuda``.
    """
    files = (*(("compat/cuda.h",) if backend == "cuda" else ()), *SHARED_FILES)
    files += (*NEEDS.get(file, ()), file)
    parts = []
    for name in files:
        text = (metal_folder() / name).read_text(encoding="ascii")
        parts.append(f'#line 1 "metal/{name}"\n{_COMMENT_OR_INDENT.sub("", text)}')
    return "".join(parts)


def included(file: str, text: str) -> str:
    """A line that includes ``text``, which is written to a file; ``text`` where that cannot be.

    MLX 0.32.4 hashes what it is handed at every launch, traced or not, which took longer than all
    else (docs/kernels.md). Only CUDA's compiler is known to read files; it does so at a kernel's
    first launch.
    """
    path = (cache_dir() / "kernels" / f"{Path(file).stem}_{_digest(text)}.h").resolve()
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    except OSError:
        return text
    return text if '"' in str(path) else f'#include "{path}"\n'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replayed(launch: Callable, backend: str) -> Callable:
    """A function of arrays that launches kernels, traced at its first call and replayed after it.

    At a call of a kernel MLX writes its whole text anew; a replay shares what the trace made. What
    differs from call to call must be an array among the arguments, and nothing but arrays may.
    """
    return launch if backend == "metal" and factory is not None else mx.compile(launch)


def build(
    name: str,
    file: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    backend: str,
) -> Callable:
    """The kernel ``name`` as MLX calls it; the same object for the same arguments.

    Args:
        file: the file under metal/ that holds the function which ``source`` calls.
        backend: ``metal`` or ``cuda``.
    """
    maker = factory if backend == "metal" else None
    return _build(maker, name, file, tuple(input_names), tuple(output_names), source, backend)


@cache
def _build(
    maker: Callable | None,
    name: str,
    file: str,
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    source: str,
    backend: str,
) -> Callable:
    if maker is None:
        maker = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    header = header_text(file, backend)
    name = f"turbokv_{name}"
    if backend == "cuda":  # MLX keeps compiled kernels in a folder, by name alone
        name += f"_{_digest(header + source)[:8]}"
        header = included(file, header)
    return maker(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
    )
