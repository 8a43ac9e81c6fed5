"""The report: its page stands alone, its parts are kept, its plots show what the records hold."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from characters import loaded
from click.testing import CliRunner
from command_calls import refused
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model

from mlx_turbokv.cli import report
from mlx_turbokv.errors import InputError

pytest.importorskip("matplotlib")
from mlx_turbokv.evaluate import plots  # noqa: E402
from mlx_turbokv.report import figures, order, page  # noqa: E402
from mlx_turbokv.report.recommendation import recommendation  # noqa: E402

TEXT = " ".join(f"Sentence {i} says that {i} follows {i - 1}." for i in range(1, 120))
LAYERS = 4
SKIP_OTHERS = ("--skip", "perplexity", "--skip", "plan", "--skip", "bench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole report of a tiny model."""
    out = tmp_path_factory.mktemp("report")
    (out / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        result = _run(patch, out)
    assert result.exception is None, result.output
    return out


def _run(patch, out, *more):
    model = tiny_model("llama", num_hidden_layers=LAYERS, head_dim=64)
    config = tiny_config("llama", num_hidden_layers=LAYERS, head_dim=64)
    patch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: loaded(model, config))
    needle = [] if "needle" in more else ["--needle-context", "700", "--depths", "1"]
    ctx = [] if "perplexity" in more else ["-c", "64"]
    bench = [] if "bench" in more else ["-p", "20", "-g", "2", "-n", "1"]
    arguments = ["--out", str(out), "--text", str(out / "text.txt"), "--quick", *ctx, *needle,
                 *bench, "--config", "q8_0/turbo2", "--config", "la-v7", *more]  # fmt: skip
    return CliRunner().invoke(report.command, arguments)


