"""Runs the launches of `mx.fast.metal_kernel` on the CPU, in several lane orders."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .build import Compiled, compile_kernel
from .errors import HostError
from .generated import Launch, capture
from .worker import Buffer, Worker

# (build, lane order, seed) of each run of a launch.
RUNS = (("asan", "forward", 0), ("records", "reverse", 0), ("asan", "shuffled", 20))


class HostMetal:
    """Runs Metal kernels on the CPU.

    Every launch runs once for each entry of `runs`, and the outputs must agree bit for bit.
    `coverage` is a folder for the counters of executed lines (see coverage.py). `launches` is
    the list of all launches, newest last.
    """

    def __init__(
        self, runs: Sequence[tuple[str, str, int]] = RUNS, coverage: Path | None = None
    ) -> None:
        self.runs = tuple(runs)
        self.launches: list[Launch] = []
        self._workers = {b: Worker(b, coverage) for b in {r[0] for r in self.runs}}
        self._finalizer = weakref.finalize(self, _close, list(self._workers.values()))

    def close(self) -> None:
        """Ends the processes and writes the coverage counters."""
        self._finalizer()

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        **options: object,
    ) -> HostKernel:
        """As `mx.fast.metal_kernel`, but what it returns runs on the CPU."""
        names = {"input_names": list(input_names), "output_names": list(output_names)}
        return HostKernel(self, {"name": name, **names, "source": source, **options})

    def run(self, launch: Launch) -> list[np.ndarray]:
        """Runs a launch of a generated text; bfloat16 outputs come as uint16.

        Raises:
            HostError: a defect, or lane orders that disagree.
        """
        self.launches.append(launch)
        compiled = compile_kernel(launch.text, launch.name)
        buffers = _buffers(compiled, launch)
        return self.run_buffers(compiled, launch.grid, launch.threadgroup, buffers)

    def run_buffers(
        self, compiled: Compiled, grid: Sequence[int], threadgroup: Sequence[int],
        buffers: list[Buffer],
    ) -> list[np.ndarray]:  # fmt: skip
        """Runs a compiled kernel on buffers in the order of its signature."""
        grid, threadgroup = _three(grid), _three(threadgroup)
        threadgroup = tuple(min(t, g) for t, g in zip(threadgroup, grid))
        waiting: list[tuple[str, str]] = []
        runs = list(self.runs)
        results = []
        while runs or waiting:
            while runs and runs[0][0] not in [w[0] for w in waiting]:
                build, order, seed = runs.pop(0)
                self._workers[build].send(
                    compiled.libraries[build], grid, threadgroup, buffers, order, seed
                )
                waiting.append((build, order))
            build, order = waiting.pop(0)
            try:
                outputs = self._workers[build].receive(compiled.libraries[build], buffers)
                results.append((order, outputs))
            except HostError as error:
                self._drain(compiled, waiting, buffers)
                raise HostError(f"{compiled.kernel.name}, {order} lanes: {error}") from None
        first = results[0][1]
        for order, outputs in results[1:]:
            for b, one, other in zip([b for b in buffers if b.kind != 0], first, outputs):
                if one.tobytes() != other.tobytes():
                    raise HostError(
                        f"{compiled.kernel.name}: output '{b.name}' depends on the order of "
                        f"lanes ({results[0][0]} and {order} differ)"
                    )
        return first

    def _drain(self, compiled: Compiled, waiting: list, buffers: list[Buffer]) -> None:
        for build, _ in waiting:
            try:
                self._workers[build].receive(compiled.libraries[build], buffers)
            except HostError:
                pass


class Recorder(HostMetal):
    """Records launches without running them; every output is zeros."""

    def __init__(self) -> None:
        super().__init__(runs=())

    def run(self, launch: Launch) -> list[np.ndarray]:
        """Zeros for the outputs of a launch."""
        self.launches.append(launch)
        return [np.zeros(shape, _numpy_dtype(dtype)) for shape, dtype in launch.outputs.values()]


class HostKernel:
    """What `HostMetal.metal_kernel` returns: MLX's calling convention, mx.arrays out."""

    def __init__(self, host: HostMetal, build: dict) -> None:
        self._host = host
        self._build = build

    def __call__(self, **call: object) -> list[mx.array]:
        launch = capture(self._build, **call)
        dtypes = [dtype for _, dtype in launch.outputs.values()]
        return [to_mlx(a, d) for a, d in zip(self._host.run(launch), dtypes)]


def to_numpy(array: mx.array) -> np.ndarray:
    """The bits of an array, row-contiguous; bfloat16 as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array))


def to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The inverse of `to_numpy`."""
    out = mx.array(array)
    return out.view(mx.bfloat16) if dtype == mx.bfloat16 else out


def _numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    return np.dtype(to_numpy(mx.zeros((1,), dtype=dtype)).dtype)


def _buffers(compiled: Compiled, launch: Launch) -> list[Buffer]:
    """The buffers in the order of the signature."""
    out = []
    for p in compiled.kernel.parameters:
        if p.buffer is None:
            continue
        if p.name in launch.outputs:
            shape, dtype = launch.outputs[p.name]
            data = np.zeros(shape, dtype=_numpy_dtype(dtype))
            if launch.init_value is not None:
                data = to_numpy(mx.full(shape, launch.init_value, dtype=dtype))
            out.append(Buffer(p.name, data, 1 if launch.init_value is None else 2))
        elif p.name in launch.inputs:
            out.append(Buffer(p.name, to_numpy(launch.inputs[p.name]), 0))
        else:
            out.append(Buffer(p.name, _extra(p.name, launch), 0))
    return out


def _extra(name: str, launch: Launch) -> np.ndarray:
    owner, _, what = name.rpartition("_")
    array = to_numpy(launch.inputs[owner])
    if what == "shape":
        return np.array(array.shape, dtype=np.int32)
    if what == "strides":
        return np.array([s // array.itemsize for s in array.strides], dtype=np.int64)
    return np.array(array.ndim, dtype=np.int32)


def _three(v: Sequence[int]) -> tuple[int, int, int]:
    v = tuple(int(x) for x in v)
    return (*v, 1, 1)[:3]  # type: ignore[return-value]


def _close(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()
