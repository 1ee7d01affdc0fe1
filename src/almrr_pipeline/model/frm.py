"""The feature refinement module, FRM (stage 4 of the paper): U-Net on summaries of F_hat and F.

Written from the description of DRAEM's discriminative network (Zavrtanik et al., ICCV 2021,
arXiv 2108.07610).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almrr_pipeline.model.kernels.composed import resize_bilinear

_WIDTHS = (1, 2, 4, 8, 8, 8)
"""Channels of the six encoder blocks in multiples of the base width, as DRAEM's."""


class FRM(nn.Module):
    """U-Net of six encoder and five decoder blocks with two output channels: normal and anomalous.

    Args:
        inputs: input channels, 2 in the paper (the channel means of F_hat and F).
        width: base width, 64 in the paper.
        fine: channels of a path from the image, at half its size, to the last layers; 0 for none.
        prior: probability of an anomaly that the last layer's biases start with (RetinaNet, arXiv
            1708.02002, section 4.1); None (the paper): torch's random biases.
    """

    def __init__(
        self, inputs: int, *, width: int, fine: int = 0, prior: float | None = None
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in _WIDTHS]
        self.encoder = nn.ModuleList(
            double_convolution(i, o) for i, o in zip([inputs, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        # From the deepest: the channels are halved where the encoder doubled them.
        outputs = [widths[4], *(widths[k] // 2 for k in (3, 2, 1)), widths[0]]
        self.up = nn.ModuleList(
            convolution(i, o) for i, o in zip([widths[5], *outputs], outputs, strict=False)
        )
        skips = widths[4::-1]
        self.decoder = nn.ModuleList(
            double_convolution(o + s, o) for o, s in zip(outputs, skips, strict=True)
        )
        self.fine: nn.Sequential | None = None
        if fine:
            stem = nn.Conv2d(3, fine, 5, stride=2, padding=2)
            self.fine = nn.Sequential(stem, nn.BatchNorm2d(fine), nn.ReLU())
            self.join = double_convolution(width + fine, width)
        self.out = nn.Conv2d(width, 2, 3, padding=1)
        if prior is not None:
            assert self.out.bias is not None
            with torch.no_grad():
                self.out.bias.copy_(torch.tensor([1.0 - prior, prior]).log())

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        """Summaries (B, inputs, h, w) -> logits (B, 2, h, w).

        With a fine path, which takes the images (B, 3, H, W) as well, (B, 2, H / 2, W / 2).
        """
        skips = []
        for block in self.encoder[:-1]:
            x = block(x)
            skips.append(x)  # (B, width * factor, h / 2^k, w / 2^k)
            x = self.pool(x)
        x = self.encoder[-1](x)  # (B, 8 width, h / 32, w / 32)
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            # To the size of the skip connection: twice the map's, or one more where the pooling
            # dropped an odd last line (DRAEM doubles, which needs multiples of 32).
            x = up(resize_bilinear(x, (skip.shape[-2], skip.shape[-1])))
            x = block(torch.cat([x, skip], dim=1))
        if self.fine is not None:
            assert images is not None
            fine = self.fine(images)  # (B, fine, H / 2, W / 2)
            x = resize_bilinear(x, (fine.shape[-2], fine.shape[-1]))
            x = self.join(torch.cat([x, fine], dim=1))
        return self.out(x)  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    return nn.Sequential(*convolution(inputs, outputs), *convolution(outputs, outputs))
