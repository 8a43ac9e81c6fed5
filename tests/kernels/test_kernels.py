"""The kernels on the CPU: every case against float64, then the edges one by one."""

from __future__ import annotations

import re
from dataclasses import replace

import kernel_cases
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import ALL_CASES, DIMS, FORMATS, Case, all_pairs, run_case
from metal_host.typecheck import check_launches
from tiny_models import tiny_model

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.attention import dispatch
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import (
    assemble,
    backend,
    decode,
    decode_launch,
    dequantize,
    heads,
    pack,
    reference,
    tuning,
)
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout
from mlx_turbokv.quant.tiles import tiles_to_rows

KERNELS = ("pack", "decode_partial", "decode_merge", "dequantize")
# half rows on the way through MLX's attention
THROUGH_ROWS = 3e-3
# logits of a sequence alone and in a batch, float32
BATCH_LOGITS = 1e-4
# what is cut for NVIDIA's GPUs runs here too: tables of four codes, sums of half2, prefetching
NVIDIA_CASES = [
    Case("q8_0", "turbo2", (128, 128)),
    Case("turbo2", "turbo3", (64, 64), tokens=(32, 33), splits=2),
    *kernel_cases.SANITIZE_CASES,
    *kernel_cases.PAIRS[::7],
    *kernel_cases.CENTRED[::4],
    *kernel_cases.NARROW,
    *kernel_cases.LONG[::3],
    *(case for case in kernel_cases.EXTREME if case.edge in ("spiked", "crowd", "quiet_values")),
]


