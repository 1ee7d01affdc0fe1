"""Regional features (stage 2 of the paper, second half; after DFR, arXiv 2012.07122).

Each feature map is resized bilinearly to the size of the image, averaged over 4x4 pixels with
stride 4, and concatenated with the others along the channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.backbone import STRIDES
from almrr_pipeline.model.kernels.composed import apply_separably, resize_and_pool_matrix

POOL = 4
"""Side and stride of the average pooling, in pixels: regions of 4x4 as in the paper and in DFR."""


def regional_features(maps: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
    """The paper's formulation, which `RegionalFeatures` computes faster.

    Args:
        maps: for each stage (B, C_i, H / s_i, W / s_i).
        image_size: (H, W).

    Returns:
        (B, sum of C_i, H / 4, W / 4).
    """
    features = []
    for x in maps:
        x = F.interpolate(x, size=image_size, mode="bilinear", align_corners=True)  # (B, C_i, H, W)
        features.append(F.avg_pool2d(x, POOL, stride=POOL))  # (B, C_i, H / 4, W / 4)
    return torch.cat(features, dim=1)


class RegionalFeatures(nn.Module):
    """Regional features without maps of the image's size, equal to `regional_features` to 2e-6.

    Resizing and pooling are linear and separable, so that both together are R_rows X R_columns^T
    with two small constant matrices per stage.

    Args:
        image_size: rows and columns (H, W) of the image, multiples of 16.

    Attributes:
        grid: rows and columns (H / 4, W / 4) of the result.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (image_size[0] // POOL, image_size[1] // POOL)
        for stage, stride in enumerate(STRIDES):
            for axis, size in zip(("rows", "columns"), image_size, strict=True):
                matrix = resize_and_pool_matrix(size // stride, size, POOL)
                # Not persistent: they follow from the size, and a weights file holds weights.
                self.register_buffer(f"{axis}{stage}", matrix, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """As `regional_features`, in the memory format of the maps."""
        return torch.cat([self.transform(stage, x) for stage, x in enumerate(maps)], dim=1)

    def transform(self, stage: int, x: Tensor) -> Tensor:
        """Resize and pool the map of one stage: (B, C, n, m) -> (B, C, H / 4, W / 4)."""
        rows, columns = self.matrices(stage)
        return apply_separably(x, rows.to(x.dtype), columns.to(x.dtype))

    def matrices(self, stage: int) -> tuple[Tensor, Tensor]:
        """R_rows (H / 4, n) and R_columns (W / 4, m) of a stage."""
        return self.get_buffer(f"rows{stage}"), self.get_buffer(f"columns{stage}")
