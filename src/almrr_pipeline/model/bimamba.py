"""The bidirectional Mamba encoder of the MFRM (ALMRR, arXiv 2407.17705): Vision Mamba's block "v2" (arXiv 2401.09417).

                    +- conv, SiLU -> x and dt projections -> scan, gate  (first token to last) -+
    in-projection --+                                                                           +-- mean, out-projection
                    +- conv, SiLU -> x and dt projections -> scan, gate  (last token to first) -+

The branches share the projections in and out and the gate's input; each has its own convolution, projections and state
space. Channels stay innermost from end to end; nothing is transposed or flipped. Initialization follows
state-spaces/mamba (Apache-2.0).
"""

# ruff: noqa: N806 - names are those of the formulas
from __future__ import annotations

import math

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.kernels.scan import causal_conv, selective_scan

_STEPS = (1e-3, 0.1)
_SMALLEST_STEP = 1e-4
_EPSILON = 1e-5


class ScanBranch(nn.Module):
    """One direction: causal convolution, step sizes, B and C that depend on the input, and the gated scan.

    Args:
        settings: widths; d = expand * dim channels, n = `state` states per channel.
        reverse: convolve and scan from the last token to the first.
    """

    def __init__(self, settings: ModelSettings, *, reverse: bool) -> None:
        super().__init__()
        channels, state, conv = settings.expand * settings.dim, settings.state, settings.conv
        dt_rank = math.ceil(settings.dim / 16)  # rank of the projection to step sizes, as Mamba's
        self.reverse = reverse
        self.sizes = (dt_rank, state, state)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(channels, 1))  # (d, n)
        self.D = nn.Parameter(torch.ones(channels))
        self._initialize(conv, dt_rank)

    def forward(self, x: Tensor, z: Tensor, *, backend: str) -> Tensor:
        """Gated output (b, l, d) for x and the gate's input z, both (b, l, d)."""
        u = causal_conv(x, self.conv_weight, self.conv_bias, reverse=self.reverse, backend=backend)
        low_rank, B, C = self.x_proj(u).split(self.sizes, dim=-1)  # (b, l, dt_rank), (b, l, n), (b, l, n)
        return selective_scan(
            u,
            F.linear(low_rank, self.dt_proj.weight),  # the bias is added inside the scan, before the softplus
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            reverse=self.reverse,
            backend=backend,
        )

    def _initialize(self, conv: int, dt_rank: int) -> None:
        """As Mamba: step sizes log-uniform between 0.001 and 0.1, their projection of the scale 1/sqrt(rank)."""
        nn.init.uniform_(self.conv_weight, -(conv**-0.5), conv**-0.5)
        nn.init.uniform_(self.conv_bias, -(conv**-0.5), conv**-0.5)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        low, high = map(math.log, _STEPS)
        with torch.no_grad():
            steps = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(low, high)).clamp(min=_SMALLEST_STEP)
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus


class BidirectionalMamba(nn.Module):
    """The mixer: (b, l, dim) to (b, l, dim), each token seeing all others.

    Args:
        settings: widths.
        scan_backend: see `almrr_pipeline.model.kernels.scan`; may be changed at any time.
    """

    def __init__(self, settings: ModelSettings, *, scan_backend: str = "auto") -> None:
        super().__init__()
        self.scan_backend = scan_backend
        dim, channels = settings.dim, settings.expand * settings.dim
        self.in_proj = nn.Linear(dim, 2 * channels, bias=False)
        self.forward_branch = ScanBranch(settings, reverse=False)
        self.backward_branch = ScanBranch(settings, reverse=True)
        self.out_proj = nn.Linear(channels, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (b, l, d) each
        ahead = self.forward_branch(x, z, backend=self.scan_backend)
        back = self.backward_branch(x, z, backend=self.scan_backend)
        return F.linear(ahead + back, self.out_proj.weight / 2)  # of the mean; halving the weight is the smaller work


class MambaBlock(nn.Module):
    """Pre-norm residual block: tokens + drop_path(mixer(norm(tokens)))."""

    def __init__(
        self, settings: ModelSettings, *, drop_path: float, scan_backend: str = "auto"
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(settings.dim, eps=_EPSILON)
        self.mixer = BidirectionalMamba(settings, scan_backend=scan_backend)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        residual: Tensor = self.drop_path(self.mixer(self.norm(tokens)))
        return tokens + residual


class MambaEncoder(nn.Module):
    """The MFRM's encoder: `depth` residual blocks of bidirectional Mamba, then RMSNorm; (b, l, dim) to (b, l, dim).

    Args:
        settings: widths and depth. The last block is left out for an image with probability
            `drop_path`, which rises linearly from 0 at the first.
        scan_backend: see `almrr_pipeline.model.kernels.scan`.
    """

    def __init__(self, settings: ModelSettings, *, scan_backend: str = "auto") -> None:
        super().__init__()
        rates = torch.linspace(0.0, settings.drop_path, settings.depth).tolist()
        self.blocks = nn.ModuleList(
            MambaBlock(settings, drop_path=rate, scan_backend=scan_backend) for rate in rates
        )
        self.norm = nn.RMSNorm(settings.dim, eps=_EPSILON)
        self._scale_residuals(settings.depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        for block in self.blocks:
            tokens = block(tokens)
        normalized: Tensor = self.norm(tokens)
        return normalized

    def set_scan_backend(self, name: str) -> None:
        """Let every block scan with this backend from now on."""
        for module in self.modules():
            if isinstance(module, BidirectionalMamba):
                module.scan_backend = name

    def _scale_residuals(self, depth: int) -> None:
        """As Mamba and Vim: out-projections over sqrt(depth), so that the sum of the residuals keeps its scale."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, BidirectionalMamba):
                    module.out_proj.weight /= math.sqrt(depth)
