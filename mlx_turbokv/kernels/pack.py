"""Launches metal/pack.metal."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..quant.layout import TILE, KVLayout
from . import assemble, tables
from .checks import Input, anchor_inputs, check_inputs, check_kept, check_part, tiles_input
from .trust import Kernel, require

SOURCE = f"""
typedef Tensor<KB, KG, KD, KW> K;
typedef Tensor<VB, VG, VD, VW> V;
TKV_SHARED(float, row_buffers, pack_groups(larger(KD, VD)) * larger(KD, VD));
TKV_SHARED(uchar, codes, 32 * larger(KD, VD));
TKV_SHARED(ushort, scales, (pack_scales<K, V>()));
TKV_SHARED(float, levels, 2 * MAX_LEVELS);
pack<T, K, V, CENTRED, ROTATED>(
    keys, values, tail, params, k_constants, v_constants, centre, cos_sin_table, left_padding,
    packed, row_buffers, codes, scales, levels, {assemble.THREAD});
"""
INPUTS = ("keys", "values", "tail", "params", "k_constants", "v_constants")
INPUTS += tables.ANCHOR_INPUTS
WIDE = 256  # wider rows get fewer SIMD groups, as pack_groups in the kernel says


class Launch(NamedTuple):
    """One launch as a call on arrays, and the tables that it is given: the same for all layers."""

    call: Callable
    k_constants: mx.array
    v_constants: mx.array


@lru_cache(maxsize=64)
def _launch(
    factory: Callable | None,
    backend: str,
    layout: KVLayout,
    dtype: mx.Dtype,
    centred: bool,
    rotated: bool,
    has_padding: bool,
    shape: tuple[int, int, int],
    tiles: tuple[int, int],
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        shape: sequences, KV heads, new tokens.
        tiles: of the tail's buffer, before and after.
    """
    k, v = tables.tensor_parameters(layout)
    template = [("T", dtype), *tables.template(layout), ("CENTRED", centred)]
    template += [("ROTATED", rotated)]
    threads = 128 if max(k.dim, v.dim) > WIDE else 256
    require(Kernel("pack", backend, layout, dtype, centred, rotated=rotated))
    kernel = assemble.build("pack", "pack.metal", INPUTS, ("packed",), SOURCE, backend)
    batch, n_heads, _ = shape
    wanted = (
        Input("keys", (*shape, k.dim), dtype),
        Input("values", (*shape, v.dim), dtype),
        tiles_input("tail", layout, (batch, n_heads), tiles[0]),
        *(None, None, None),
        *anchor_inputs(layout, (batch, n_heads), centred, has_padding),
    )

    def launch(*inputs: mx.array) -> mx.array:
        check_inputs("pack", wanted, inputs)
        return kernel(
            inputs=list(inputs),
            template=template,
            grid=(tiles[1] * threads, batch * n_heads, 2),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, n_heads, tiles[1], layout.tile_words)],
            output_dtypes=[mx.uint32],
        )[0]

    call = assemble.replayed(launch, backend)
    return Launch(call, tables.constants(k), tables.constants(v))


def pack(
    keys: mx.array,
    values: mx.array,
    layout: KVLayout,
    tail: mx.array | None = None,
    n_tail: int = 0,
    centre: Centre | None = None,
    first: int = 0,
    left_padding: mx.array | None = None,
    rotated: bool = False,
    part: tuple[int, int] | None = None,
    *,
    backend: str = "metal",
) -> mx.array:
    """Quantise new tokens and append them to the tail, in one launch.

    Args:
        tail: packed rows that the new ones follow; it is not read if ``n_tail`` is 0.
        n_tail: how many rows of the tail are kept.
        centre: what is subtracted from the keys.
        first: the new tokens' first row in the sequence, for ``centre``.
        left_padding: rows before position 0 of each sequence; None where there are none.
        rotated: turbo rows are in the rotated basis already, and centred.
        part: which of the new tokens are packed: the first, and where they end; None: all. Only a
            part from the first new token on goes after a tail, and one that ends before the last
            fills its tile. The kernel reads its rows in place; a slice would be copied first.

    Shapes:
        keys, values: [B, H, L, k_head_dim or v_head_dim].
        tail: [B, H, T, layout.tile_words] uint32; left_padding: [B] int32.
        returns: [B, H, ceil((n_tail + packed) / 32), layout.tile_words] uint32.

    Raises:
        ValueError: a shape, type or count does not fit the others.
    """
    if values.dtype != keys.dtype:
        values = values.astype(keys.dtype)
    batch, n_heads, n_new, _ = keys.shape
    start, stop = part or (0, n_new)
    check_part("pack", (start, stop), n_new, n_tail)
    n_tiles = -(-(n_tail + stop - start) // TILE)
    stride = tail.shape[2] if tail is not None and n_tail else 0
    check_kept("pack", n_tail, stride)
    if tail is None or not n_tail:
        tail = tables.no_tiles()
    has_padding = centre is not None and left_padding is not None
    launch = _launch(
        assemble.factory,
        backend,
        layout,
        keys.dtype,
        centre is not None,
        rotated,
        has_padding,
        (batch, n_heads, n_new),
        (stride, n_tiles),
    )
    anchors = (0, 0, 0, 0, 0)
    if centre is not None:
        anchors = (
            first,
            centre.rope.split_pairs,
            n_heads,
            int(has_padding),
            int(centre.first_key_uncentred),
        )
    return launch.call(
        keys,
        values,
        tail,
        # fewer kept rows than none: so many new ones are left out
        tables.int_array(n_new, n_tail - start, stride, n_tiles, *anchors),
        launch.k_constants,
        launch.v_constants,
        *tables.anchor_inputs(centre, first + n_new, left_padding),
    )
