"""The Mamba feature reconstruction module, MFRM (stage 3 of the paper).

It reconstructs the features of an image as they would be without anomalies.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.bimamba import MambaEncoder
from almrr_pipeline.model.kernels.composed import (
    compose_convolutions,
    composing_pays,
    resize_bilinear,
)
from almrr_pipeline.model.kernels.pointwise import convolve_pointwise

POSITION_STD = 0.02
"""Initial std of the position embedding, Vision Mamba's."""


class MFRM(nn.Module):
    """1x1 convolution, patch embedding, bidirectional Mamba blocks, decoder, 1x1 convolution.

    Args:
        settings: widths and depths.
        channels: C, channels of the features; 1792 for ResNet-50.
        grid: rows and columns (h, w) of the features; `settings.patch` divides both.
        scan_backend: implementation of the selective scan.
    """

    def __init__(
        self, settings: ModelSettings, *, channels: int, grid: tuple[int, int], scan_backend: str
    ) -> None:
        super().__init__()
        latent, dim, patch = settings.latent, settings.dim, settings.patch
        self.token_grid = (grid[0] // patch, grid[1] // patch)
        tokens = self.token_grid[0] * self.token_grid[1]  # n: 256 in the paper
        self.reduce = nn.Conv2d(channels, latent, 1)
        self.patch_embedding = nn.Conv2d(latent, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.encoder = MambaEncoder(settings, scan_backend=scan_backend)
        self.decoder = Decoder(settings, size=grid)
        self.expand = nn.Conv2d(latent, channels, 1)
        # Vision Mamba's initialization: LeCun's by the fan-in, and small positions.
        nn.init.trunc_normal_(self.patch_embedding.weight, std=(latent * patch * patch) ** -0.5)
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.position, std=POSITION_STD)

    def forward(self, features: Tensor) -> Tensor:
        """F (B, C, h, w) -> F_hat (B, C, h, w)."""
        tokens = self.embed(features) + self.position  # (B, n, dim), row by row
        tokens = self.encoder(tokens)  # (B, n, dim)
        latent = self.decoder(to_map(tokens, self.token_grid))  # (B, latent, h, w)
        # (B, C, h, w)
        return convolve_pointwise(latent, self.expand.weight, self.expand.bias)

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) -> tokens (B, n, dim), without the position."""
        cells = features.shape[0] * features.shape[2] * features.shape[3]
        if self.training and composing_pays(self.reduce, self.patch_embedding, cells=cells):
            weight, bias = compose_convolutions(self.reduce, self.patch_embedding)
            return to_tokens(F.conv2d(features, weight, bias, stride=self.patch_embedding.stride))
        latent = self.reduce(features)  # (B, latent, h, w)
        return to_tokens(self.patch_embedding(latent))  # (B, dim, h / patch, w / patch) -> tokens


class Decoder(nn.Module):
    """Three transposed convolutions with instance norm and ReLU, bilinear resize to (h, w), tanh.

    As the authors': the first two have no padding, so that each adds a ring of one cell, and the
    third has stride 2. In the paper 16x16 tokens become 18x18, 20x20, 39x39 and, resized, 64x64.
    """

    def __init__(self, settings: ModelSettings, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        dim, (first, second), latent = settings.dim, settings.decoder, settings.latent
        self.stage1 = _decoder_stage(nn.ConvTranspose2d(dim, first, 3))
        self.stage2 = _decoder_stage(nn.ConvTranspose2d(first, second, 3))
        self.stage3 = _decoder_stage(nn.ConvTranspose2d(second, latent, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens as a map (B, dim, rows, columns) -> (B, latent, h, w) in [0, 1)."""
        x = self.stage1(x)  # (B, decoder[0], rows + 2, columns + 2)
        x = self.stage2(x)  # (B, decoder[1], rows + 4, columns + 4)
        x = self.stage3(x)  # (B, latent, 2 rows + 7, 2 columns + 7)
        # Instance norm leaves channels outermost. A CPU resizes them ten times slower there; a GPU
        # would mix formats where the weights have channels innermost.
        innermost, weight = torch.channels_last, next(self.stage3.parameters())
        if x.device.type == "cpu" or weight.is_contiguous(memory_format=innermost):
            x = x.contiguous(memory_format=innermost)
        return resize_bilinear(x, self.size).tanh()


def _decoder_stage(convolution: nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm2d(convolution.out_channels), nn.ReLU())


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, dim, rows, columns) as tokens (B, rows * columns, dim), row by row."""
    return rearrange(x, "b d rows columns -> b (rows columns) d")


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, rows * columns, dim) as a map (B, dim, rows, columns): inverse of `to_tokens`.

    The authors' `view(B, dim, rows, columns)` on tokens mixes positions with channels.
    """
    return rearrange(tokens, "b (rows columns) d -> b d rows columns", rows=grid[0])
