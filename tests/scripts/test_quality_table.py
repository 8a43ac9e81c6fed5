"""The table by several processes: the same record as by one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from characters import loaded
from tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]

import quality_table  # noqa: E402

from mlx_turbokv.cli import perplexity  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.evaluate.configuration import check_name  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402

NAMES = ["f16/f16", "q8_0/turbo2", "la-v7"]
OF_THE_RUN = ("seconds", "windows_kept_from_before")


@pytest.mark.parametrize("shares", [2, 3])
def test_windows_of_several_processes_make_the_record_of_one(shares, tmp_path):
    model, source = loaded(tiny_model("llama", vocab_size=96)), load_text("sample")
    alone = perplexity.measure(
        model, source, NAMES, 64, 5, "reference", str(tmp_path / "alone.json"), None
    )
    path = str(tmp_path / "shared.json")
    ready = perplexity.make_run(model, source, NAMES, 64, 5, "reference")
    for share in range(shares):
        quality_table.measure_share(model, ready, path, share, shares)
    with pytest.raises(InputError, match="processes"):
        quality_table.join(ready, path, shares + 1)
    assert quality_table.join(ready, path, shares) == 5
    joined = perplexity.measure(model, source, NAMES, 64, 5, "reference", path, None)
    assert joined["windows_kept_from_before"] == 5
    for record in (alone, joined):
        for key in OF_THE_RUN:
            del record[key]
    assert json.dumps(joined) == json.dumps(alone)


def test_every_configuration_of_the_table_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(set(quality_table.CONFIGS)) == len(quality_table.CONFIGS)
    for name in quality_table.CONFIGS:
        check_name(name)


@pytest.mark.parametrize("status", [0, 1])
def test_each_process_has_its_share_and_a_copy_of_the_kernels(status, tmp_path, monkeypatch):
    compiled, script = tmp_path / "ptx", tmp_path / "share.py"
    compiled.mkdir()
    (compiled / "kernel").write_text("code")
    script.write_text(
        "import os, pathlib, sys\n"
        "cache = pathlib.Path(os.environ['MLX_PTX_CACHE_DIR'])\n"
        f"out = pathlib.Path({str(tmp_path)!r}, 'out' + sys.argv[-1])\n"
        "out.write_text(f'{sys.argv[1]} {cache} {(cache / \"kernel\").read_text()}')\n"
        f"sys.exit({status} if sys.argv[-1] == '1' else 0)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script), "given"])
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(compiled))
    assert quality_table.run_shares(2) is (status == 0)
    found = [(tmp_path / f"out{i}").read_text().split() for i in range(2)]
    assert [(a, kernel) for a, _, kernel in found] == [("given", "code")] * 2
    assert len({cache for _, cache, _ in found} | {str(compiled)}) == 3
