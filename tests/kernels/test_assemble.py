"""Kernels are told apart by their text."""

from __future__ import annotations

import re
from pathlib import Path

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


def headers(monkeypatch, text: str, backend: str) -> str:
    """What MLX gets to hash at every launch."""
    found: list[str] = []
    for maker in ("metal_kernel", "cuda_kernel"):
        monkeypatch.setattr(mx.fast, maker, lambda **build: found.append(build["header"]))
    built(text, "s", backend, monkeypatch)
    return found[0]


def test_cuda_reads_the_text_from_a_file(monkeypatch) -> None:
    text = assemble.header_text("pack.metal", "cuda")
    header = headers(monkeypatch, text, "cuda")
    path = Path(re.fullmatch(r'#include "(/[^"]+)"\n', header)[1])
    assert path.read_text() == text
    for damage in ("damaged", text[:-1]):
        path.write_text(damage)
        assert headers(monkeypatch, text, "cuda") == header and path.read_text() == text


def test_each_text_has_a_file_of_its_own(monkeypatch) -> None:
    first, second, again = (headers(monkeypatch, t, "cuda") for t in ("old", "new", "old"))
    assert first == again != second


@pytest.mark.parametrize("folder", ["file/below", 'a"quote'])
def test_cuda_gets_the_text_where_no_file_can_be_included(folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / folder))
    assert headers(monkeypatch, "text", "cuda") == "text"


def test_metal_gets_the_text(monkeypatch) -> None:
    # nobody has tried whether its compiler reads files
    assert headers(monkeypatch, "text", "metal") == "text"
