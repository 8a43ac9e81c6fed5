"""The coverage report: what counts as a line, and what it says of lines that nothing ran."""

from __future__ import annotations

from metal_host.coverage import FileCoverage, ranges, report, statement_lines

TEXT = """\
// x = 1;
constant constexpr int A = 3;
TKV_CONST_FN int twice(int x) {
  return 2 * x;
}
template <int N>
TKV_FN void f(device float* y, uint i) {
  float v;
  constexpr int M = N + 1;
  v = y[i];
  if (N == 3) {
    y[i] = v *
           2.0f;
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  v += 1.0f;
}
"""


def test_statements_are_found_and_constants_are_not() -> None:
    assert statement_lines(TEXT) == [10, 14, 16, 17]


def test_lines_that_no_variant_holds_count_as_missed() -> None:
    c = FileCoverage("metal/x.h", frozenset({1, 2, 3}), frozenset({1, 2}), frozenset({7, 8}))
    assert c.missed == [3, 7, 8]
    assert "2 of    5 lines" in report({"metal/x.h": c})
    assert "not run: 3, 7-8" in report({"metal/x.h": c})


def test_ranges() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
