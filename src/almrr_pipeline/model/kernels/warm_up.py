"""Compile the CPU's kernels once, into numba's cache: `python -m almrr_pipeline.model.kernels.warm_up`.

A process that compiles a kernel itself may round its last bit otherwise than one that loads it from the cache. Run once
after installation, this makes the first training equal to all later ones; it costs some twenty seconds.
"""

from __future__ import annotations

import logging

import torch

from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone

logger = logging.getLogger(__name__)

SIDE = 128


def warm_up() -> None:
    """Run one small training step and one fused prediction on random images."""
    backbone = build_backbone("tf_efficientnet_lite0", weights=None)
    model = ALMRR(
        backbone,
        image_size=(SIDE, SIDE),
        latent=16,
        dim=16,
        depth=1,
        decoder=(8, 8),
        refinement_width=4,
        refinement_input="projection",
        refinement_channels=2,
    )
    images = torch.rand(2, 3, SIDE, SIDE)
    output = model.train().training_forward(images, images.flip(0))
    (output.logits.mean() + output.reconstruction.mean()).backward()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        model.eval().fuse()(images)
    logger.info("The CPU's kernels are compiled.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warm_up()
