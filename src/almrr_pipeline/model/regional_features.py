"""Regional features (stage 2 of the paper, second half; after DFR, arXiv 2012.07122).

Each feature map is resized bilinearly to the size of the image, mean-pooled over 4x4 pixels with stride 4, and joined
to the others along the channels. Resizing and pooling are both linear and separable, so their composition is
`out = R_rows X R_columns^T` with two small fixed matrices: nothing is ever blown up to the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from almrr_pipeline.model.backbone import STRIDES
from almrr_pipeline.model.resizing import apply_separably, resize_and_pool_matrix

POOL = 4
"""Side and stride of the mean pooling, in pixels: the paper's, and DFR's, regions of 4x4."""


class RegionalFeatures(nn.Module):
    """Bring maps at strides 4, 8 and 16 to one grid of a quarter of the image's size, and join them.

    Args:
        image_size: rows and columns of the image, multiples of 16.

    Attributes:
        grid: rows and columns of the result.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (image_size[0] // POOL, image_size[1] // POOL)
        for stage, stride in enumerate(STRIDES):
            for axis, size in zip(("rows", "columns"), image_size, strict=True):
                matrix = resize_and_pool_matrix(size // stride, size, POOL)
                # Not persistent: they follow from the size, and a weights file should hold weights.
                self.register_buffer(f"{axis}{stage}", matrix, persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Resize, pool and join.

        Args:
            maps: for each stage (B, C_i, H / s_i, W / s_i).

        Returns:
            (B, sum of C_i, H / 4, W / 4), in the memory format of the maps.
        """
        return torch.cat([self.transform(stage, x) for stage, x in enumerate(maps)], dim=1)

    def transform(self, stage: int, x: Tensor) -> Tensor:
        """Resize and pool the map of one stage: (B, C, n, m) -> (B, C, H / 4, W / 4)."""
        rows, columns = self.matrices(stage)
        return apply_separably(x, rows.to(x.dtype), columns.to(x.dtype))

    def matrices(self, stage: int) -> tuple[Tensor, Tensor]:
        """The two matrices of a stage, (H / 4, n) and (W / 4, m)."""
        return self.get_buffer(f"rows{stage}"), self.get_buffer(f"columns{stage}")
