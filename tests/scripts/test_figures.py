"""Pages show what the records say; marks are read as they are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import figures  # noqa: E402
import readme_figures  # noqa: E402
from figures.kernels import texts_said  # noqa: E402


@pytest.fixture
def known(monkeypatch):
    """Figures of this test alone."""
    own = {"size": lambda: "12", "both": lambda: {"low": "1", "high": "2"}}
    monkeypatch.setattr(figures, "FIGURES", own)


@pytest.mark.parametrize("path", readme_figures.pages(), ids=lambda path: path.name)
def test_pages_show_the_records(path):
    page = path.read_text(encoding="utf-8")
    assert figures.drawn(page) == page


def test_a_number_within_a_line_and_a_paragraph_of_its_own(known):
    page = "of <!-- begin: size -->9<!-- end --> or <!-- begin: both.high --><!-- end -->.\n"
    assert figures.drawn(page) == (
        "of <!-- begin: size -->12<!-- end --> or <!-- begin: both.high -->2<!-- end -->.\n"
    )
    block = "<!-- begin: size -->\n\nold\n\nlines\n\n<!-- end -->\n"
    assert figures.drawn(block) == "<!-- begin: size -->\n\n12\n\n<!-- end -->\n"
    assert figures.drawn("no marks\n") == "no marks\n"


@pytest.mark.parametrize(
    "page",
    [
        "<!-- begin: size -->12",
        "12<!-- end -->",
        "<!-- begin: size --><!-- begin: size -->12<!-- end --><!-- end -->",
        "<!-- begin: colour -->12<!-- end -->",
        "<!-- begin: both -->12<!-- end -->",
        "<!-- begin: both.middle -->12<!-- end -->",
        "<!-- begin: size.high -->12<!-- end -->",
    ],
)
def test_bad_marks_are_named(page, known):
    with pytest.raises(ValueError, match=r"without its other|no figure"):
        figures.drawn(page)


def text_on_two_back_ends(n_equal: int, gap: float | None, free_gap: float | None) -> dict:
    settled = {"n_tokens": 50, "n_equal": n_equal, "gap": gap, "log_probability": 6.2e-5}
    return {"settled": settled, "free": {"gap": free_gap}}


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (
            [(50, None, None), (50, None, -0.2071), (50, None, 0.1)],
            ["at all 150 steps of 3 greedy texts, log-", "at most 6e-5 nats; where",
             "2 of them part, where two tokens are at most 0.207 nats apart"],
        ),
        (
            [(50, None, None), (48, 3e-4, None)],
            ["at 98 of 100 steps of 2 greedy texts (two tokens are at most 3e-4 nats apart at",
             "none parts"],
        ),
    ],
)  # fmt: skip
def test_texts_are_said_as_settled_and_as_free(texts, parts):
    said = texts_said([text_on_two_back_ends(*text) for text in texts])
    assert all(part in said for part in parts), said
    assert said.endswith(parts[-1])
