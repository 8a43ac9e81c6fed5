"""What bench_kernels.py compares: groups of variants of one shape, which take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import kernel_variants as variants

from mlx_turbokv.kernels.backend import Backend

PAIRS = ("q8_0/turbo2", "turbo4/turbo3")
LENGTHS = (2048, 8192, 32768, 131072)
MOST_K, MOST_V = ("q8_0", "turbo6", "turbo4", "turbo3"), ("turbo4", "turbo3", "turbo2")
HEADS, HEAD_DIM = (32, 8), 128
SHAPES = (((28, 4), 128), ((40, 10), 128), ((9, 3), 64), ((16, 8), 256), ((16, 2), 256))
CENTRED_TOKENS = 32768
# sequences at once, each with so many tokens
BATCHES, BATCH_TOKENS = ((HEADS, 1), (HEADS, 4), (HEADS, 8), (HEADS, 16), ((40, 8), 8)), 8192
# causal queries at once, as speculative decoding has them
QUERIES, QUERY_TOKENS = (2, 4, 8), 32768
CHUNK_TOKENS = 2048  # a prefill's step
# `rows` joins `lengths`: dequantising first, then MLX's own attention
PREFILL_TOKENS = (8192, 32768)
PARTS = ("lengths", "rows", "pairs", "shapes", "centred", "protected", "prefill", "batches",
         "queries", "pack", "dequantize", "kv_bits")  # fmt: skip


class Group(NamedTuple):
    """What takes turns: variants of one shape by name; ratios are against fp16, if it is there."""

    part: str
    job: str
    heads: tuple[int, int]
    head_dim: int
    tokens: int
    make: dict[str, Callable[[variants.Inputs], variants.Variant]]
    batch: int = 1
    queries: int = 1

    def inputs(self, most_tokens: int | None = None) -> variants.Inputs:
        """Rows of the group's shape."""
        n = min(self.tokens, most_tokens or self.tokens)
        return variants.noise(self.heads, self.head_dim, n, self.batch, self.queries)


def groups(parts, pairs, lengths, backend: Backend) -> Iterator[Group]:
    """What each part compares."""

    def attention(part: str, heads, dim: int, tokens: int, names, batch=1, queries=1) -> Group:
        make = {"fp16": variants.fp16_attention}
        for name in names:
            pair, _, how = name.partition(" ")
            if name.startswith("kv_bits"):
                make[name] = partial(variants.kv_bits_attention, bits=int(name[-1]))
            elif part == "protected":
                # earlier trees, which --against times, have no protected tokens
                from protected_variants import cached_attention

                make[name] = partial(cached_attention, pair, backend=backend, protected=bool(how))
            else:
                make[name] = partial(variants.packed_attention, pair, backend=backend, how=how)
        return Group(part, "decode", heads, dim, tokens, make, batch, queries)

    most = max(lengths)
    if backend.name == "reference":
        parts = set(parts) - {"rows", "dequantize"}
    if "lengths" in parts:
        rows = [f"{pair} rows" for pair in pairs] if "rows" in parts else []
        for n in lengths:
            yield attention("lengths", HEADS, HEAD_DIM, n, [*pairs, *rows])
    if "pairs" in parts:
        names = [f"{k}/{v}" for k in MOST_K for v in MOST_V]
        yield attention("pairs", HEADS, HEAD_DIM, most, names)
    if "shapes" in parts:
        for heads, dim in SHAPES:
            yield attention("shapes", heads, dim, most, pairs)
    if "centred" in parts:
        centred = [f"{pair} centred" for pair in pairs if pair.startswith("turbo")]
        names = [*pairs, *centred]
        yield attention("centred", HEADS, HEAD_DIM, min(CENTRED_TOKENS, most), names)
    protected = [f"{pair} protected" for pair in pairs]
    if "protected" in parts:
        for n in lengths:
            yield attention("protected", HEADS, HEAD_DIM, n, [*pairs, *protected])
    if "prefill" in parts:
        from protected_variants import fp16_prefill, prefill

        for n in PREFILL_TOKENS:
            make = {"fp16": fp16_prefill}
            for pair in pairs:
                for centred in (False, True) if pair.startswith("turbo") else (False,):
                    name = f"{pair} centred" if centred else pair
                    own = partial(prefill, pair, backend=backend, centred=centred)
                    make[name] = partial(own, protected=False)
                    make[f"{name} protected"] = partial(own, protected=True)
            yield Group("prefill", "prefill", HEADS, HEAD_DIM, n, make, queries=CHUNK_TOKENS)
    if "batches" in parts:
        for heads, batch in BATCHES:
            n = min(BATCH_TOKENS, most)
            yield attention("batches", heads, HEAD_DIM, n, pairs, batch=batch)
    if "queries" in parts:
        for queries in QUERIES:
            n = min(QUERY_TOKENS, most)
            yield attention("queries", HEADS, HEAD_DIM, n, pairs, queries=queries)
    if "kv_bits" in parts:
        for n in lengths:
            yield attention("kv_bits", HEADS, HEAD_DIM, n, [*pairs, "kv_bits8", "kv_bits4"])
    if "pack" in parts:
        for tokens, job, packing in (
            (CHUNK_TOKENS, "pack", variants.pack_chunk),
            (1, "append", variants.pack_token),
        ):
            make = {pair: partial(packing, pair, backend=backend) for pair in pairs}
            make = {"fp16": variants.fp16_append, **make}
            yield Group("pack", job, HEADS, HEAD_DIM, tokens, make)
    if "dequantize" in parts:
        make = {pair: partial(variants.dequantized_rows, pair, backend=backend) for pair in pairs}
        n = min(CENTRED_TOKENS, most)
        yield Group("dequantize", "dequantize", HEADS, HEAD_DIM, n, make)
