"""mlx-lm models with the tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import InputError, short
from ..config import build_model, parameters
from .hyperparameters import ROPE_FACTORS, config_from_gguf, rope_factors
from .reader import GGUFFile
from .repack import BITS, GROUP_SIZE, repack

_NUMPY = {mx.float32: np.float32, mx.float16: np.float16}
_LARGEST_HALF = 65504.0


class FactoredRoPE(nn.Module):
    """RoPE with each pair's wavelength multiplied by a factor from the file (Llama 3.1 on)."""

    def __init__(self, dims: int, base: float, factors: np.ndarray) -> None:
        super().__init__()
        self.dims = dims
        wavelengths = base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
        self._freqs = mx.array((wavelengths * factors).astype(np.float32))

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


def model_from_gguf(
    file: GGUFFile,
    *,
    packed: bool = True,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build mlx-lm's model of the file's architecture and give it every tensor of the file.

    packed: keep weights of the types in ``repack.BITS`` quantised, as MLX's affine groups of 32.
    dtype: of everything else; None takes bfloat16 for a file with BF16 weights and for gemma3,
        whose activations exceed float16, else float16.
    progress: called with the bytes read and those of all tensors.

    Raises:
        InputError: a tensor is of an unsupported type, has no place in the model or another shape
            than the model's, or the model has a parameter that the file doesn't fill.
    """
    config = config_from_gguf(file)
    model = build_model(config)
    targets = parameters_by_tensor(model, file.architecture, config["num_hidden_layers"])
    reader = _TensorReader(file, config, packed, dtype or _default_dtype(file))
    weights: dict[str, mx.array] = {}
    done, total = 0, sum(int(tensor.n_bytes) for tensor in file.tensors.values())
    for name, tensor in file.tensors.items():
        progress(done, total)
        done += int(tensor.n_bytes)
        if name in ROPE_FACTORS:
            continue
        if name not in targets:
            raise file.error(
                f"has the tensor {short(name)}, which mlx-lm's {file.architecture} has no place "
                "for."
            )
        weights.update(reader.read(name, tensor, targets[name]))
    _fill_absent_biases(model, weights, reader.dtype)
    if reader.bits:
        nn.quantize(model, GROUP_SIZE, 4, class_predicate=reader.quantization_of)
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": max(reader.bits.values())}
    _check_parameters(file, model, weights)
    model.load_weights(list(weights.items()), strict=True)
    _use_rope_factors(file, model, config)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def parameters_by_tensor(model: nn.Module, architecture: str, n_layers: int) -> dict[str, str]:
    """The model's parameters by the names of their GGUF tensors."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, n_layers)
    found = {}
    for parameter in parameters(model):
        if tensor := names.get_name(parameter, try_suffixes=(".weight", ".bias")):
            found[tensor] = parameter
    return found


class _TensorReader:
    def __init__(
        self, file: GGUFFile, config: dict[str, Any], packed: bool, dtype: mx.Dtype
    ) -> None:
        self.file, self.config, self.packed, self.dtype = file, config, packed, dtype
        self.bits: dict[str, int] = {}

    def quantization_of(self, path: str, module: nn.Module) -> dict[str, int] | bool:
        bits = self.bits.get(path)
        return {"group_size": GROUP_SIZE, "bits": bits} if bits else False

    def read(self, name: str, tensor: Any, target: str) -> dict[str, mx.array]:
        """The weights of one tensor: one, or codes, scales and biases."""
        kind = tensor.tensor_type.name
        path, _, suffix = target.rpartition(".")
        if self.packed and kind in BITS and suffix == "weight" and len(tensor.shape) == 2:
            scale_type = np.float32 if self.dtype == mx.float32 else np.float16
            parts = repack(np.asarray(tensor.data), kind, scale_type)
            codes, scales, biases = (mx.array(self._unpermute(name, part)) for part in parts)
            self.bits[path] = BITS[kind]
            return {
                target: codes,
                f"{path}.scales": scales.astype(self.dtype),
                f"{path}.biases": biases.astype(self.dtype),
            }
        values = self._unpermute(name, self._dequantize(name, tensor))
        if self.file.architecture == "gemma3" and target.endswith("norm.weight"):
            values = values - 1  # the file has what rows are multiplied by, mlx-lm one less
        return {target: self._to_dtype(values)}

    def _dequantize(self, name: str, tensor: Any) -> np.ndarray:
        from gguf.quants import dequantize

        cause, values = None, None
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, TypeError) as error:
            cause = error
        if values is None or values.dtype != np.float32:
            raise InputError(
                f"Tensor {name} of {self.file.path} has the type {tensor.tensor_type.name}, which "
                "cannot be read; accepted are F32, F16, BF16 and ggml's quantised types."
            ) from cause
        return values.reshape([int(n) for n in reversed(tensor.shape)])

    def _unpermute(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Undo the row order that llama.cpp's converter gives Q and K of architecture llama.

        It interleaves the two halves of each head for RoPE on neighbouring dimensions; mlx-lm's
        default, like the original weights, pairs dimension i with i + head_dim / 2.
        """
        part = name.split(".")[-2]
        if self.file.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return rows
        n_heads = self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if rows.shape[0] % (2 * n_heads):
            return rows  # of a shape that the check of all parameters refuses
        pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    def _to_dtype(self, values: np.ndarray) -> mx.array:
        if self.dtype == mx.float16 and np.abs(values).max(initial=0) > _LARGEST_HALF:
            raise self.file.error(
                f"has weights beyond float16's range ({np.abs(values).max():.3g}); accepted are "
                f"magnitudes up to {_LARGEST_HALF:g}."
            )
        if self.dtype in _NUMPY:
            return mx.array(values.astype(_NUMPY[self.dtype], copy=False))
        return mx.array(values).astype(self.dtype)


def _default_dtype(file: GGUFFile) -> mx.Dtype:
    kinds = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) == 2}
    # bfloat16 weights, and the activations of gemma3, may lie outside float16's range.
    return mx.bfloat16 if "BF16" in kinds or file.architecture == "gemma3" else mx.float16


def _fill_absent_biases(model: nn.Module, weights: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Zeros for the biases that mlx-lm's llama switches on only together (q, k, v and o)."""
    if model.model_type != "llama":
        return
    for name, value in parameters(model).items():
        if name.endswith("proj.bias") and name not in weights:
            weights[name] = mx.zeros(value.shape, dtype)


def _check_parameters(file: GGUFFile, model: nn.Module, weights: dict[str, mx.array]) -> None:
    wanted = parameters(model)
    absent = sorted(wanted.keys() - weights.keys())
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise file.error(
            f"does not match mlx-lm's {file.architecture}: it lacks {', '.join(absent[:3])}{more}."
        )
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            raise file.error(
                f"gives {name} the shape {weights[name].shape} where its hyperparameters ask for "
                f"{value.shape}."
            )


def _use_rope_factors(file: GGUFFile, model: Any, config: dict[str, Any]) -> None:
    long_and_short = [name for name in ROPE_FACTORS[1:] if name in file.tensors]
    if long_and_short and file.architecture != "phi3":
        raise file.error(
            f"has the tensor {long_and_short[0]}, which is only known for the architecture phi3."
        )
    if ROPE_FACTORS[0] not in file.tensors:
        return
    if file.architecture != "llama":
        raise file.error(
            f"has the tensor {ROPE_FACTORS[0]}, which is only known for the architecture llama."
        )
    factors = rope_factors(file, ROPE_FACTORS[0], config["head_dim"])
    for layer in model.layers:
        layer.self_attn.rope = FactoredRoPE(config["head_dim"], config["rope_theta"], factors)
