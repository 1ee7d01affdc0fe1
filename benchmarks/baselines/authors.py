"""The authors' formulation of ALMRR, written plainly, as a baseline.

What their released code computes, in the order in which it computes it (see docs/method.md):

- every feature map is enlarged to the size of the image, unfused into patches of 4x4 and averaged;
- the backbone keeps its gradient graph, and the two branches are two calls;
- 1x1 convolution, patch embedding, decoder and both summaries one after the other, nothing
composed or fused;
- the Mamba blocks keep their channels outside of the tokens; the backward branch works on a
flipped copy.

Their scan is mamba_ssm's CUDA kernel. Where that is absent, as on every CPU, mamba_ssm offers its
reference: a loop over the tokens that indexes the states (`scan="indexed"`, the default). Any
backend of this package's can stand in its place, which leaves the other differences.

Three faults are not repeated, since they cost no time and would only spoil the comparison of
results: the order of tokens, the colors, and the missing normalization. The weights are those of
an `ALMRR`: both must give the same map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.almrr import ALMRR, TrainingOutput
from almrr_pipeline.model.backbone import Backbone
from almrr_pipeline.model.kernels.scan import selective_scan


class AuthorsALMRR(nn.Module):
    """The authors' order of work on the weights of an `ALMRR` at the paper's widths.

    Args:
        backbone: the frozen network; its gradients are computed in training, for nothing, and
            never used.
        scan: "indexed", mamba_ssm's reference, or a backend of
            `almrr_pipeline.model.kernels.scan`; may be changed at any time.
        settings: widths and depths.
        image_size: rows and columns of the images.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: ModelSettings,
        *,
        image_size: tuple[int, int] = (256, 256),
        scan: str = "indexed",
    ) -> None:
        super().__init__()
        self.model = ALMRR(backbone, settings, image_size=image_size, scan_backend="torch")
        self.scan = scan
        # In a list, as the authors keep it in a global: not among the parameters, yet with
        # gradients.
        self._extractor = [copy.deepcopy(backbone.network).requires_grad_(True)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._extractor[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        """Anomaly maps (B, H, W) of images (B, 3, H, W)."""
        features = self.extract(images)
        return self.segment(self.reconstruct(features), features)[:, 1]

    def training_forward(self, normal: Tensor, augmented: Tensor) -> TrainingOutput:
        """As `ALMRR.training_forward`."""
        features, target = self.extract(augmented), self.extract(normal)
        reconstruction = self.reconstruct(features)
        probabilities = self.segment(reconstruction, features)
        return TrainingOutput(
            target=target, reconstruction=reconstruction, logits=(probabilities + 1e-5).log()
        )

    def extract(self, images: Tensor) -> Tensor:
        """Regional features (B, C, h, w), by way of maps as large as the image."""
        size, features = self.model.image_size, torch.Tensor().to(images)
        for x in self._extractor[0]((images - self.model.backbone.mean) / self.model.backbone.std):
            resized = F.interpolate(
                x, size=size, mode="bilinear", align_corners=True
            )  # (B, C_i, H, W)
            patches = F.unfold(resized, kernel_size=4, stride=4)  # (B, C_i 16, h w)
            pooled = patches.reshape(len(x), x.shape[1], 16, -1).mean(dim=2)  # (B, C_i, h w)
            features = torch.cat([features, pooled], dim=1)
        return features.reshape(len(images), -1, size[0] // 4, size[1] // 4)

    def reconstruct(self, features: Tensor) -> Tensor:
        """MFRM, part by part."""
        mfrm = self.model.mfrm
        x = mfrm.patch_embedding(mfrm.reduce(features))
        tokens = x.flatten(2).transpose(1, 2) + mfrm.position
        for block in mfrm.encoder.blocks:
            tokens = tokens + block.drop_path(self.mix(block.mixer, block.norm(tokens)))
        x = mfrm.encoder.norm(tokens).transpose(1, 2).reshape(len(x), -1, *mfrm.token_grid)
        x = mfrm.decoder.stage3(mfrm.decoder.stage2(mfrm.decoder.stage1(x)))
        x = F.interpolate(x, size=mfrm.decoder.size, mode="bilinear", align_corners=True)
        return mfrm.expand(torch.tanh(x))

    def segment(self, reconstruction: Tensor, features: Tensor) -> Tensor:
        """FRM: probabilities (B, 2, H, W)."""
        joined = torch.cat(
            [reconstruction.mean(dim=1).unsqueeze(1), features.mean(dim=1).unsqueeze(1)], dim=1
        )
        probabilities = torch.softmax(self.model.frm(joined), dim=1)
        return F.interpolate(
            probabilities, size=self.model.image_size, mode="bilinear", align_corners=True
        )

    def mix(self, mixer: nn.Module, tokens: Tensor) -> Tensor:
        """Bidirectional block "v2": the mean of both branches, the second on a flipped copy."""
        xz = mixer.in_proj(tokens).transpose(1, 2)  # (b, 2 d, l)
        forward = self.branch(mixer.forward_branch, xz)
        backward = self.branch(mixer.backward_branch, xz.flip([-1])).flip([-1])
        return mixer.out_proj((forward + backward).transpose(1, 2) / 2)

    def branch(self, branch: nn.Module, xz: Tensor) -> Tensor:
        """One direction: (b, 2 d, l) -> (b, d, l), channels outside."""
        x, z = xz.chunk(2, dim=1)
        weight, length = branch.conv_weight[:, None], xz.shape[-1]
        x = F.conv1d(x, weight, branch.conv_bias, padding=weight.shape[-1] - 1, groups=len(weight))[
            ..., :length
        ]
        x = F.silu(x)
        low_rank, b, c = branch.x_proj(x.transpose(1, 2)).split(branch.sizes, dim=-1)
        delta = F.softplus(branch.dt_proj(low_rank)).transpose(1, 2)  # (b, d, l)
        a = -torch.exp(branch.A_log.float())
        if self.scan == "indexed":
            y = scan_by_index(x, delta, a, b.transpose(1, 2), c.transpose(1, 2), branch.D)
        else:
            by_token = (one.transpose(1, 2) for one in (x, delta))
            y = selective_scan(
                *by_token, a, b, c, branch.D, delta_softplus=False, backend=self.scan
            ).transpose(1, 2)
        return y * F.silu(z)


def scan_by_index(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Selective scan like mamba_ssm's reference: token by token, by indexing.

    u, delta: (b, d, l); a: (d, n); b, c: (b, n, l); d: (d,); the result (b, d, l).
    """
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, a))
    increment = torch.einsum("bdl,bnl,bdl->bdln", delta, b, u)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    for token in range(u.shape[2]):
        state = decay[:, :, token] * state + increment[:, :, token]
        outputs.append(torch.einsum("bdn,bn->bd", state, c[:, :, token]))
    return torch.stack(outputs, dim=2) + u * d[:, None]
