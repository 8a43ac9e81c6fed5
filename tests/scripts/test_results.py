"""docs/results is what the scripts make of the records, and links in the docs lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import numpy as np
import pytest
import quality_table
import results
from pages import apple, commands, plot, settings, tables
from pages.kernels import text_cells

from mlx_turbokv.evaluate import statistics
from mlx_turbokv.kernels.chips import CHIPS
from mlx_turbokv.policy.settings import PAIRS

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_pages_are_what_the_records_make():
    assert results.differing() == [], "run python scripts/results.py"


def test_a_changed_page_and_one_of_no_record_are_found(tmp_path, monkeypatch):
    made, folder = results.pages(), tmp_path / "docs/results"
    folder.mkdir(parents=True)
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(results, "FOLDER", folder)
    assert results.differing() == []
    (folder / "needle.md").write_text("# Needles\n", encoding="utf-8")
    (folder / "old.md").write_text("", encoding="utf-8")
    (folder / "quality.md").unlink()
    assert results.differing() == ["needle.md", "old.md", "quality.md"]


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_of_docs_is_in_an_index():
    for folder in (ROOT / "docs", ROOT / "docs/results"):
        index = (folder / "README.md").read_text(encoding="utf-8")
        names = {path.name for path in folder.glob("*.md")} - {"README.md"}
        assert {name for name in names if f"({name})" not in index} == set()


def model_record(seed: int) -> dict:
    """A record of scripts/quality_table.py with made-up figures."""
    names = ["f16/f16", "turbo4/turbo3+32,128", "turbo4/turbo3+0,0", "turbo2/turbo2+32,128",
             "turbo2/turbo2+0,0", "la-v7+32,128", "la-v7+0,0", "mlx-kv4:64", "llama-q4_0",
             "benchmarks/policies/bits-3.75.json+32,128"]  # fmt: skip
    rng, rows = np.random.default_rng(seed), []
    asked = [(name, None) for name in names]
    asked += [(names[1], keys) for keys in (tables.BIAS, tables.MEAN, tables.SCALES)]
    asked += [("q8_0/turbo2+32,128", None), ("turbo5/turbo5+32,128", tables.MEAN)]
    for i, (name, keys) in enumerate(asked):
        windows = [rng.gamma(2, 0.02 * (i > 0), 31) for _ in range(4)]
        found = statistics.block_summary(windows)
        protected = name.partition("+")[2]
        rows.append({
            "config": name, "asked_keys": keys, "keys": keys or tables.SCALES,
            "protected": protected if protected not in ("", "0,0") else None,
            "bits": 16.0 if i == 0 else 9.5 - i / 2,
            "bits_32k": 16.0 if i == 0 else 9.0 - i / 2, "kv_bytes_32k": 2**20 * (20 - i),
            "kld": found, "delta_nll": found, "same_top": found,
            "kld_by_window": [float(x.mean()) for x in windows], "ppl": {"ppl": 15.0, "se": 0.5},
        })  # fmt: skip
    return {
        "model": {"dtype": "float32"},
        "calibration": {"windows": 2, "tokens": 512, "windows_asked_for": 6},
        "device": "a GPU", "command": "scripts/quality_table.py --json x",
        "tables": {"2048": {"n_windows": 4, "rows": rows}},
    }  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    found = {name: model_record(i) for i, name in enumerate(tables.MODELS)}
    monkeypatch.setattr(tables, "records", lambda: found)
    return found


def drop(record: dict, what) -> None:
    """Take rows out of a record's table, but the reference's."""
    part = record["tables"]["2048"]
    part["rows"] = [part["rows"][0], *(row for row in part["rows"][1:] if not what(row))]


def test_the_plot_has_every_kind_and_name(made_up, tmp_path):
    plot.draw(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(text.count(f">{kind}<") == 1 for kind in plot.KINDS)
    for name in ("balanced", "turbo2/turbo2", "la-v7", "kv_bits 4", "llama-q4_0"):
        assert text.count(f">{name}<") == len(made_up), name
    assert all(f">{name}<" in text for name in tables.NAMES.values())
    assert "not measured" not in text


def test_a_panel_says_what_was_not_measured(made_up, tmp_path):
    drop(made_up["quality_qwen"], lambda row: plot.kind_of(row) in (plot.PLAIN, plot.LLAMA_CPP))
    plot.draw(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert text.count("not measured:") == 1 and text.count(">llama.cpp's<") == 1
    assert text.count(">unprotected<") == 1 and ">mlx-lm's<" not in text


def test_a_table_says_what_it_lacks_and_has_no_empty_columns(made_up):
    part = made_up["quality_gemma"]["tables"]["2048"]
    assert (
        "pairs with protected tokens (all but turbo4/turbo3, turbo2/turbo2, q8_0/turbo2, "
        "turbo5/turbo5);"
    ) in tables.missing(part, 2048)
    assert "llama.cpp's rotated cache (llama-q5_1)" in tables.missing(part, 2048)
    assert tables.of_length(part).splitlines()[0].count("KLD") == 2
    drop(made_up["quality_gemma"], lambda row: plot.kind_of(row) in (plot.PLAIN, plot.PAPER))
    assert "; pairs without them;" in tables.missing(part, 2048)
    shown = tables.of_length(part)
    assert shown.splitlines()[0].count("KLD") == 1 and "mlx-kv4:64 (no protected tokens)" in shown
    everything = {"rows": [{"config": c, "asked_keys": k} for c, k in quality_table.plan(2048)]}
    assert tables.missing(everything, 2048) == ""


@pytest.mark.parametrize("name", PAIRS)
def test_a_setting_is_the_cheapest_measured_pair_within_its_limit(name):
    """With its interval, on every model, of the pairs with protected tokens measured on all."""
    found = []
    for pair in quality_table.PAIRS:
        config = quality_table.protected(pair, 2048)
        rows = [settings.row_of(record, config) for record in tables.records().values()]
        if all(row and row["kld"]["interval"][1] <= settings.LIMITS[name] for row in rows):
            found.append((max(row["bits_32k"] for row in rows), pair))
    assert len(tables.records()) == 3 and min(found)[1] == "/".join(PAIRS[name])


def test_a_models_table_goes_by_bits_with_protection_beside_none(made_up):
    text = tables.quality()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for name, record in made_up.items():
        at = text.index(f"### {tables.NAMES[name]}, 2,048 tokens")
        names = re.findall(r"^\| ([^ |]+/?[^|]*?) \|", text[at:], re.MULTILINE)
        first = names[1 : names.index("K/V", 1)]
        rows = {row["config"]: row for row in tables.main_rows(record["tables"]["2048"])}
        bare = [x.partition(" (")[0] for x in first if "calibrated" not in x]
        plain = [next(filter(None, map(rows.get, (f"{x}+0,0", x, f"{x}+32,128")))) for x in bare]
        bits = [row["bits_32k"] for row in plain]
        assert bits == sorted(bits, reverse=True) and len(first) == 8
        assert "turbo5/turbo5 (by means alone)" in first
        pair = rows["turbo4/turbo3+32,128"], rows["turbo4/turbo3+0,0"]
        line = next(
            x
            for x in lines
            if x[0] == "| turbo4/turbo3" and f"{pair[0]['kld']['mean']:.5f}" in " ".join(x)
        )
        assert line[4].startswith(f"{pair[1]['kld']['mean']:.5f}")
        assert line[10].startswith(f"{pair[0]['kld']['mean']:.5f}")


def test_the_table_of_settings_has_each_models_kld(made_up):
    lines = settings.settings().splitlines()
    found = next(line for line in lines if "`balanced` (default)" in line)
    for record in made_up.values():
        rows = {row["config"]: row for row in tables.main_rows(record["tables"]["2048"])}
        assert f"| {rows['turbo4/turbo3+32,128']['kld']['mean']:.4f} |" in found


def test_what_stands_between_marks_is_replaced():
    text = "a\n<!-- figures: settings -->\nold\n<!-- end -->\nb\n"
    made = results.inserted(text, {"settings": lambda: "new"})
    assert made == "a\n<!-- figures: settings -->\nnew\n<!-- end -->\nb\n"
    assert results.inserted(made, {"settings": lambda: "new"}) == made
    assert results.inserted(text, {"settings": lambda: ""}) == text


def test_scales_are_compared_window_by_window(made_up):
    part = made_up["quality_qwen"]["tables"]["2048"]
    rows = {(row["config"], row["keys"]): row for row in part["rows"]}
    a, b = (
        np.mean(rows["turbo4/turbo3+32,128", keys]["kld_by_window"])
        for keys in (tables.SCALES, tables.MEAN)
    )
    assert f"| {a / b:.2f} (" in tables.scales(part)
    assert "by the bias" in tables.scales(part)
    assert f"| {a / b:.2f} (" in tables.scales_measured()
    assert tables.scales({"rows": [r for r in part["rows"] if r["keys"] != tables.MEAN]}) is None


def test_a_configuration_is_shown_with_the_best_keys_that_were_measured():
    asked = [None, tables.MEAN, tables.BIAS, None, tables.SCALES]
    rows = [{"config": "turbo3/turbo3+0,0", "asked_keys": keys, "n": i}
            for i, keys in enumerate(asked)]  # fmt: skip
    part = {"rows": [rows[0], *rows[1:]]}
    assert [row["n"] for row in tables.main_rows(part)] == [3]
    assert [row["n"] for row in tables.main_rows({"rows": rows[:3]})] == [2]
    assert tables.mark(rows[2]) == " (by the bias alone)" and tables.mark(None, rows[3]) == ""


def test_a_script_that_is_gone_is_named_with_its_commit():
    shown = commands("scripts/results.py --check", "scripts/old.py --json x", "mlx_turbokv.bench")
    assert shown.splitlines()[1:-1] == [
        "scripts/results.py --check",
        "scripts/old.py --json x  # script: commit e1a90eb",
        "mlx_turbokv.bench",
    ]


@pytest.mark.parametrize(
    ("n_equal", "gap", "cells"),
    [
        (50, None, ["50 of 50", "6e-5", "50", "–"]),
        (48, -0.2071, ["48 of 50", "6e-5", "7", "0.207"]),
    ],
)
def test_texts_with_teacher_forced_codes_and_without(n_equal, gap, cells):
    forced = {"n_tokens": 50, "n_equal": n_equal, "log_probability": 6.2e-5}
    free = {"n_equal": 50 if gap is None else 7, "gap": gap}
    assert text_cells({"forced": forced, "free": free}) == cells


def test_options_in_the_docs_exist():
    found = set()
    for path in DOCS:
        blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", "").splitlines():
            for name, rest in re.findall(r"mlx_turbokv\.(\w+)\)?\"?((?: [^&|;#]+)?)", line):
                command = importlib.import_module(f"mlx_turbokv.cli.{name}").command
                params = command.get_params(click.Context(command))
                known = {option for param in params for option in param.opts}
                used = set(re.findall(r" (--?[a-z][\w-]*)", rest))
                found |= {(path.name, name, option) for option in used - known}
    # serve takes mlx-lm's own flags too
    assert {entry for entry in found if entry[1] != "serve"} == set()


@pytest.mark.parametrize("name", [name for name in CHIPS if name.startswith("Apple")])
@pytest.mark.parametrize("pair", apple.PAIRS)
def test_what_binds_follows_from_the_clock_that_is_needed(name, pair):
    needed, binds, reached, microseconds, times = apple._budget(name, CHIPS[name], pair)
    clock, bandwidth = apple.CLOCKS.get(name), max(CHIPS[name].bandwidths)
    if float(needed) < apple.SLOWEST or (clock and clock > float(needed)):
        assert binds == "bytes" and reached == f"{bandwidth:.0f}"
    elif clock:
        assert binds == "instructions"
        assert float(reached) == pytest.approx(bandwidth * clock / float(needed), rel=0.01)
    else:
        assert binds == "not known" and reached.split(" to ")[-1] == f"{bandwidth:.0f}"
    n_bytes, _ = apple._needs(pair)
    fastest = 8192 * 8 * n_bytes / float(reached.split(" to ")[-1]) / 1e3
    assert float(microseconds.split(" to ")[0]) == pytest.approx(fastest, rel=0.01, abs=0.6)
    most = 512 / n_bytes * float(reached.split(" to ")[-1]) / bandwidth
    assert float(times.split(" to ")[-1]) == pytest.approx(most, abs=0.06)
