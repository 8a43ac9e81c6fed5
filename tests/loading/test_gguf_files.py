"""Which GGUF files a model's name means: parts of one model, folders, files of any name."""

from __future__ import annotations

import json
from pathlib import Path

import gguf_edit
import numpy as np
import pytest
from gguf_edit import I32, U16, Parts, Tensor
from gguf_files import logits, write_small_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turbokv.errors import InputError
from mlx_turbokv.loading import distributed, models
from mlx_turbokv.loading.gguf.reader import open_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_small_gguf(tmp_path_factory.mktemp("whole"))


def split(
    whole: Path, folder: Path, sizes: list[int], stem: str = "small", ending: str = ".gguf"
) -> list[Path]:
    """The file as gguf-split cuts it: parts of so many tensors, all metadata in the first."""
    parts = gguf_edit.read_parts(whole)
    ends = sorted(tensor.offset for tensor in parts.tensors) + [len(parts.data)]
    paths, start = [], 0
    for number, size in enumerate(sizes):
        part = Parts(dict(parts.fields) if number == 0 else {})
        part.fields[b"general.architecture"] = parts.fields[b"general.architecture"]
        part.fields |= {
            b"split.no": (U16, number),
            b"split.count": (U16, len(sizes)),
            b"split.tensors.count": (I32, len(parts.tensors)),
        }
        for tensor in parts.tensors[start : start + size]:
            end = ends[ends.index(tensor.offset) + 1]
            moved = Tensor(tensor.name, tensor.dims, tensor.kind, len(part.data))
            part.tensors.append(moved)
            part.data += parts.data[tensor.offset : end]
        start += size
        name = f"{stem}-{number + 1:05}-of-{len(sizes):05}{ending}"
        paths.append(gguf_edit.write_parts(folder / name, part))
    return paths


def tensors(path: Path) -> dict[str, bytes]:
    return {name: bytes(np.asarray(x.data)) for name, x in open_gguf(path).tensors.items()}


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_cut_has_the_tensors_of_the_whole(whole, tmp_path_factory, data):
    n_tensors = len(tensors(whole))
    cuts = data.draw(st.lists(st.integers(0, n_tensors), max_size=4).map(sorted))
    sizes = list(np.diff([0, *cuts, n_tensors]))
    paths = split(whole, tmp_path_factory.mktemp("parts"), [int(n) for n in sizes])
    given_part = paths[data.draw(st.integers(0, len(paths) - 1))]
    assert tensors(given_part) == tensors(whole)
    assert open_gguf(given_part).paths == paths


def test_a_split_model_computes_what_the_whole_does(whole, tmp_path):
    first, *_ = split(whole, tmp_path, [5, 0, 16], ending=".GGUF")
    loaded = models.load(first)
    want = models.load(whole)
    np.testing.assert_array_equal(logits(loaded.model), logits(want.model))
    assert loaded.name == want.name
    assert models.load_config(first)[0] == models.load_config(whole)[0]


def test_a_missing_part_is_named(whole, tmp_path):
    paths = split(whole, tmp_path, [5, 5, 5, 6])
    paths[2].unlink()
    with pytest.raises(InputError, match="of 4 parts, and small-00003-of-00004.gguf is missing"):
        models.load(paths[0])
    paths[3].unlink()
    with pytest.raises(InputError, match=r"small-00003-of-00004.gguf and 1 more are missing"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "small-00001-of-00003.gguf", "small-1-of-2.gguf"])
def test_a_part_of_another_name_says_how_parts_are_found(whole, tmp_path, name):
    first, _ = split(whole, tmp_path, [10, 11])
    renamed = first.rename(tmp_path / name)
    with pytest.raises(InputError, match=r"names that end in -00001-of-00002.gguf"):
        models.load(renamed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.no", 0, "00002-of-00002.gguf is not part 2 of 2"),
        ("split.count", 3, "00002-of-00002.gguf is not part 2 of 2"),
        ("split.tensors.count", 22, "announces 22 tensors, and its 2 parts have 21"),
    ],
)
def test_parts_that_do_not_belong_together(whole, tmp_path, key, value, message):
    paths = split(whole, tmp_path, [10, 11])
    wrong = paths[0] if key == "split.tensors.count" else paths[1]
    kind = I32 if key == "split.tensors.count" else U16
    gguf_edit.edit(wrong, lambda parts: parts.fields.update({key.encode(): (kind, value)}))
    with pytest.raises(InputError, match=message):
        models.load(paths[0])


def test_a_tensor_in_two_parts(whole, tmp_path):
    paths = split(whole, tmp_path, [10, 11])
    name = gguf_edit.read_parts(paths[0]).tensors[0].name
    gguf_edit.edit(paths[1], lambda parts: setattr(parts.tensors[0], "name", name))
    with pytest.raises(InputError, match=f"has the tensor '{name.decode()}', as another part has"):
        open_gguf(paths[0])


@pytest.mark.parametrize("count", [-1, 100_000])
def test_numbers_of_parts_that_cannot_be(whole, tmp_path, count):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.read_bytes())
    gguf_edit.edit(path, lambda parts: parts.fields.update({b"split.count": (I32, count)}))
    with pytest.raises(InputError, match=f"has {count} as split.count"):
        open_gguf(path)


@pytest.mark.parametrize("name", ["m.GGUF", "m.Gguf", "m", "sha256-0a1b"])
def test_a_file_of_any_name_that_begins_as_gguf(whole, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(whole.read_bytes())
    assert models.load(path).name == "small llama"
    assert models.load_config(path)[1] == "small llama"
    with pytest.raises(InputError, match="cannot be split over several machines"):
        distributed.check_source(str(path))


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes").write_text("GGU")
    with pytest.raises(InputError, match="only files accepted as a model are GGUF files"):
        models.load(tmp_path / "notes")


def test_a_folder_with_one_model(whole, tmp_path):
    (tmp_path / "model.gguf").write_bytes(whole.read_bytes())
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert models.load(tmp_path).name == "small llama"
    (tmp_path / "other.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(InputError, match=r"GGUF files of 2 models \(model.gguf, other.gguf\)"):
        models.load(tmp_path)


def test_a_folder_with_the_parts_of_one_model(whole, tmp_path):
    split(whole, tmp_path, [10, 11])
    assert models.load(tmp_path).name == "small llama"


def test_weights_as_mlx_lm_keeps_them_come_first(whole, tmp_path):
    (tmp_path / "model.gguf").write_bytes(whole.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(tmp_path)
