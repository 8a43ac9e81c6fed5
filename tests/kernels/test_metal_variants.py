"""Type check of the text of every kernel variant of the kernel cases."""

from __future__ import annotations

import kernel_cases
import pytest
from metal_host import Recorder
from metal_host.typecheck import check_launches

from mlx_turbokv.kernels import assemble

pytestmark = pytest.mark.slow

KERNELS = ("pack", "decode_partial", "decode_merge", "dequantize")


def test_every_variant_is_sound_metal(monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(assemble, "factory", recorder.metal_kernel)
    for case in kernel_cases.ALL_CASES:
        kernel_cases.run_case(case, "metal")  # on zeros: only the launches matter here
    for kernel in KERNELS:
        assert any(f"turbokv_{kernel}_" in launch.name for launch in recorder.launches), kernel
    problems = {str(p) for p in check_launches(recorder.launches)}
    assert not problems, "\n".join(sorted(problems)[:40])