@pytest.fixture
def host(metal_host, monkeypatch):
    """The launchers' Metal kernels run on the CPU."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    return metal_host


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_case_agrees_with_float64(host, case: Case) -> None:
    """And the text of each of its launches is sound Metal."""
    n_before = len(host.launches)
    assert run_case(case, "metal")["failures"] == []
    launches = host.launches[n_before:]
    kernels = {kernel for kernel in KERNELS for x in launches if f"_turbokv_{kernel}_" in x.name}
    assert kernels == (set(KERNELS) if case.splits > 1 else set(KERNELS) - {"decode_merge"})
    assert [str(problem) for problem in check_launches(launches)] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", NVIDIA_CASES, ids=str)
def test_case_agrees_with_float64_as_cut_for_nvidia(host, monkeypatch, case: Case) -> None:
    monkeypatch.setattr(tuning, "built_in", lambda backend: tuning.CUDA)
    assert run_case(case, "metal")["failures"] == []


def test_a_threadgroup_may_have_more_rows_than_simd_groups(host, monkeypatch) -> None:
    """As `doctor --tune` may cut it."""
    cut = replace(tuning.CUDA, simd_groups=4)
    monkeypatch.setattr(tuning, "built_in", lambda backend: cut)
    case = Case("turbo4", "turbo3", (64, 64), heads=(1, 1, 4), n_queries=2, splits=2)
    assert run_case(case, "metal")["failures"] == []


def test_cases_hold_every_pair_of_formats_and_dims() -> None:
    pairs = {(case.k_format, case.v_format) for case in kernel_cases.PAIRS}
    assert pairs == {(k, v) for k in FORMATS for v in FORMATS}
    assert {case.dims for case in kernel_cases.PAIRS} == set(DIMS)


def test_all_pairs_covers_every_pair() -> None:
    values = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2, 3)}
    rows = all_pairs(values)
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        found = {(row[x], row[y]) for row in rows}
        assert found == {(p, q) for p in values[x] for q in values[y]}


def test_rows_of_nothing_but_an_anchor_may_hold_its_rounding_and_no_more() -> None:
    layout = _layout("turbo4", "turbo3", dtype="float32")
    mu = 4 * np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32)
    centre = Centre(mx.array(mu), RopeFrequencies.from_arguments(64, 64, False, 1e4), "test")
    at = {"centre": centre, "first": 0, "left_padding": None}
    keys = centre.rows(0, 40, None)
    values = _rows((1, 2, 40, 64), dtype=mx.float32)
    noise = _rows((1, 2, 40, 64), 6, mx.float32)

    def failures(size: float) -> list[str]:
        found: list[str] = []
        tiles = reference.pack(keys + size * noise, values, layout, **at)
        kernel_cases._check_pack(tiles, keys, values, layout, found, at)
        return found

    assert failures(1e-7) == []
    assert any("units differ" in text or "of nothing" in text for text in failures(1e-3))


def _layout(k: str, v: str, dim: int = 64, dtype: str = "float16") -> KVLayout:
    return KVLayout(KVFormat.parse(k), KVFormat.parse(v), dim, dim, dtype)


def _rows(shape: tuple[int, ...], seed: int = 0, dtype: mx.Dtype = mx.float16) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("pair", [("q8_0", "turbo3"), ("turbo2", "q8_0")])
def test_broken_values_stay_in_their_row(host, pair) -> None:
    layout = _layout(*pair)
    keys, values = np.array(_rows((1, 1, 5, 64))), np.array(_rows((1, 1, 5, 64), 1))
    clean = pack.pack(mx.array(keys), mx.array(values), layout)
    keys[0, 0, 1, 3], values[0, 0, 3, 40] = np.nan, np.inf
    tiles = pack.pack(mx.array(keys), mx.array(values), layout)
    packed = PackedKV(layout, empty_tiles(), 0, tiles, 5)
    k, v = reference.dequantize(packed, mx.float32)
    clean_k, clean_v = reference.dequantize(
        PackedKV(layout, empty_tiles(), 0, clean, 5), mx.float32
    )
    for rows, clean_rows, broken in ((k, clean_k, 1), (v, clean_v, 3)):
        assert not np.isfinite(np.array(rows)[0, 0, broken]).all()
        others = [i for i in range(5) if i != broken]
        np.testing.assert_array_equal(
            np.array(rows)[0, 0, others], np.array(clean_rows)[0, 0, others]
        )
    # in half, where values are cut that are too large
    for rows, broken in zip(dequantize.rotated_rows(packed, mx.float16, 0, 1, "metal"), (1, 3)):
        finite = np.isfinite(np.array(rows)[0, 0]).all(axis=-1)
        assert not finite[broken] and finite.sum() == 4


def test_scales_saturate_and_zeros_stay_zero(host) -> None:
    layout = _layout("q8_0", "turbo2", dtype="float32")
    rows = mx.stack([mx.full((64,), 1e9), mx.zeros((64,))])[None, None]
    got = tiles_to_rows(pack.pack(rows, rows, layout), layout)
    for scales in (got.k_scales, got.v_scales):
        assert (np.array(scales)[0, 0, 0] == 65504).all()
        assert (np.array(scales)[0, 0, 1] == 0).all()


# around the smallest half, half's normal numbers, its largest, and what float32 can square
SIZES = (1e-45, 1e-38, 2.9e-8, 3e-8, 5e-8, 1e-7, 1e-6, 7.57e-6, 1e-5, 1e-3, 7.6e-3, 7.8e-3)
SIZES += (65504.0, 1e5, 9e6, 1e9, 1e20, 1e37, 3e38)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_of_every_size_are_packed_as_the_reference_packs_them(host, dtype: str) -> None:
    layout = _layout("q8_0", "turbo3", dtype=dtype)
    rng = np.random.default_rng(4)
    rows = rng.uniform(-1, 1, (1, 1, 3 * len(SIZES), 64)) * np.repeat(SIZES, 3)[:, None]
    rows[0, 0, ::3, 5] = SIZES
    rows[0, 0, 1] = 0
    rows = mx.array(np.clip(rows, -65504, 65504) if dtype == "float16" else rows, mx.float32)
    rows = rows.astype(getattr(mx, dtype))
    got, expected = (f(rows, rows, layout) for f in (pack.pack, reference.pack))
    n = rows.shape[2]
    got_rows, expected_rows = tiles_to_rows(got, layout), tiles_to_rows(expected, layout)
    for name in ("k", "k_scales"):
        a, b = (np.array(getattr(x, name))[:, :, :n] for x in (got_rows, expected_rows))
        np.testing.assert_array_equal(a, b)
    # sums in another order
    a, b = (np.array(x.v_scales.view(mx.uint16)).astype(int) for x in (got_rows, expected_rows))
    assert np.abs(a - b).max() <= 1 and ((a == 0) == (b == 0)).all()
    k, v = reference.dequantize(PackedKV(layout, empty_tiles(), 0, got, n), getattr(mx, dtype))
    assert mx.isfinite(k).all().item() and (dtype == "float16" or mx.isfinite(v).all().item())


@pytest.mark.parametrize("formats", [("q8_0", "q8_0"), ("turbo4", "turbo3")])
def test_rows_beyond_half_stay_finite_on_their_way_to_many_queries(host, formats) -> None:
    """Rows of a bfloat16 model, which go through half; what is beyond its largest is cut to it."""
    layout = _layout(*formats, dtype="bfloat16")
    keys, values = _rows((1, 1, 40, 64), 0, mx.bfloat16), _rows((1, 1, 40, 64), 1, mx.bfloat16)
    tiles = pack.pack(keys, 1e6 * values, layout)
    packed = PackedKV(layout, empty_tiles(), 0, tiles, 40)
    for rows in dequantize.rotated_rows(packed, mx.float16, 0, 1, "metal"):
        assert mx.isfinite(rows).all().item()
    if formats[1] != "q8_0":
        return  # the inverse rotation of what attention gives is in half as well
    queries = _rows((1, 1, 12, 64), 2, mx.bfloat16)
    got = dispatch.attention(queries, packed, 0.125, backend=backend.select_backend("metal"))
    assert mx.isfinite(got).all().item()


@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive"])
def test_many_queries_go_through_rows(host, mask) -> None:
    layout = _layout("turbo4", "turbo3")
    keys, values = _rows((1, 2, 40, 64)), _rows((1, 2, 40, 64), 1)
    queries = _rows((1, 4, 12, 64), 2)
    packed = PackedKV(layout, empty_tiles(), 0, pack.pack(keys, values, layout), 40)
    if mask == "bool":
        mask = mx.array(np.random.default_rng(3).random((1, 1, 12, 40)) > 0.3)
    elif mask == "additive":
        mask = _rows((1, 4, 12, 40), 4)
    got = dispatch.attention(queries, packed, 0.125, mask, backend=backend.select_backend("metal"))
    expected = reference.attention(queries.astype(mx.float32), packed, 0.125, mask)
    error = mx.linalg.norm(got.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    assert error.item() <= THROUGH_ROWS


def test_sinks_of_another_type_are_cast(host) -> None:
    layout = _layout("q8_0", "turbo2")
    tiles = reference.pack(_rows((1, 2, 20, 64)), _rows((1, 2, 20, 64), 1), layout)
    packed = PackedKV(layout, empty_tiles(), 0, tiles, 20)
    queries, sinks = _rows((1, 4, 1, 64), 2), _rows((4,), 3, mx.float32)
    got = decode.decode(queries, packed, 0.125, sinks=sinks)
    same = decode.decode(queries, packed, 0.125, sinks=sinks.astype(mx.float16))
    np.testing.assert_array_equal(np.array(got), np.array(same))
    without = decode.decode(queries, packed, 0.125)
    assert mx.abs(got - without).max().item() > 0.01


@pytest.mark.parametrize("mask", [None, "causal"])
def test_centred_keys_with_padding_that_is_not_hidden_keep_their_positions(host, mask) -> None:
    layout, padding = _layout("turbo4", "turbo3"), mx.array([0, 45], mx.int32)
    mu = 4 * _rows((1, 64), 7, mx.float32)
    centre = Centre(mu, RopeFrequencies.from_arguments(64, 64, False, 1e4), "test")
    keys = _rows((2, 1, 70, 64)) + centre.rows(0, 70, padding).astype(mx.float16)
    at = {"centre": centre, "first": 0, "left_padding": padding}
    tiles = reference.pack(keys, _rows((2, 1, 70, 64), 1), layout, **at)
    packed = PackedKV(layout, empty_tiles(), 0, tiles, 70, centre, padding)
    queries = _rows((2, 2, 2, 64), 2)
    got = dispatch.attention(queries, packed, 0.125, mask, backend=backend.select_backend("metal"))
    expected = reference.attention(queries.astype(mx.float32), packed, 0.125, mask)
    error = mx.linalg.norm(got.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    assert error.item() <= 3 * THROUGH_ROWS  # scores of up to 30


def test_few_queries_with_a_mask_and_starts(host) -> None:
    layout = _layout("q8_0", "turbo2")
    packed = PackedKV(
        layout,
        empty_tiles(),
        0,
        pack.pack(_rows((2, 1, 20, 64)), _rows((2, 1, 20, 64), 1), layout),
        20,
    )
    queries, starts = _rows((2, 2, 10, 64), 2), mx.array([0, 7], mx.int32)
    got = dispatch.attention(
        queries,
        packed,
        0.125,
        "causal",
        left_padding=starts,
        backend=backend.select_backend("metal"),
    )
    seen = np.arange(20) <= np.arange(10, 20)[:, None]
    seen = seen & (np.arange(20) >= np.array([0, 7])[:, None, None, None])
    expected = reference.attention(queries.astype(mx.float32), packed, 0.125, mx.array(seen))
    assert mx.abs(got.astype(mx.float32) - expected).max().item() <= THROUGH_ROWS


def test_kv_heads_go_in_slices(host, monkeypatch) -> None:
    layout = _layout("turbo4", "q8_0")
    packed = PackedKV(
        layout,
        empty_tiles(),
        0,
        pack.pack(_rows((1, 3, 33, 64)), _rows((1, 3, 33, 64), 1), layout),
        33,
    )
    queries = _rows((1, 6, 9, 64), 2)
    whole = dispatch.attention(
        queries, packed, 0.125, "causal", backend=backend.select_backend("metal")
    )
    host.launches.clear()
    monkeypatch.setattr(heads, "TRANSIENT_BYTES", 33 * 128 * 2)  # one head
    sliced = dispatch.attention(
        queries, packed, 0.125, "causal", backend=backend.select_backend("metal")
    )
    assert len(host.launches) == 3
    assert mx.abs(whole - sliced).max().item() <= THROUGH_ROWS


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("v_format", ["f16", "q8_0"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_to_one_token_is_its_value_rounded_to_nearest(
    host, dtype: str, v_format: str, splits: int
) -> None:
    layout, kind = _layout("q8_0", v_format, dtype=dtype), getattr(mx, dtype)
    rows, values = _rows((1, 2, 1, 64), 3, kind), _rows((1, 2, 1, 64), 4, mx.float32)
    if dtype == "float16" and v_format == "f16":
        values = mx.concatenate([values[..., :32], 6e-8 * values[..., 32:]], -1)  # subnormals
    packed = PackedKV(
        layout, empty_tiles(), 0, reference.pack(rows, values.astype(kind), layout), 1
    )
    got = decode.decode(_rows((1, 4, 1, 64), 5, kind), packed, 0.125, splits=splits)
    (_, expected) = reference.dequantize(packed, mx.float32)
    expected = np.repeat(np.array(expected.astype(kind).astype(mx.float32)), 2, axis=1)
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), expected)


@pytest.mark.parametrize(("splits", "launches"), [(None, 2), (2, 3)])
def test_a_decode_step_is_two_launches_or_three(host, splits: int | None, launches: int) -> None:
    layout = _layout("q8_0", "turbo2")
    host.launches.clear()
    tail = pack.pack(_rows((1, 1, 3, 64)), _rows((1, 1, 3, 64), 1), layout)
    packed = PackedKV(layout, empty_tiles(), 0, tail, 3)
    decode.decode(_rows((1, 4, 1, 64), 2), packed, 0.125, splits=splits)
    # mlx-lm's f16 cache: two slice updates and attention
    assert len(host.launches) == launches


@pytest.mark.parametrize("cut", [tuning.APPLE, tuning.CUDA])
@pytest.mark.parametrize("n_cores", [8, 40, 132])
def test_many_tokens_are_split_and_few_are_not(cut: tuning.Tuning, n_cores: int) -> None:
    assert cut.n_splits(cut.whole_tiles, 8, n_cores) == 1
    wave = n_cores * cut.threadgroups_per_core
    for n_tiles in (cut.whole_tiles + 1, 1000, 4096):
        for n_groups in range(1, 300):
            splits = cut.n_splits(n_tiles, n_groups, n_cores)
            assert 1 <= splits and (splits == 1 or splits * n_groups <= wave)
            assert splits == 1 or n_tiles >= (splits - 1) * cut.min_split_tiles


@pytest.mark.parametrize("cut", [tuning.APPLE, tuning.CUDA])
def test_query_rows_are_cut_evenly(cut: tuning.Tuning) -> None:
    for widest in (64, 128, 192, 256, 512):
        for n_rows in range(1, 130):
            rows = cut.rows_at_once(n_rows, widest)
            passes = -(-n_rows // rows)
            assert 1 <= rows <= cut.most_rows
            assert passes * rows - n_rows < passes  # no pass has two rows to spare


def test_parameters_are_those_of_the_kernels_struct() -> None:
    text = (assemble.metal_folder() / "attention.h").read_text()
    struct = re.search(r"struct DecodeParams \{(.*?)\n\};", text, re.S).group(1)
    fields = re.findall(r"^  (?:int|float) (\w+);", struct, re.M)
    assert tuple(fields) == decode_launch.DecodeParams._fields


def test_an_odd_gpu_has_the_cores_of_a_common_one(monkeypatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M99"})
    tuning.n_cores.cache_clear()
    assert tuning.n_cores("metal") == 10
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1 Max"})
    tuning.n_cores.cache_clear()
    assert tuning.n_cores("metal") == 32
    tuning.n_cores.cache_clear()


@pytest.mark.parametrize(
    ("protected", "kernel"), [((0, 0), "decode_partial"), ((32, 128), "decode_protected")]
)
def test_a_padded_batch_decodes_from_packed_rows(host, protected, kernel) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    prompts, new = ([1, 2, 3, 4, 5], list(range(20))), mx.array([[7, 8], [9, 10]])
    options = dict(zip(("sink", "recent"), protected), backend="metal")
    singles = [make_prompt_cache(model, "q8_0", "turbo3", **options) for _ in prompts]
    for prompt, caches in zip(prompts, singles):
        model(mx.array([prompt]), cache=caches)
    batch = [type(pair[0]).merge(list(pair)) for pair in zip(*singles)]
    host.launches.clear()
    got = model(new, cache=batch)
    mx.eval(got)
    names = [launch.name for launch in host.launches]
    assert sum(kernel in name for name in names) == 2
    # K and V that nobody reads are never launched on a GPU; here every launch runs at once
    lazy = sum("dequantize" in name or "read_segments" in name for name in names)
    assert len(names) - lazy == 2 * 2
    for row, caches in enumerate(singles):
        alone = model(new[row : row + 1], cache=caches)
        assert mx.abs(got[row] - alone[0]).max().item() <= BATCH_LOGITS


def test_dequantize_gives_the_original_basis(host) -> None:
    layout = _layout("turbo6", "turbo5")
    packed = PackedKV(
        layout,
        empty_tiles(),
        0,
        pack.pack(_rows((1, 1, 9, 64)), _rows((1, 1, 9, 64), 1), layout),
        9,
    )
    for got, expected in zip(
        dequantize.dequantize(packed, mx.float32), reference.dequantize(packed, mx.float32)
    ):
        assert mx.abs(got - expected).max().item() <= 1e-5


def test_forced_backend_that_is_missing_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", None)
    missing = next(b for b in ("metal", "cuda") if b not in backend.available_backends())
    with pytest.raises(InputError, match=missing):
        backend.select_backend(missing)
    monkeypatch.setenv(backend.ENVIRONMENT, missing)
    with pytest.raises(InputError, match=missing):
        backend.select_backend()
    with pytest.raises(InputError, match="accepted are auto, metal, cuda, reference"):
        backend.select_backend("opencl")


def test_uncovered_dims_are_an_error_when_forced_and_said_once_otherwise(host, caplog) -> None:
    layout = _layout("f16", "f16", 640)
    rows = _rows((1, 1, 2, 640))
    with pytest.raises(InputError, match="k_head_dim 640"):
        backend.select_backend("metal").pack(rows, rows, layout)
    for _ in range(2):
        tiles = backend.select_backend("auto").pack(rows, rows, layout)
    assert [r.levelname for r in caplog.records if "k_head_dim 640" in r.message] == ["WARNING"]
    np.testing.assert_array_equal(np.array(tiles), np.array(reference.pack(rows, rows, layout)))
