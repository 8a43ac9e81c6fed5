"""The Metal text of a kernel call, as MLX generates it, on machines without Metal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

_SAMPLE = [0]  # mx.export_function refuses a function without inputs


@dataclass(frozen=True)
class Launch:
    """One kernel call: its text, grid and template values, inputs, and outputs to be made."""

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: dict[str, mx.array]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    init_value: float | None = None
    template: tuple = ()


def metal_text(call: Callable[..., object], inputs: Sequence[mx.array]) -> tuple[str, str]:
    """Name and generated text of the one Metal kernel that `call(*inputs)` launches."""
    found: list[tuple[str, str]] = []

    def note(entry: dict) -> None:
        if entry["type"] == "primitive" and entry["name"] == "CustomKernel":
            found.append((entry["arguments"][0], entry["arguments"][1]))

    mx.export_function(note, call, *inputs)
    if len(found) != 1:
        raise ValueError(f"the call launches {len(found)} Metal kernels where one was expected")
    return found[0]


def capture(
    build: dict,
    *,
    inputs: Sequence[object],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    template: Sequence[tuple[str, object]] | None = None,
    init_value: float | None = None,
) -> Launch:
    """The launch that a call of `mx.fast.metal_kernel(**build)` with these arguments makes."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    if len(arrays) != len(build["input_names"]):
        raise ValueError(
            f"{len(arrays)} inputs for the names {list(build['input_names'])} of {build['name']}"
        )
    launcher = mx.fast.metal_kernel(**build)

    def call(*args: mx.array) -> object:
        return launcher(
            inputs=list(args[: len(arrays)]),
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=tuple(grid),
            threadgroup=tuple(threadgroup),
            template=list(template) if template else None,
            init_value=init_value,
        )

    name, text = metal_text(call, arrays or [mx.array(_SAMPLE)])
    shapes = [tuple(s) for s in output_shapes]
    return Launch(
        name=name,
        text=text,
        grid=tuple(grid),
        threadgroup=tuple(threadgroup),
        inputs=dict(zip(build["input_names"], arrays)),
        outputs=dict(zip(build["output_names"], zip(shapes, output_dtypes))),
        init_value=init_value,
        template=tuple(template or ()),
    )
