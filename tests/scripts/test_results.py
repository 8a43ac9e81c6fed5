"""docs/results is what the scripts make of the records, and links in the docs lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest
import results
from pages import apple, commands, plot, read
from pages.kernels import text_cells

from mlx_turbokv.kernels.chips import CHIPS

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_pages_are_what_the_records_make():
    assert results.differing() == [], "run python scripts/results.py"


def test_a_changed_page_and_one_of_no_record_are_found(tmp_path, monkeypatch):
    made = results.pages()
    for name, text in made.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert results.differing() == []
    (tmp_path / "needle.md").write_text("# Needles\n", encoding="utf-8")
    (tmp_path / "old.md").write_text("", encoding="utf-8")
    (tmp_path / "quality.md").unlink()
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


def test_the_plot_has_every_kind_and_name(tmp_path):
    kinds = [plot.kind_of(r["config"]) for r in read("quality")["results"][1:]]
    assert [kinds.count(kind) for kind in plot.KINDS] == [17, 9, 6, 8]
    plot.draw(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(text.count(f">{name}<") == 1 for name in (*plot.NAMED, *plot.KINDS))


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
