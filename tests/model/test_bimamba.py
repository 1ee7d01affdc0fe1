"""The bidirectional block against a plain re-statement with flips, loops and torch's own layers."""

# ruff: noqa: N806 - names are those of the formulas
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.bimamba import BidirectionalMamba, MambaBlock, MambaEncoder, ScanBranch


def seeded_encoder(scan_backend: str = "auto", **changes: Any) -> MambaEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = ModelSettings(**{"dim": 12, "depth": 2, "state": 3, **changes})
        return MambaEncoder(settings, scan_backend=scan_backend)


def draw_tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def restate_branch(branch: ScanBranch, x: Tensor) -> Tensor:
    """Vim's one direction, ungated, written with conv1d and a loop over tokens."""
    channels, taps = branch.conv_weight.shape
    weight, bias = branch.conv_weight.unsqueeze(1), branch.conv_bias
    padded = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
    u = F.silu(padded[..., : x.shape[1]]).transpose(1, 2)
    rank, state = branch.dt_proj.in_features, branch.A_log.shape[1]
    mixed = u @ branch.x_proj.weight.T
    delta = F.softplus(mixed[..., :rank] @ branch.dt_proj.weight.T + branch.dt_proj.bias)
    B, C = mixed[..., rank : rank + state], mixed[..., rank + state :]
    h, outputs = torch.zeros(x.shape[0], channels, state, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * -branch.A_log.exp())
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]) + branch.D * u[:, t])
    return torch.stack(outputs, 1)


def restate_mixer(mixer: BidirectionalMamba, tokens: Tensor) -> Tensor:
    """Vim's v2: the backward branch sees the flipped sequence, and its result is flipped back."""
    x, z = (tokens @ mixer.in_proj.weight.T).chunk(2, -1)
    ahead = restate_branch(mixer.forward_branch, x) * F.silu(z)
    back = (restate_branch(mixer.backward_branch, x.flip(1)) * F.silu(z.flip(1))).flip(1)
    return ((ahead + back) / 2) @ mixer.out_proj.weight.T


def restate_encoder(encoder: MambaEncoder, tokens: Tensor) -> Tensor:
    """Pre-norm residual blocks, and a last norm; RMSNorm by its definition."""

    def normalize(norm: nn.RMSNorm, value: Tensor) -> Tensor:
        return value / torch.sqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight

    for block in encoder.blocks:
        tokens = tokens + restate_mixer(block.mixer, normalize(block.norm, tokens))
    return normalize(encoder.norm, tokens)


@pytest.mark.parametrize("backend", ["auto", "torch", "parallel"])
def test_encoder_and_its_gradients_equal_the_restatement(backend: str) -> None:
    encoder, tokens = seeded_encoder(drop_path=0.0, scan_backend=backend), draw_tokens(2, 17, 12)
    plain = seeded_encoder(drop_path=0.0).double()
    got, expected = encoder(tokens), restate_encoder(plain, tokens.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    weight = draw_tokens(2, 17, 12)
    got.backward(weight)
    expected.backward(weight.double())
    for (name, ours), theirs in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        largest = theirs.grad.abs().max()
        assert (ours.grad.double() - theirs.grad).abs().max() <= 2e-5 * largest, name


def test_every_token_sees_every_other() -> None:
    mixer, tokens = seeded_encoder().blocks[0].mixer, draw_tokens(1, 9, 12).requires_grad_()
    for t in (0, 4, 8):
        (gradient,) = torch.autograd.grad(mixer(tokens)[0, t].sum(), tokens)
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_branches_look_one_way() -> None:
    mixer, x, z = (
        seeded_encoder().blocks[0].mixer,
        draw_tokens(1, 9, 24).requires_grad_(),
        draw_tokens(1, 9, 24),
    )
    for branch, unseen in (
        (mixer.forward_branch, slice(5, None)),
        (mixer.backward_branch, slice(None, 4)),
    ):
        (gradient,) = torch.autograd.grad(branch(x, z, backend="auto")[0, 4].sum(), x)
        assert not gradient[0, unseen].any()
        assert gradient[0, 4].any()


def test_paper_widths_have_the_papers_parameters() -> None:
    """Vim's v2 counted by hand at dim 192, d 384, n 16, rank 12."""
    branch = 384 * 4 + 384 + 384 * 44 + 12 * 384 + 384 + 384 * 16 + 384
    block = 192 * 768 + 2 * branch + 384 * 192 + 192
    encoder = MambaEncoder(ModelSettings(dim=192, depth=8))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 8 * block + 192


def test_initial_values_are_those_of_mamba() -> None:
    encoder = MambaEncoder(ModelSettings(dim=64, depth=4, drop_path=0.3))
    mixer = encoder.blocks[0].mixer
    steps = F.softplus(mixer.forward_branch.dt_proj.bias)
    assert steps.min() >= 1e-3 - 1e-6
    assert steps.max() <= 0.1 + 1e-6
    assert steps.max() / steps.min() > 10
    torch.testing.assert_close(-mixer.forward_branch.A_log.exp()[5], -torch.arange(1.0, 17.0))
    assert (mixer.backward_branch.D == 1).all()
    largest = mixer.out_proj.weight.abs().max().item()
    assert largest == pytest.approx(1 / math.sqrt(128) / math.sqrt(4), rel=0.01)
    assert [block.drop_path.drop_prob for block in encoder.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )


def test_drop_path_leaves_out_whole_images_in_training_alone() -> None:
    block, tokens = MambaBlock(ModelSettings(dim=8, state=2), drop_path=0.5), draw_tokens(64, 3, 8)
    with torch.no_grad():
        change = (block(tokens) - tokens).abs().amax((1, 2))
        assert 10 < (change == 0).sum() < 54
        assert ((block.eval()(tokens) - tokens).abs().amax((1, 2)) > 0).all()


def test_bfloat16_autocast_stays_near_float32() -> None:
    encoder, tokens = seeded_encoder(drop_path=0.0), draw_tokens(2, 33, 12)
    expected = encoder(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(tokens)
    got.float().sum().backward()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in encoder.parameters()
    )


def test_exported_graph_takes_any_batch_and_stays_small() -> None:
    encoder = seeded_encoder(depth=1).eval()
    example = draw_tokens(2, 256, 12)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (example,), dynamic_shapes=({0: batch},))
    for count in (1, 5):
        tokens = draw_tokens(count, 256, 12)
        torch.testing.assert_close(program.module()(tokens), encoder(tokens), rtol=1e-4, atol=1e-5)
    assert len(program.graph.nodes) < 400


def test_compiled_block_equals_the_eager_one() -> None:
    mixer, tokens = seeded_encoder().blocks[0].mixer, draw_tokens(2, 9, 12)
    compiled = torch.compile(mixer, backend="eager")
    torch.testing.assert_close(compiled(tokens), mixer(tokens), rtol=1e-6, atol=1e-6)


def test_the_scan_backend_may_be_changed_afterwards() -> None:
    encoder = seeded_encoder()
    encoder.set_scan_backend("torch")
    assert {block.mixer.scan_backend for block in encoder.blocks} == {"torch"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_on_a_gpu_equals_the_cpu(dtype: torch.dtype) -> None:
    encoder, tokens = seeded_encoder(drop_path=0.0), draw_tokens(2, 257, 12)
    expected = encoder(tokens)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        got = encoder.cuda()(tokens.cuda()).cpu()
    assert (got - expected).abs().max() < (
        1e-4 if dtype == torch.float32 else 0.05
    ) * expected.abs().max()
