"""Regional features (stage 2 of the paper, second half; after DFR, arXiv 2012.07122).

Each feature map is resized bilinearly to the size of the picture, mean-pooled over 4x4 pixels with stride 4, and joined
to the others along the channels. Resizing and pooling are both linear and separable, so their composition is
`out = R_rows X R_columns^T` with two small fixed matrices: nothing is ever blown up to the size of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.backbone import STRIDES

POOL = 4
"""Side and stride of the mean pooling, in pixels: the paper's, and DFR's, regions of 4x4."""


class RegionalFeatures(nn.Module):
    """Bring maps at strides 4, 8 and 16 to one grid of a quarter of the picture's size, and join them."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (image_size[0] // POOL, image_size[1] // POOL)
        for stage, stride in enumerate(STRIDES):
            for axis, size in zip(("rows", "columns"), image_size, strict=True):
                matrix = resize_and_pool_matrix(size // stride, size)
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
        rows, columns = self.get_buffer(f"rows{stage}"), self.get_buffer(f"columns{stage}")
        return apply_separably(x, rows.to(x.dtype), columns.to(x.dtype))


def apply_separably(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute rows @ x @ columns^T for every channel, without leaving the memory format of x.

    Args:
        x: (B, C, n, m).
        rows: (h, n).
        columns: (w, m).

    Returns:
        (B, C, h, w).
    """
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return rows @ (x @ columns.T)  # (B, C, n, w), then (B, C, h, w)
    batch, channels, n, m = x.shape
    x = x.permute(0, 2, 3, 1)  # (B, n, m, C): channels innermost, so that both products are of long rows
    x = rows @ x.reshape(batch, n, m * channels)  # (B, h, m C)
    x = columns @ x.view(batch, len(rows), m, channels)  # (B, h, w, C)
    return x.permute(0, 3, 1, 2)


def resize_and_pool_matrix(source: int, size: int) -> Tensor:
    """The matrix of a bilinear resize (align_corners=True) followed by a mean over every 4 positions.

    Args:
        source: length of the input.
        size: length after resizing; a multiple of 4.

    Returns:
        float32, shape (size / 4, source); each row sums to 1.
    """
    # Resizing the identity's rows gives the bilinear weights; in float64, so that the result is exact to float32.
    unit = torch.eye(source, dtype=torch.float64)[None]  # (1, source as channels, source)
    resized = F.interpolate(unit, size=size, mode="linear", align_corners=True)  # (1, source, size)
    return F.avg_pool1d(resized, POOL)[0].T.float().contiguous()
