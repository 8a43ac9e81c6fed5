"""Kernels are told apart by their text."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_turbokv.kernels import assemble


@pytest.fixture
def names(monkeypatch) -> list[str]:
    """Names of the kernels that MLX is asked to build."""
    found: list[str] = []
    for maker in ("metal_kernel", "cuda_kernel"):
        monkeypatch.setattr(mx.fast, maker, lambda **build: found.append(build["name"]))
    assemble._build.cache_clear()
    yield found
    assemble._build.cache_clear()


def built(text: str, source: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "header_text", lambda file, backend: text)
    assemble._build.cache_clear()
    assemble.build("pack", "pack.metal", ("a",), ("b",), source, backend)


def test_cuda_kernels_of_other_text_have_other_names(names, monkeypatch) -> None:
    # MLX finds what it compiled, even in an earlier process, by the kernel's name alone
    for text, source in (("old", "s"), ("new", "s"), ("new", "t"), ("old", "s")):
        built(text, source, "cuda", monkeypatch)
    assert len(set(names)) == 3 and names[0] == names[3]
    assert all(name.startswith("turbokv_pack_") and name.isidentifier() for name in names)


def test_metal_kernels_have_plain_names(names, monkeypatch) -> None:
    built("text", "s", "metal", monkeypatch)
    assert names == ["turbokv_pack"]
