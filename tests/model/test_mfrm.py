"""MFRM against its plain re-statement, and its tokens' order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.kernels.composed import composing_pays
from almrr_pipeline.model.mfrm import MFRM, Decoder, to_map, to_tokens

Array = npt.NDArray[np.float64]


SMALL: dict[str, Any] = {
    "channels": 6, "grid": (8, 12), "latent": 5, "dim": 8, "depth": 2, "state": 4, "drop_path": 0.0,
    "decoder": (3, 4),
}  # fmt: skip


def build(**changes: Any) -> MFRM:
    torch.manual_seed(0)
    sizes = SMALL | changes
    channels, grid = sizes.pop("channels"), sizes.pop("grid")
    return MFRM(ModelSettings(**sizes), channels=channels, grid=grid, scan_backend="torch")


NARROW = ModelSettings(dim=3, decoder=(4, 5), latent=6)


def transposed_convolution(
    x: Array, weight: Array, bias: Array, stride: int, padding: int
) -> Array:
    """Each cell adds its value times the kernel to the output; then `padding` is cut off."""
    _, rows, columns = x.shape
    full = np.zeros((weight.shape[1], (rows - 1) * stride + 3, (columns - 1) * stride + 3))
    for i in range(rows):
        for j in range(columns):
            for a in range(3):
                for b in range(3):
                    full[:, i * stride + a, j * stride + b] += weight[:, :, a, b].T @ x[:, i, j]
    cut = full[:, padding : full.shape[1] - padding, padding : full.shape[2] - padding]
    return cut + bias[:, None, None]


def normalize_and_rectify(x: Array) -> Array:
    out = np.zeros_like(x)
    for c in range(len(x)):
        out[c] = (x[c] - x[c].mean()) / math.sqrt(x[c].var() + 1e-5)
    return np.maximum(out, 0.0)


def resize(x: Array, size: tuple[int, int]) -> Array:
    """Bilinear with coinciding corners."""
    _, rows, columns = x.shape
    out = np.zeros((len(x), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = i * (rows - 1) / (size[0] - 1), j * (columns - 1) / (size[1] - 1)
            top, left = min(int(y), rows - 2), min(int(z), columns - 2)
            for di, wy in ((0, 1 - (y - top)), (1, y - top)):
                for dj, wz in ((0, 1 - (z - left)), (1, z - left)):
                    out[:, i, j] += wy * wz * x[:, top + di, left + dj]
    return out


def decode(decoder: Decoder, x: Array) -> Array:
    for stage, stride, padding in (
        (decoder.stage1, 1, 0),
        (decoder.stage2, 1, 0),
        (decoder.stage3, 2, 1),
    ):
        weight, bias = (p.detach().double().numpy() for p in (stage[0].weight, stage[0].bias))
        x = normalize_and_rectify(transposed_convolution(x, weight, bias, stride, padding))
    return np.tanh(resize(x, decoder.size))


def test_decoder_equals_its_restatement_in_loops() -> None:
    torch.manual_seed(0)
    decoder = Decoder(NARROW, size=(16, 20))
    x = torch.randn(2, 3, 4, 5)
    given = decoder(x).detach().numpy()
    for b in range(2):
        np.testing.assert_allclose(given[b], decode(decoder, x[b].double().numpy()), atol=1e-5)


def test_decoder_grows_as_the_authors_does() -> None:
    decoder, x = Decoder(NARROW, size=(64, 64)), torch.randn(1, 3, 16, 16)
    sizes = []
    for stage in (decoder.stage1, decoder.stage2, decoder.stage3):
        x = stage(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(18, 18), (20, 20), (39, 39)]


def test_patch_embedding_equals_its_restatement_in_loops() -> None:
    mfrm, features = build().eval(), torch.randn(1, 6, 8, 12)
    w1, b1 = mfrm.reduce.weight.detach(), mfrm.reduce.bias.detach()
    w2, b2 = mfrm.patch_embedding.weight.detach(), mfrm.patch_embedding.bias.detach()
    given = mfrm.embed(features)[0].detach()
    assert given.shape == (6, 8)
    for i in range(2):
        for j in range(3):
            token = b2.clone()
            for a in range(4):
                for b in range(4):
                    latent = w1[:, :, 0, 0] @ features[0, :, 4 * i + a, 4 * j + b] + b1
                    token += w2[:, :, a, b] @ latent
            torch.testing.assert_close(given[3 * i + j], token, rtol=1e-4, atol=1e-5)


def test_tokens_run_row_by_row_and_come_back_in_place() -> None:
    x = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    tokens = to_tokens(x)
    for b in range(2):
        for i in range(2):
            for j in range(4):
                assert torch.equal(tokens[b, 4 * i + j], x[b, :, i, j])
    assert torch.equal(to_map(tokens, (2, 4)), x)
    assert not torch.equal(
        tokens.reshape(2, 3, 2, 4), x
    )  # the authors' view mixes places with channels


def test_reconstruction_passes_its_parts_in_order() -> None:
    mfrm, features = build().eval(), torch.randn(1, 6, 8, 12)
    tokens = mfrm.encoder(mfrm.embed(features) + mfrm.position)
    grid = np.zeros((8, 2, 3))
    for i in range(2):
        for j in range(3):
            grid[:, i, j] = tokens[0, 3 * i + j].detach().double().numpy()
    latent = decode(mfrm.decoder, grid)
    weight, bias = (
        mfrm.expand.weight.detach().double().numpy(),
        mfrm.expand.bias.detach().double().numpy(),
    )
    expected = np.einsum("ol,lij->oij", weight[:, :, 0, 0], latent) + bias[:, None, None]
    np.testing.assert_allclose(mfrm(features)[0].detach().numpy(), expected, atol=1e-4)


def test_the_position_is_learned_and_one_a_token() -> None:
    mfrm = build()
    assert mfrm.position.shape == (1, 6, 8)
    mfrm(torch.randn(2, 6, 8, 12)).square().mean().backward()
    assert mfrm.position.grad is not None
    assert all(float(token.abs().max()) > 0 for token in mfrm.position.grad[0])


def test_composing_in_training_changes_neither_tokens_nor_gradients() -> None:
    mfrm, features, seen = (
        build(channels=40, latent=32),
        torch.randn(64, 40, 8, 12),
        torch.randn(64, 6, 8),
    )
    outcomes = []
    for training in (False, True):
        mfrm.train(training)
        mfrm.zero_grad()
        tokens = mfrm.embed(features)
        (tokens * seen).sum().backward()
        parameters = (
            mfrm.reduce.weight,
            mfrm.reduce.bias,
            mfrm.patch_embedding.weight,
            mfrm.patch_embedding.bias,
        )
        outcomes.append((tokens.detach(), *(p.grad.clone() for p in parameters)))  # type: ignore[union-attr]
    assert composing_pays(mfrm.reduce, mfrm.patch_embedding, cells=64 * 8 * 12)
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-3, atol=1e-3)


def test_composing_pays_from_a_batch_of_two_at_the_papers_widths() -> None:
    mfrm = build(channels=1792, grid=(64, 64), latent=1024, dim=192, depth=1, decoder=(256, 512))
    convolutions = mfrm.reduce, mfrm.patch_embedding
    pays = [composing_pays(*convolutions, cells=batch * 64 * 64) for batch in (1, 2, 32)]
    assert pays == [False, True, True]


def test_parameters_at_the_papers_widths() -> None:
    mfrm = build(
        channels=1792, grid=(64, 64), latent=1024, dim=192, depth=8, state=16, decoder=(256, 512)
    )
    assert sum(parameter.numel() for parameter in mfrm.parameters()) == 15_466_880  # 15.47 M


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (16, 4)])
def test_any_patch_and_rectangle_keeps_its_shape(patch: int, grid: tuple[int, int]) -> None:
    assert build(patch=patch, grid=grid)(torch.randn(1, 6, *grid)).shape == (1, 6, *grid)
