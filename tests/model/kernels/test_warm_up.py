from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from almrr_pipeline.model.kernels import decoder_tail
from almrr_pipeline.model.kernels.scan import numba_kernels as scan
from almrr_pipeline.model.kernels.warm_up import warm_up

kernels = {
    "scan_forward": scan.scan_forward,
    "scan_backward": scan.scan_backward,
    "conv_forward": scan.conv_forward,
    "conv_backward": scan.conv_backward,
    "measure_channels": decoder_tail.measure_channels,
    "sum_channels": decoder_tail.sum_channels,
}
print(sorted(name for name, kernel in kernels.items() if kernel.signatures))
warm_up()
print(sorted(name for name, kernel in kernels.items() if not kernel.signatures))
"""


def test_warming_up_compiles_every_kernel_that_training_and_predicting_start() -> None:
    """In a process of its own, where no other test has compiled any."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
