"""The U-Net against a plain re-statement of DRAEM's discriminative network."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from almrr_pipeline.model.frm import FRM

Array = npt.NDArray[np.float64]


def convolve(x: Array, layer: nn.Conv2d) -> Array:
    """3x3 with zero padding: nine shifted products."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    _, rows, columns = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.repeat(bias, rows * columns).reshape(-1, rows, columns)
    for a in range(3):
        for b in range(3):
            out += np.tensordot(
                weight[:, :, a, b], padded[:, a : a + rows, b : b + columns], axes=1
            )
    return out


def normalize(x: Array, layer: nn.BatchNorm2d) -> Array:
    mean, var, weight, bias = (
        t.detach().double().numpy()[:, None, None]
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / np.sqrt(var + layer.eps) * weight + bias


def block(x: Array, layers: nn.Sequential) -> Array:
    """Any number of convolution, batch norm, ReLU."""
    for at in range(0, len(layers), 3):
        x = np.maximum(normalize(convolve(x, layers[at]), layers[at + 1]), 0.0)
    return x


def pool(x: Array) -> Array:
    """Maximum of 2x2; an odd last row or column is dropped."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    out = np.zeros((len(x), rows, columns))
    for i in range(rows):
        for j in range(columns):
            out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
    return out


def upsample(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear with coinciding corners."""
    out = np.zeros((len(x), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = i * (x.shape[1] - 1) / (size[0] - 1), j * (x.shape[2] - 1) / (size[1] - 1)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[1] - 1), min(left + 1, x.shape[2] - 1)
            upper = x[:, top, left] * (1 - (z - left)) + x[:, top, right] * (z - left)
            lower = x[:, bottom, left] * (1 - (z - left)) + x[:, bottom, right] * (z - left)
            out[:, i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def segment(frm: FRM, x: Array, size_of_skip: bool) -> Array:
    """DRAEM's sub-network: encoder blocks b1 to b6, decoder blocks db_b and db1 to db4."""
    b1 = block(x, frm.encoder[0])
    b2 = block(pool(b1), frm.encoder[1])
    b3 = block(pool(b2), frm.encoder[2])
    b4 = block(pool(b3), frm.encoder[3])
    b5 = block(pool(b4), frm.encoder[4])
    x = block(pool(b5), frm.encoder[5])
    for up, down, skip in zip(frm.up, frm.decoder, (b5, b4, b3, b2, b1), strict=True):
        size = skip.shape[1:] if size_of_skip else (2 * x.shape[1], 2 * x.shape[2])
        x = block(np.concatenate([block(upsample(x, size), up), skip]), down)
    return convolve(x, frm.out)


def build(inputs: int = 2, width: int = 2) -> FRM:
    torch.manual_seed(0)
    frm = FRM(inputs, width=width)
    for module in frm.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return frm.eval()


@pytest.mark.parametrize(
    ("grid", "size_of_skip"),
    [((32, 32), False), ((64, 32), False), ((36, 44), True), ((33, 39), True)],
)
def test_equal_to_the_restatement(grid: tuple[int, int], size_of_skip: bool) -> None:
    frm, x = build(), torch.randn(1, 2, *grid)
    expected = segment(frm, x[0].double().numpy(), size_of_skip)
    assert float(np.abs(expected).std()) > 0.01
    np.testing.assert_allclose(frm(x)[0].detach().numpy(), expected, atol=1e-4)


def test_parameters_at_the_papers_widths() -> None:
    with torch.device("meta"):
        frm = FRM(2, width=64)
    assert sum(parameter.numel() for parameter in frm.parameters()) == 28_371_842  # 28.37 M


@pytest.mark.parametrize("prior", [0.02, 0.5])
def test_where_the_features_are_silent_the_map_starts_at_the_prior(prior: float) -> None:
    out = FRM(2, width=2, prior=prior).out
    probabilities = out(torch.zeros(1, 2, 3, 3)).softmax(dim=1)
    torch.testing.assert_close(probabilities[:, 1], torch.full((1, 3, 3), prior))


def test_the_prior_changes_nothing_but_the_last_bias() -> None:
    torch.manual_seed(0)
    papers = FRM(2, width=2).state_dict()
    torch.manual_seed(0)
    own = FRM(2, width=2, prior=0.02).state_dict()
    changed = [name for name, tensor in papers.items() if not torch.equal(tensor, own[name])]
    assert changed == ["out.bias"]


def test_every_parameter_takes_part() -> None:
    frm = build(inputs=6).train()
    frm(torch.randn(2, 6, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in frm.parameters())
    untouched = [name for name, p in frm.named_parameters() if not p.grad.any()]  # type: ignore[union-attr]
    # The bias before a batch norm cancels, up to rounding; everything else has a gradient.
    assert all(name.endswith("bias") for name in untouched)


def test_a_fine_path_gives_half_the_images_size_and_sees_single_pixels() -> None:
    torch.manual_seed(0)
    frm = FRM(2, width=4, fine=3).eval()
    summaries, images = torch.randn(1, 2, 32, 40), torch.rand(1, 3, 128, 160)
    logits = frm(summaries, images)
    assert logits.shape == (1, 2, 64, 80)
    changed = images.clone()
    changed[0, :, 60, 90] = 1 - changed[0, :, 60, 90]
    difference = (frm(summaries, changed) - logits).abs().amax(1)[0] > 0
    rows, columns = difference.nonzero().T
    # The 5x5 stem and three 3x3 convolutions reach four cells around the pixel's own.
    assert rows.numel()
    assert 26 <= int(rows.min()) <= int(rows.max()) <= 34
    assert 41 <= int(columns.min()) <= int(columns.max()) <= 49


def test_a_fine_path_is_trained() -> None:
    torch.manual_seed(0)
    frm = FRM(2, width=4, fine=3)
    frm(torch.randn(2, 2, 32, 32), torch.rand(2, 3, 128, 128)).square().mean().backward()
    assert frm.fine is not None
    for part in (frm.fine, frm.join):
        assert all(parameter.grad is not None for parameter in part.parameters())
    assert bool(frm.fine[0].weight.grad.any())


def test_without_a_fine_path_the_images_do_not_matter() -> None:
    torch.manual_seed(0)
    frm, summaries = FRM(2, width=4).eval(), torch.randn(1, 2, 32, 32)
    assert torch.equal(frm(summaries), frm(summaries, torch.rand(1, 3, 128, 128)))
