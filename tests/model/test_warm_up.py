from __future__ import annotations

from almrr_pipeline.model.scan import numba_kernels
from almrr_pipeline.model.warm_up import warm_up


def test_warming_up_compiles_the_scan_both_ways() -> None:
    warm_up()
    kernels = [kernel for kernel in vars(numba_kernels).values() if hasattr(kernel, "signatures")]
    assert kernels
    assert any(kernel.signatures for kernel in kernels)
