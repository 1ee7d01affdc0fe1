"""The Mamba feature reconstruction module, MFRM (stage 3 of the paper).

Features of an image go in, defects and all; the features of an image without defects come out.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.bimamba import MambaEncoder


class MFRM(nn.Module):
    """1x1 convolution, patch embedding, bidirectional Mamba blocks, decoder, 1x1 convolution.

    Args:
        settings: widths and depths.
        channels: C, channels of the features; 1792 for ResNet-50.
        grid: rows and columns (h, w) of the features; `settings.patch` divides both.
        scan_backend: implementation of the selective scan.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        channels: int,
        grid: tuple[int, int],
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        latent, dim, patch = settings.latent, settings.dim, settings.patch
        self.token_grid = (grid[0] // patch, grid[1] // patch)
        tokens = self.token_grid[0] * self.token_grid[1]
        self.reduce = nn.Conv2d(channels, latent, 1)
        self.patch_embedding = nn.Conv2d(latent, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.encoder = MambaEncoder(settings, scan_backend=scan_backend)
        self.decoder = Decoder(settings, size=grid)
        self.expand = nn.Conv2d(latent, channels, 1)
        # Vim's initialization of the patch embedding (LeCun's, by the fan-in) and of the position.
        nn.init.trunc_normal_(self.patch_embedding.weight, std=(latent * patch * patch) ** -0.5)
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruct: F (B, C, h, w) -> F_hat (B, C, h, w)."""
        tokens = self.embed(features) + self.position  # (B, n, dim), row by row
        tokens = self.encoder(tokens)  # (B, n, dim)
        latent = self.decoder(to_map(tokens, self.token_grid))  # (B, latent, h, w)
        reconstruction: Tensor = self.expand(latent)
        return reconstruction  # (B, C, h, w)

    def embed(self, features: Tensor) -> Tensor:
        """Turn features (B, C, h, w) into tokens (B, n, dim), without the position."""
        if self.training and self.composing_pays(len(features)):
            weight, bias = self.composed_embedding()
            return to_tokens(F.conv2d(features, weight, bias, stride=self.patch_embedding.stride))
        return to_tokens(self.patch_embedding(self.reduce(features)))  # through (B, latent, h, w)

    def composed_embedding(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The 1x1 convolution and the patch embedding as one convolution: nothing nonlinear stands between them.

        Returns:
            weight (dim, C, patch, patch) and bias (dim,), functions of the parameters, through which gradients pass;
            computed in `dtype`, or in the parameters' own.
        """
        assert self.reduce.bias is not None
        assert self.patch_embedding.bias is not None
        inner = self.reduce.weight.flatten(1).to(dtype=dtype)  # (latent, C)
        outer = self.patch_embedding.weight.to(dtype=dtype)  # (dim, latent, patch, patch)
        weight = torch.einsum("dlyx,lc->dcyx", outer, inner)
        bias = outer.sum((2, 3)) @ self.reduce.bias.to(dtype=dtype)
        return weight, bias + self.patch_embedding.bias.to(dtype=dtype)

    def composing_pays(self, batch: int) -> bool:
        """Whether a training step is cheaper with the two convolutions multiplied into one first.

        Counted in multiplications: per image forward and once more for the gradient of the weights; the product of
        the weights once per step forward and twice backward. At the paper's widths it pays from a batch of 2.
        """
        dim, latent, patch, _ = self.patch_embedding.weight.shape
        channels = self.reduce.in_channels
        tokens = self.position.shape[1]
        cells = tokens * patch * patch
        saved = cells * (latent * channels + latent * dim - channels * dim)
        return 2 * batch * saved > 3 * dim * patch * patch * latent * channels


class Decoder(nn.Module):
    """Three transposed convolutions, each with instance norm and ReLU; then bilinear to the features' grid, and tanh.

    At the paper's size 16x16 tokens become 18x18, 20x20, 39x39 and 64x64.
    """

    def __init__(self, settings: ModelSettings, *, size: tuple[int, int]) -> None:
        super().__init__()
        dim, widths, latent = settings.dim, settings.decoder, settings.latent
        self.size = size
        # As the authors': no padding in the first two, so each grows the map by a ring of one cell.
        self.stage1 = nn.Sequential(nn.ConvTranspose2d(dim, widths[0], 3), nn.InstanceNorm2d(widths[0]), nn.ReLU())
        self.stage2 = nn.Sequential(
            nn.ConvTranspose2d(widths[0], widths[1], 3), nn.InstanceNorm2d(widths[1]), nn.ReLU()
        )
        self.stage3 = nn.Sequential(
            nn.ConvTranspose2d(widths[1], latent, 3, stride=2, padding=1), nn.InstanceNorm2d(latent), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Decode (B, dim, rows, columns) of tokens to (B, latent, h, w) in [0, 1)."""
        x = self.stage3(self.stage2(self.stage1(x)))  # (B, latent, 2 rows + 7, 2 columns + 7)
        if x.device.type == "cpu":
            # Instance norm leaves the channels outermost, and a CPU resizes many channels ten times slower like that.
            x = x.contiguous(memory_format=torch.channels_last)
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=True).tanh()


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, dim, rows, columns) as tokens (B, rows * columns, dim), row by row."""
    return rearrange(x, "b d rows columns -> b (rows columns) d")


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, rows * columns, dim) as a map (B, dim, rows, columns): the inverse of `to_tokens`.

    The authors' `view(B, dim, rows, columns)` on tokens mixes places with channels.
    """
    return rearrange(tokens, "b (rows columns) d -> b d rows columns", rows=grid[0])