class Reader(HTMLParser):
    """Collects tags, ids and everything that refers to somewhere."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.refers, self.open, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.refers.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_page_needs_no_other_file(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    found = _read(html)
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    # Heatmaps are pictures within the page; everything else refers into it.
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in found.refers)
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(found.ids) == len(set(found.ids))
    assert {r[1:] for r in found.refers if r.startswith("#")} <= set(found.ids)

    # What scrolls sideways can be reached by keyboard.
    boxes = re.findall(r'<div class="(?:scroll|plot)"[^>]*>', html)
    assert len(boxes) > 8 and all('tabindex="0"' in box for box in boxes)


def test_every_part_is_on_the_page_and_in_a_file(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("summary", "quality", "needle", "memory", "speed", "origins"):
        assert f'<section id="{part}">' in html
    assert 'id="sensitivity"' not in html
    record = json.loads((folder / "report.json").read_text())
    for part in ("perplexity", "needle", "plan", "bench"):
        assert json.loads((folder / f"{part}.json").read_text()) == record[part]
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


def test_the_pages_numbers_are_the_records(folder):
    text = " ".join(_read((folder / "report.html").read_text(encoding="utf-8")).text)
    record = json.loads((folder / "report.json").read_text())
    for row in record["perplexity"]["results"][1:]:
        assert f"{row['kld']['mean']:.5f}" in text and f"{row['bits_per_value']:.3f}" in text
    for row in record["bench"]["rows"]:
        assert f"{row['generation_tps']['median']:.1f}" in text


def test_parts_measured_before_are_kept(folder, monkeypatch):
    from mlx_turbokv.evaluate import benchmark, needle, perplexity

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(needle, "ask", refuse)
    monkeypatch.setattr(perplexity, "_measure_window", refuse)
    monkeypatch.setattr(benchmark, "measure_point", refuse)
    before = json.loads((folder / "report.json").read_text())
    result = _run(monkeypatch, folder)
    assert result.exception is None, result.output
    assert json.loads((folder / "report.json").read_text()) == before


def test_other_settings_are_measured_anew(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.html").unlink()
    result = _run(monkeypatch, tmp_path, "-c", "32", "--skip", "needle", "--skip", "bench")
    assert result.exception is None and "other settings (n_ctx)" in result.output
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["perplexity"]["n_ctx"] == 32
    assert record["needle"] is None and 'id="needle"' not in (tmp_path / "report.html").read_text()


def test_a_calibration_adds_its_sensitivities(folder):
    record = json.loads((folder / "report.json").read_text())
    record["calibrate"] = _calibration()
    html = page.build_page(record)
    _read(html)
    assert '<section id="sensitivity">' in html and "turbo5" in html


def _calibration() -> dict:
    formats = ("turbo3", "turbo5")
    layer = {part: {f: {"mean": 1e-3, "se": 1e-5} for f in formats} for part in "kv"}
    text = {"name": "<text>", "sha256": "0"}
    about = {"n_windows": 2, "n_ctx": 64, "base": "f16/f16", "text": text}
    return {
        "what": "calibration",
        "calibration": about,
        "sensitivity": {"layers": [layer] * LAYERS},
    }


def test_names_are_escaped(folder):
    record = json.loads((folder / "report.json").read_text())
    record["model"]["name"] = "<b>&model"
    record["calibrate"] = _calibration()
    html = page.build_page(record)
    _read(html)
    assert "<b>" not in html and "&lt;b&gt;&amp;model" in html and "&lt;text&gt;" in html


def test_without_matplotlib_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused("report", "--out", tmp_path / "new", "--text", "sample")
    assert said.endswith("pip install matplotlib.") and list(tmp_path.iterdir()) == []


def test_a_needle_that_does_not_fit_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The sea was calm that day. " * 400)
    result = _run(monkeypatch, tmp_path, "--needle-context", "40")
    said = str(result.exception)
    assert isinstance(result.exception, InputError) and "A context of 40 tokens" in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    # other contexts meet other sentences, a few tokens longer or shorter
    least = int(re.search(r"takes up to (\d+) tokens", said)[1])
    result = _run(monkeypatch, tmp_path, "--needle-context", str(least + 30), *SKIP_OTHERS)
    assert result.exception is None
    result = _run(monkeypatch, tmp_path, "--needle-context", str(least - 30), *SKIP_OTHERS)
    assert isinstance(result.exception, InputError)


def test_a_part_of_a_calibration_record_is_refused_before_anything_is_measured(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"what": "calibration", "sensitivity": []}')
    arguments = ("--out", tmp_path / "new", "--text", "sample", "--calibrate", file)
    assert "is not a whole record of calibration" in refused("report", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "arguments",
    [["--calibrate", "missing.json"], ["--out", __file__], ["--config", "q7/turbo2"]],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, tmp_path):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "r")]
    assert isinstance(CliRunner().invoke(report.command, arguments).exception, InputError)


@given(st.lists(st.tuples(st.floats(1, 16), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_beats_in_both(points):
    front = figures.pareto_front(points)

    def beaten(i):
        return any(
            (p[0] <= points[i][0] and p[1] < points[i][1])
            or (p[0] < points[i][0] and p[1] <= points[i][1])
            for p in points
        )

    kept = {points[i] for i in range(len(points)) if not beaten(i)}
    assert {points[i] for i in front} == kept
    assert front and list(np.diff([points[i][0] for i in front]) >= 0) == [True] * (len(front) - 1)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_names_in_the_plot_do_not_cover_points(n):
    rng = np.random.default_rng(n)
    rows = [
        {
            "config": f"turbo{i}/turbo{i}", "bits_per_value": float(x),
            "kld": {"mean": float(10 ** -x), "se": None},
        }
        for i, x in enumerate(rng.uniform(2, 9, n))
    ]  # fmt: skip
    colors = dict.fromkeys((row["config"] for row in rows), "#000000")
    drawn = figures.divergence_figure(rows, colors).axes[0]
    assert sorted(t.get_text() for t in drawn.texts) == sorted(r["config"] for r in rows)


def test_parts_with_other_centring_are_measured_anew(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "perplexity.json").read_text())
    record["results"][1]["centred"] = "keys centred by something else"
    (tmp_path / "perplexity.json").write_text(json.dumps(record))
    result = _run(monkeypatch, tmp_path, "--skip", "needle", "--skip", "bench")
    assert result.exception is None, result.output
    again = json.loads((tmp_path / "perplexity.json").read_text())
    assert again["results"][1]["centred"] == "keys not centred"


def _quality_row(name: str, bits: float, kld: float) -> dict:
    return {"config": name, "bits_per_value": bits, "kld": {"mean": kld, "se": kld / 20}}


def _needle_row(name: str, found: int, n: int = 20, beyond: int = 0) -> dict:
    return {"config": name, "reference_found": n, "found_of_reference": found,
            "found_beyond_reference": beyond}  # fmt: skip


def _measured(*needles: dict, plan: dict | None = None) -> dict:
    """A record of f16, pairs from 8.5 to 2.1 bits, and mlx-lm's cache."""
    klds = {"q8_0/q8_0": (8.5, 2e-4), "turbo4/turbo3+32,128": (3.7, 4e-3),
            "turbo3/turbo3+32,128": (3.2, 9e-3), "turbo2/turbo2+32,128": (2.2, 0.07),
            "mlx-kv4:64": (4.5, 1e-3)}  # fmt: skip
    results = [_quality_row("f16/f16", 16.0, 0.0)]
    results += [_quality_row(name, *row) for name, row in klds.items()]
    return {
        "perplexity": {"results": results, "n_windows": 16, "n_ctx": 2048},
        "needle": {"summary": list(needles)} if needles else None,
        "plan": plan,
    }


