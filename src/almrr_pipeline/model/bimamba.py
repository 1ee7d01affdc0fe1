"""The bidirectional Mamba encoder of the MFRM: Vision Mamba's block "v2" (arXiv 2401.09417).

                    +- conv, SiLU -> x and dt projections -> scan, gate (first token to last) -+
    in-projection --+                                                                          +--+
                    +- conv, SiLU -> x and dt projections -> scan, gate (last token to first) -+  |
                                                                     out-projection of the mean --+

The branches share the in- and out-projection and the gate's input; each has its own convolution,
projections and state space. Channels stay innermost throughout; nothing is transposed or flipped.
Initialization follows state-spaces/mamba (Apache-2.0).
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
"""Range of the initial step sizes, log-uniform: Mamba's dt_min and dt_max."""
_SMALLEST_STEP = 1e-4
"""Lower limit of an initial step size: Mamba's dt_init_floor."""
_CHANNELS_PER_RANK = 16
"""Token width over the rank of the projection to step sizes: Mamba's dt_rank "auto"."""
_EPSILON = 1e-5
"""Added to the mean square in RMSNorm: Mamba's and Vision Mamba's."""


class ScanBranch(nn.Module):
    """One direction: causal convolution, input-dependent step sizes, B and C, and the gated scan.

    Args:
        settings: widths; d = expand * dim channels, n = `state` states per channel.
        reverse: convolve and scan from the last token to the first.
    """

    def __init__(self, settings: ModelSettings, *, reverse: bool) -> None:
        super().__init__()
        d, n, conv = settings.expand * settings.dim, settings.state, settings.conv
        dt_rank = math.ceil(settings.dim / _CHANNELS_PER_RANK)
        self.reverse = reverse
        self.sizes = (dt_rank, n, n)
        self.conv_weight = nn.Parameter(torch.empty(d, conv))
        self.conv_bias = nn.Parameter(torch.empty(d))
        self.x_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d)
        states = torch.arange(1, n + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(d, 1))  # (d, n)
        self.D = nn.Parameter(torch.ones(d))
        self._initialize(conv, dt_rank)

    def forward(self, x: Tensor, z: Tensor, *, backend: str) -> Tensor:
        """Gated output (b, l, d) for x and the gate's input z, both (b, l, d)."""
        u = causal_conv(x, self.conv_weight, self.conv_bias, reverse=self.reverse, backend=backend)
        low_rank, B, C = self.x_proj(u).split(self.sizes, dim=-1)  # (b, l, dt_rank), 2 (b, l, n)
        delta = F.linear(low_rank, self.dt_proj.weight)  # (b, l, d); the scan adds the bias
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias  # (d, n), (d,)
        return selective_scan(
            u, delta, A, B, C, self.D, z=z, delta_bias=bias, reverse=self.reverse, backend=backend
        )

    def _initialize(self, conv: int, dt_rank: int) -> None:
        """Mamba's: uniform weights by the fan-in, step sizes log-uniform in `_STEPS`."""
        nn.init.uniform_(self.conv_weight, -(conv**-0.5), conv**-0.5)
        nn.init.uniform_(self.conv_bias, -(conv**-0.5), conv**-0.5)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        low, high = map(math.log, _STEPS)
        with torch.no_grad():
            steps = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(low, high))
            steps = steps.clamp(min=_SMALLEST_STEP)
            inverse_softplus = steps + torch.log(-torch.expm1(-steps))
            self.dt_proj.bias.copy_(inverse_softplus)


class BidirectionalMamba(nn.Module):
    """The mixer: (b, l, dim) -> (b, l, dim), each token depending on all others."""

    def __init__(self, settings: ModelSettings, *, scan_backend: str = "auto") -> None:
        super().__init__()
        self.scan_backend = scan_backend
        dim, d = settings.dim, settings.expand * settings.dim
        self.in_proj = nn.Linear(dim, 2 * d, bias=False)
        self.forward_branch = ScanBranch(settings, reverse=False)
        self.backward_branch = ScanBranch(settings, reverse=True)
        self.out_proj = nn.Linear(d, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) -> (b, l, dim)."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (b, l, d) each
        ahead = self.forward_branch(x, z, backend=self.scan_backend)  # (b, l, d)
        back = self.backward_branch(x, z, backend=self.scan_backend)  # (b, l, d)
        # Of the mean of both; halving the weight is less work than halving the sum.
        return F.linear(ahead + back, self.out_proj.weight / 2)


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
        """(b, l, dim) -> (b, l, dim)."""
        return tokens + self.drop_path(self.mixer(self.norm(tokens)))  # type: ignore[no-any-return]


class MambaEncoder(nn.Module):
    """The MFRM's encoder: `depth` bidirectional Mamba blocks, then RMSNorm."""

    def __init__(self, settings: ModelSettings, *, scan_backend: str = "auto") -> None:
        super().__init__()
        # Probabilities that a block is left out for an image in training, rising linearly.
        rates = torch.linspace(0.0, settings.drop_path, settings.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            MambaBlock(settings, drop_path=rate, scan_backend=scan_backend) for rate in rates
        )
        self.norm = nn.RMSNorm(settings.dim, eps=_EPSILON)
        # As Mamba and Vision Mamba: the sum of the residuals keeps its scale at any depth.
        with torch.no_grad():
            for mixer in self._mixers():
                mixer.out_proj.weight /= math.sqrt(settings.depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, dim) -> (b, l, dim)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def set_scan_backend(self, name: str) -> None:
        """Use this backend in every block from now on."""
        for mixer in self._mixers():
            mixer.scan_backend = name

    def _mixers(self) -> list[BidirectionalMamba]:
        return [module for module in self.modules() if isinstance(module, BidirectionalMamba)]
