"""Compile the CPU kernels into numba's cache: `python -m almrr_pipeline.model.kernels.warm_up`.

A process that compiles a kernel may round the last bit differently from one that loads it from the
cache. Run once after installation, this makes the first training equal to all later ones; it takes
some forty seconds.
"""

from __future__ import annotations

import logging

import torch

from almrr_pipeline.model.kernels.decoder_tail import summarize_phases
from almrr_pipeline.model.kernels.pointwise import mix_residuals
from almrr_pipeline.model.kernels.scan import causal_conv, selective_scan

logger = logging.getLogger(__name__)


def warm_up() -> None:
    """Run every kernel once, forward and backward, on inputs as small and typed as a model's."""
    for dtype in (torch.float32, torch.bfloat16):
        _train(dtype)
    phases = [[torch.rand(1, 2, 2 - i, 2 - j) for j in (0, 1)] for i in (0, 1)]
    summarize_phases(phases, torch.rand(1, 2), torch.rand(1), size=(3, 3), epsilon=1e-5)
    logger.info("The CPU kernels are compiled.")


def _train(dtype: torch.dtype) -> None:
    """Run the kernels of a training, whose parameters are float32."""
    b, l, d, n = 1, 2, 2, 1  # noqa: E741 - images, tokens, channels, states
    rows, vector = torch.rand(b, l, d, dtype=dtype, requires_grad=True), torch.rand(d)
    u = causal_conv(rows, torch.rand(d, 2), vector, backend="numba")
    states = torch.rand(b, l, n)
    scanned = selective_scan(
        u, u, -torch.rand(d, n), states, states, vector, z=u, delta_bias=vector, backend="numba"
    )
    maps = torch.rand(2, 1, 1, 1, dtype=dtype, requires_grad=True)
    mixed = mix_residuals(maps.detach(), maps, torch.rand(1, 1, 1, 1), torch.rand(1))
    (scanned.sum() + mixed.sum()).backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warm_up()