@pytest.mark.parametrize(
    ("needles", "taken", "says"),
    [
        ([], "turbo3/turbo3+32,128", "needles were not measured"),
        # 5 lost of 20 and none gained: 1 of 32 by chance, 4 lost: 1 of 16
        ([_needle_row("turbo3/turbo3+32,128", 15)], "turbo4/turbo3+32,128", "not measured"),
        ([_needle_row("turbo3/turbo3+32,128", 16)], "turbo3/turbo3+32,128", "16 of the 20"),
        ([_needle_row("turbo3/turbo3+32,128", 15, 20, 3)], "turbo3/turbo3+32,128", "15 of the 20"),
    ],
)
def test_the_smallest_setting_that_loses_nothing_is_recommended(needles, taken, says):
    said = recommendation(_measured(*needles))
    assert said.startswith(f"Take {taken} (-ctk ") and says in said


@pytest.mark.parametrize(
    ("protected", "typed"),
    [("32,64", "--recent 64"), (None, "--sink 0 --recent 0"), ("32,128", "")],
)
def test_what_to_type_has_the_tokens_that_were_protected(protected, typed):
    record = _measured()
    record["perplexity"]["results"][3] |= {"config": "turbo3/turbo3", "protected": protected}
    said = recommendation(record)
    assert said.startswith(f"Take turbo3/turbo3 (-ctk turbo3 -ctv turbo3 {typed}".rstrip() + ")")


def test_bytes_of_the_recommendation_are_the_plans():
    sizes = {"f16/f16": 3200, "turbo3/turbo3+32,128": 700}
    plan = {"f16_bytes": {"10": 320, "100": 3200}, "bytes_left_alone": {"10": 0, "100": 200},
            "rows": [{"name": k, "bits": 3.0, "bytes": {"10": 1, "100": v}}
                     for k, v in sizes.items()]}  # fmt: skip
    record = _measured(plan=plan)
    assert "0.7 KiB of f16's 3.1 KiB at 100 tokens" in recommendation(record)
    assert order.cache_bytes(record)["mlx-kv4:64"] == 200 + 3000 * 4.5 / 16


def test_where_nothing_is_good_enough_the_nearest_is_named():
    record = _measured()
    for row in record["perplexity"]["results"][1:]:
        row["kld"]["mean"] += 0.02
    said = recommendation(record)
    assert said.startswith("None of the settings") and "q8_0/q8_0 comes nearest" in said
    assert recommendation({"perplexity": None}) is None


def test_the_advice_leads_the_page_and_rows_go_by_bits(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.index('class="advice"') < html.index("<table>")
    record = order.ordered(json.loads((folder / "report.json").read_text()))
    for part, rows, key in (("perplexity", "results", "bits_per_value"), ("plan", "rows", "bits")):
        bits = [row[key] for row in record[part][rows]]
        assert bits == sorted(bits, reverse=True) and bits[0] == 16
    assert record["bench"]["configs"][0] == "f16/f16"
    assert "KV bytes" not in html


def test_a_configuration_has_one_colour_in_all_figures(folder):
    record = order.ordered(json.loads((folder / "report.json").read_text()))
    colors = order.colors(record)
    assert len(set(colors.values())) == len(colors)
    drawn = [
        figures.position_figure(record["perplexity"]["results"][1:], colors),
        figures.memory_figure(record["plan"], colors),
        plots.speed_figure(record["bench"], colors),
    ]
    for figure in drawn:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        for handle, label in zip(handles, labels):
            line = handle if hasattr(handle, "get_color") else handle.lines[0]
            assert line.get_color() == colors[label]


def test_minor_ticks_of_a_log_axis_have_the_pages_ink():
    figure, axes = plots.new_figure(4, 3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].plot([1, 2], [1e-3, 2e-2])
    figure.draw_without_rendering()
    ticks = axes[0, 0].yaxis.get_minor_ticks()
    assert ticks and {tick.tick1line.get_color() for tick in ticks} == {plots.INK}
