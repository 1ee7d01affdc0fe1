"""Memory of normal features: how far a cell is from all that normal images have shown.

One more input of the FRM, after MemSeg (Yang et al., Engineering Applications of AI 2023, arXiv
2205.00908) and PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265), and evidence beside its answer
(`posterior.weigh_odds`), which no simulated anomaly has shaped. In training the features of a
sample's own image are left out: with them every normal cell would be at distance 0, as none is
when an image is new.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.scan.reference import widen, without_autocast

NOBODY = -1
"""Owner of a feature that is never left out."""
SCALED = 2_000
"""Features drawn, at most, whose distances give the factor."""
PROJECTED = 64
"""Dimensions in which the greedy choice is made; 128 in PatchCore."""


class FeatureMemory(nn.Module):
    """Distance of each cell's features to the nearest remembered ones.

    Args:
        channels: C, of the features.
        size: features that are remembered, M.
        exponent: the power of a distance that is its evidence.

    Attributes:
        core: (M, C), standardized as the features are.
        owner: int64 (M,), which image or specimen each was seen in.
        factor: (), 1 / mean distance on normal images, each one's own features left out; 0 where
            all features are of one specimen, so that no such distance is known.
        neutral: (), the distance that is no evidence; 0 where it is not known.
    """

    core: Tensor
    owner: Tensor
    factor: Tensor
    neutral: Tensor

    def __init__(self, channels: int, size: int, exponent: float = 0.0) -> None:
        super().__init__()
        self.exponent = exponent
        self.register_buffer("core", torch.zeros(size, channels))
        self.register_buffer("owner", torch.full((size,), NOBODY))
        self.register_buffer("factor", torch.zeros(()))
        self.register_buffer("neutral", torch.zeros(()))

    @torch.no_grad()
    def forward(self, features: Tensor, leave_out: Tensor | None = None) -> Tensor:
        """F (B, C, h, w) -> distances, at least float32 (B, 1, h, w); inf where nothing is left.

        Args:
            features: standardized, h and w even.
            leave_out: int64 (B,), the owner of each image, whose features do not count.
        """
        with without_autocast(features):
            nearest = self._nearest(pool_cells(widen(features)), leave_out)
            return F.interpolate(nearest, scale_factor=2.0, mode="nearest")

    def relative(self, distances: Tensor) -> Tensor:
        """Distances as multiples of the mean one, which takes the place of infinite ones."""
        return (distances * self.factor).where(distances.isfinite(), self.factor.sign())

    def evidence(self, distances: Tensor) -> Tensor:
        """Distances as multiples of the neutral one; 1 where it is not known."""
        known = self.neutral > 0
        return torch.where(known, distances / self.neutral.where(known, 1.0), 1.0)

    def _nearest(self, cells: Tensor, leave_out: Tensor | None) -> Tensor:
        """Cells (B, C, n, m) -> distance to the nearest feature, (B, 1, n, m)."""
        core = widen(self.core)
        norms = core.square().sum(dim=1)  # (M,)
        rows = cells.permute(0, 2, 3, 1)  # (B, n, m, C)
        if leave_out is not None:
            own = self.owner == leave_out[:, None]  # (B, M)
            norms = torch.where(own, torch.inf, norms)[:, None, None]  # (B, 1, 1, M)
        if torch.compiler.is_compiling() or rows.device.type != "cpu":
            nearest = torch.amin(norms - 2 * (rows @ core.T), dim=-1)  # (B, n, m)
        else:  # image by image, so that the products stay in the cache
            norms = norms.expand(len(rows), 1, 1, len(core))
            pairs = zip(rows.flatten(1, 2), norms.flatten(1), strict=True)
            parts = [torch.addmm(own, row, core.T, alpha=-2.0).amin(dim=1) for row, own in pairs]
            nearest = torch.stack(parts).view(rows.shape[:3])
        return (nearest + rows.square().sum(dim=-1)).clamp_min(0.0).sqrt()[:, None]

    @torch.no_grad()
    def fill(self, batches: Iterable[tuple[Tensor, ...]], *, per_image: int, seed: int) -> None:
        """Remember features of normal images, in place.

        Args:
            batches: features (b, C, h, w), their images' owners, int64 (b,), and, where not all
                cells count, which do, bool (b, h / 2, w / 2).
            per_image: cells drawn at random of each image, among all of which the M are chosen.
            seed: of both choices.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn, owned = [], []
        for features, owners, *counted in batches:
            cells = draw_cells(pool_cells(widen(features)), per_image, generator, *counted)
            drawn += cells
            owned += [owner.expand(len(each)) for each, owner in zip(cells, owners, strict=True)]
        features, owners = torch.cat(drawn), torch.cat(owned)
        chosen = choose_core(features, len(self.core), generator)
        chosen = chosen[torch.arange(len(self.core)) % len(chosen)]  # repeated if there are fewer
        self.core.copy_(features[chosen.to(features.device)])
        self.owner.copy_(owners[chosen.to(owners.device)])
        some = torch.randperm(len(features), generator=generator)[:SCALED].to(features.device)
        distances = self._nearest(features[some, :, None, None], owners[some])
        known = distances[distances.isfinite()]  # not where one image owns all features
        self.factor.copy_(1 / known.mean().clamp_min(1e-3) if len(known) else torch.zeros(()))
        if self.exponent:
            self._set_neutral([known])

    @torch.no_grad()
    def fit_neutral(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Measure the neutral distance on features (b, C, h, w) of normal images not remembered.

        Next to them, where not all cells count, which do, bool (b, h / 2, w / 2).
        Crops of one image are more alike than new images are. Without batches it stays that of
        `fill`, among the remembered images.
        """
        distances = []
        for features, *counted in batches:
            nearest = self._nearest(pool_cells(widen(features)), None)[:, 0]
            distances.append(nearest[counted[0]] if counted else nearest)
        self._set_neutral(distances)

    def _set_neutral(self, distances: list[Tensor]) -> None:
        """The power mean: with it the mean evidence over these distances is 1."""
        values = torch.cat([torch.empty(0), *(each.flatten().cpu() for each in distances)]).double()
        if len(values):
            largest = values.max().clamp_min(1e-3)  # taken out before the power, which may overflow
            mean = (values / largest).pow(self.exponent).mean()
            self.neutral.copy_(largest * mean.pow(1.0 / self.exponent))


def pool_cells(features: Tensor) -> Tensor:
    """Mean over each cell's neighbors and then over 2x2 cells: (B, C, h, w) -> (B, C, h/2, w/2)."""
    smooth = F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(smooth, 2)


def draw_cells(
    features: Tensor, most: int, generator: torch.Generator, counted: Tensor | None = None
) -> list[Tensor]:
    """Draw cells of each image without replacement.

    Args:
        features: (b, C, n, m).
        most: cells of an image.
        generator: of the draws, on the CPU.
        counted: which cells may be drawn, bool (b, n, m); None for all.

    Returns:
        For each image the features of its cells, (<= most, C).
    """
    every = [*features.flatten(2).mT]  # b times (n m, C)
    if counted is not None:
        every = [cells[own] for cells, own in zip(every, counted.flatten(1), strict=True)]
    drawn = []
    for cells in every:
        chosen = torch.randperm(len(cells), generator=generator)[:most]
        drawn.append(cells[chosen.to(cells.device)])
    return drawn


def choose_core(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-center in a random projection: repeatedly the feature farthest from those chosen.

    Args:
        features: float32 (n, C).
        count: how many to choose.
        generator: of the projection and the first choice, on the CPU.

    Returns:
        The chosen rows, int64 (count,); all n if there are no more.
    """
    if len(features) <= count:
        return torch.arange(len(features))
    projection = torch.randn(features.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    points = features @ projection.to(features.device)
    squares = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full_like(squares, torch.inf)
    while len(chosen) < count:
        last = chosen[-1]
        distance = torch.addmv(squares, points, points[last], alpha=-2.0)  # less a constant
        nearest = torch.minimum(nearest, distance + squares[last])
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
