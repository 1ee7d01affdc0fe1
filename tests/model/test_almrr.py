"""The whole model: what goes in, what comes out, what is trained, and what a folder holds."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ModelSettings
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.model.almrr import ALMRR, ChannelProjection, ResidualMixture
from almrr_pipeline.training.runtime import algorithms

SIZE = (128, 160)


def test_the_map_is_a_probability_at_the_size_of_the_image(build_model, images: Tensor) -> None:
    anomaly_map = build_model()(images).detach()
    assert anomaly_map.shape == (2, *SIZE)
    assert float(anomaly_map.min()) >= 0.0
    assert float(anomaly_map.max()) <= 1.0
    assert float(anomaly_map.std()) > 0.05


def test_the_stages_follow_the_papers_figure(build_model, images: Tensor) -> None:
    model, images = build_model().double(), images.double()
    maps = model.backbone(images)
    resized = [F.interpolate(x, size=SIZE, mode="bilinear", align_corners=True) for x in maps]
    features = torch.cat([F.avg_pool2d(x, 4) for x in resized], dim=1)
    reconstruction = model.mfrm(features)
    stacked = torch.stack([reconstruction.mean(1), features.mean(1)], dim=1)
    probability = torch.softmax(model.frm(stacked), dim=1)
    expected = F.interpolate(probability, size=SIZE, mode="bilinear", align_corners=True)[:, 1]
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(128, 128), (144, 176), (160, 128)])
def test_rectangles_and_grids_that_are_no_multiple_of_32(
    build_model, size: tuple[int, int]
) -> None:
    assert build_model(image_size=size)(torch.rand(1, 3, *size)).shape == (1, *size)


def test_an_image_does_not_feel_its_neighbors(build_model, images: Tensor) -> None:
    model, images = build_model().double(), images.double()
    torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=0, atol=1e-9)


def test_images_without_an_anomaly_have_the_same_features_in_both_branches(build_model) -> None:
    model = build_model().train()
    normal, other = torch.rand(2, 3, *SIZE), torch.rand(1, 3, *SIZE)
    target, features = model.embed_both(normal, torch.cat([normal[:1], other]))
    torch.testing.assert_close(features[0], target[0], rtol=0, atol=0)
    torch.testing.assert_close(target, model.embed(normal))
    torch.testing.assert_close(features[1:], model.embed(other))


def test_training_forward_sends_each_image_down_its_branch(build_model, images: Tensor) -> None:
    model, normal, augmented = build_model().double(), images.double(), 1.0 - images.double()
    out = model.training_forward(normal, augmented)
    torch.testing.assert_close(out.target, model.embed(normal))
    torch.testing.assert_close(out.reconstruction, model.reconstruct(model.embed(augmented)))
    assert out.logits.shape == (2, 2, *SIZE)
    torch.testing.assert_close(out.logits.softmax(1)[:, 1], model(augmented), rtol=0, atol=1e-9)
    torch.testing.assert_close(out.logits.exp().sum(1), torch.ones(2, *SIZE, dtype=torch.float64))


def test_logits_and_their_gradient_stay_finite_when_the_softmax_underflows(build_model) -> None:
    model = build_model()
    with torch.no_grad():
        model.frm.out.bias.copy_(torch.tensor([80.0, -30.0]))
    out = model.training_forward(torch.rand(1, 3, *SIZE), torch.rand(1, 3, *SIZE))
    assert bool(out.logits.isfinite().all())
    assert model.frm.out.bias.grad is None
    out.logits[:, 1].mean().neg().backward()
    assert bool(model.frm.out.bias.grad.isfinite().all())


def test_the_backbone_takes_no_part_in_training(build_model) -> None:
    model = build_model().train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        features = model.embed(torch.rand(2, 3, *SIZE))
    assert kept == []
    assert not features.requires_grad
    out = model.training_forward(torch.rand(2, 3, *SIZE), torch.rand(2, 3, *SIZE))
    (F.mse_loss(out.reconstruction, out.target) - out.logits[:, 1].mean()).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items()
    )
    trained = list(model.trainable_parameters())
    assert {id(p) for p in trained} == {
        id(p) for part in (model.mfrm, model.frm) for p in part.parameters()
    }
    assert all(parameter.grad is not None for parameter in trained)


def test_standardized_features_have_mean_0_and_std_1(build_model) -> None:
    model = build_model(standardize=True)
    batches = [
        torch.rand(count, 3, *SIZE) * scale for count, scale in ((2, 1.0), (1, 0.3), (3, 0.7))
    ]
    raw = [model.regional_features(model.backbone(images)) for images in batches]
    values = torch.cat(raw).transpose(0, 1).flatten(1).double().numpy()
    model.fit_standardization(batches)
    np.testing.assert_allclose(model.feature_mean.numpy(), values.mean(1), rtol=1e-5, atol=1e-6)
    floor = 0.01 * float(values.std(1).mean())
    np.testing.assert_allclose(
        model.feature_std.numpy(), np.maximum(values.std(1), floor), rtol=1e-4
    )
    standardized = torch.cat([model.embed(images) for images in batches]).transpose(0, 1).flatten(1)
    assert float(standardized.mean(1).abs().max()) < 1e-3
    assert float((standardized.std(1) - 1).abs().median()) < 1e-3


def test_a_channel_silent_on_normal_images_is_not_blown_up(build_model) -> None:
    model = build_model(standardize=True)
    images = torch.rand(2, 3, *SIZE)
    dead = model.backbone.channels[0] + 1
    norm = model.backbone.network.get_submodule("layer2.0.bn2")
    with torch.no_grad():
        norm.weight[1] = 0.0
        norm.bias[1] = -100.0
    model.fit_standardization([images])
    std = model.feature_std
    assert float(std[dead]) == pytest.approx(0.01 * float(std.mean()), rel=0.02)


def test_standardizing_is_refused_where_it_has_no_sense(build_model) -> None:
    with pytest.raises(AlmrrError, match="does not standardize"):
        build_model().fit_standardization([torch.rand(1, 3, *SIZE)])
    with pytest.raises(AlmrrError, match="no normal image"):
        build_model(standardize=True).fit_standardization([])


def test_the_projection_begins_as_the_mean_and_directions_orthogonal_to_it() -> None:
    torch.manual_seed(0)
    weight = ChannelProjection(50, 4).weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(weight[0], torch.full((50,), 1 / 50))
    torch.testing.assert_close(weight @ weight.T, torch.eye(4) / 50, rtol=0, atol=1e-6)


def test_the_projection_is_one_for_both_and_trained(build_model) -> None:
    model = build_model(refinement_input="projection", refinement_channels=3)
    features, reconstruction = torch.randn(2, 272, 32, 40), torch.randn(2, 272, 32, 40)
    weight = model.summary.weight[:, :, 0, 0]
    stacked = torch.cat(
        [torch.einsum("kc,bcij->bkij", weight, x) for x in (reconstruction, features)], dim=1
    )
    refined = model.refine(reconstruction, features, torch.rand(2, 3, *SIZE))
    torch.testing.assert_close(refined, model.frm(stacked), rtol=1e-4, atol=1e-4)
    assert any(parameter is model.summary.weight for parameter in model.trainable_parameters())


def test_a_mixture_of_squared_residuals_worked_by_hand() -> None:
    mixture = ResidualMixture(2, 1).requires_grad_(False)
    mixture.weight.copy_(torch.tensor([0.5, 2.0]).view(1, 2, 1, 1))
    mixture.bias.fill_(0.25)
    features = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    reconstruction = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)  # squared residuals 4 and 1
    expected = 0.5 * math.log(5.0) + 2.0 * math.log(2.0) + 0.25
    assert float(mixture(features, reconstruction)) == pytest.approx(expected, rel=1e-6)


def test_a_mixture_starts_with_weights_around_the_mean_over_the_channels() -> None:
    torch.manual_seed(0)
    mixture = ResidualMixture(500, 8).requires_grad_(False)
    assert float(mixture.weight.min()) >= 0.0
    assert float(mixture.weight.max()) <= 2 / 500
    torch.testing.assert_close(
        mixture.weight.mean((1, 2, 3)), torch.full((8,), 1 / 500), rtol=0.1, atol=0
    )
    assert not mixture.bias.any()


def test_the_frm_sees_the_mixtures_after_the_summaries_and_trains_them(build_model) -> None:
    model = build_model(residual_channels=3)
    features, reconstruction = torch.randn(2, 272, 32, 40), torch.randn(2, 272, 32, 40)
    reconstruction.requires_grad_()
    residuals = (features - reconstruction).square().log1p()
    mixed = torch.einsum("rc,bcij->brij", model.residual.weight[:, :, 0, 0], residuals)
    mixed = mixed + model.residual.bias[:, None, None]
    means = [x.mean(1, keepdim=True) for x in (reconstruction, features)]
    given = model.refine(reconstruction, features, torch.rand(2, 3, *SIZE))
    expected = model.frm(torch.cat([*means, mixed], dim=1))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    given.square().mean().backward()
    assert bool(model.residual.weight.grad.any())
    assert bool(model.residual.bias.grad.any())
    assert bool(reconstruction.grad.any())
    trained = list(model.trainable_parameters())
    assert all(any(p is own for p in trained) for own in model.residual.parameters())


def test_under_autocast_large_residuals_stay_finite() -> None:
    mixture = ResidualMixture(4, 2)
    features = torch.full((1, 4, 3, 3), 1e4, dtype=torch.float16)  # its square overflows float16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixture(features, torch.zeros_like(features))
    assert mixed.dtype == torch.bfloat16
    expected = mixture(features.float(), torch.zeros(1, 4, 3, 3))
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0)


def test_without_residuals_and_prior_the_model_is_the_papers(build_model) -> None:
    papers = ModelSettings()
    assert (papers.residual_channels, papers.fine_channels, papers.prior) == (0, 0, None)
    names = build_model(residual_channels=2).state_dict().keys() - build_model().state_dict().keys()
    assert names == {"residual.weight", "residual.bias"}


def test_the_frm_sees_the_distances_last(build_model) -> None:
    model = build_model(memory_size=6)
    features, reconstruction = torch.randn(2, 272, 32, 40), torch.randn(2, 272, 32, 40)
    means = [x.mean(1, keepdim=True) for x in (reconstruction, features)]
    for owners in (None, torch.tensor([1, 3])):
        distances = model.memory(features, owners)
        given = model.refine(reconstruction, features, torch.rand(2, 3, *SIZE), distances)
        distances = model.memory.relative(distances)
        expected = model.frm(torch.cat([*means, distances], dim=1))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_distances_weigh_the_odds_of_the_map(build_model) -> None:
    model = build_model(memory_size=6, memory_input=False, memory_exponent=3.0).eval()
    images = torch.rand(2, 3, *SIZE)
    model.memory.neutral.zero_()  # not known
    plain = model(images)
    model.fill_memory([(torch.rand(3, 3, *SIZE), torch.arange(3))], images=3, seed=0)
    model.fit_evidence([torch.rand(1, 3, *SIZE)])
    evidence = model.upsample(model.memory.evidence(model.memory(model.embed(images))))[:, 0]
    odds = plain / (1 - plain) * evidence**3
    assert float((odds - plain / (1 - plain)).abs().max()) > 1e-3
    torch.testing.assert_close(model(images), odds / (1 + odds), rtol=1e-4, atol=1e-5)
    features = model.embed(images)
    assert model.refine(features, features, images).shape[1] == 2  # without distances


def test_a_memory_has_a_use(build_model) -> None:
    with pytest.raises(ValidationError, match="unused; set memory_input or memory_exponent"):
        build_model(memory_size=6, memory_input=False)
    with pytest.raises(ValidationError, match="nothing is remembered; set memory_size"):
        build_model(memory_exponent=2.0)
    with pytest.raises(AlmrrError, match=r"weighs no distances; set model\.memory_exponent"):
        build_model(memory_size=6).fit_evidence([])


def test_a_model_without_memory_refuses_to_fill_it(build_model) -> None:
    with pytest.raises(AlmrrError, match=r"remembers no features; set model\.memory_size"):
        build_model().fill_memory([], images=1, seed=0)


def test_the_summary_must_be_one_that_exists(build_model) -> None:
    with pytest.raises(ValidationError, match="mean has one channel; set refinement_channels: 1"):
        build_model(refinement_input="mean", refinement_channels=2)
    with pytest.raises(
        ValidationError, match=r"refinement_input\n.*'mean' or 'projection'.*'median'"
    ):
        build_model(refinement_input="median")


NAN, INFINITE = torch.rand(1, 3, *SIZE), torch.rand(1, 3, *SIZE)
NAN[0, 1, 5, 5] = float("nan")
INFINITE[0, 2, 0, 0] = float("inf")
BAD_IMAGES = [
    (torch.rand(1, 1, *SIZE), r"\(B, 3, H, W\).*got \(1, 1, 128, 160\)"),
    (torch.rand(3, *SIZE), r"\(B, 3, H, W\)"),
    (torch.rand(1, 3, 100, 160), "multiple of 16 and at least 128; instead of 100 take 128 or 144"),
    (torch.rand(1, 3, 128, 170), "instead of 170 take 160 or 176"),
    (torch.rand(1, 3, 256, 256), r"built for images of \(128, 160\); got \(256, 256\)"),
    (
        torch.randint(0, 255, (1, 3, *SIZE), dtype=torch.uint8),
        r"floats in \[0, 1\], not torch.uint8. Divide",
    ),
    (torch.rand(1, 3, *SIZE) * 255, r"reach from .* to 25\d"),
    (torch.rand(1, 3, *SIZE) - 0.5, r"reach from -0.\d"),
    (NAN, "not finite"),
    (INFINITE, "not finite"),
    (-INFINITE, "not finite"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES)
@pytest.mark.parametrize("fused", [False, True])
def test_bad_images_are_refused_with_what_to_do(
    build_model, images: Tensor, message: str, fused: bool
) -> None:
    model = fuse(build_model()) if fused else build_model()
    with pytest.raises(AlmrrError, match=message):
        model(images)


@pytest.mark.parametrize("size", [(120, 128), (128, 130), (112, 128)])
def test_a_size_that_does_not_fit_is_refused(build_model, size: tuple[int, int]) -> None:
    with pytest.raises(AlmrrError, match="multiple of 16 and at least 128"):
        build_model(image_size=size)


def test_bad_training_images_are_refused(build_model) -> None:
    model, good = build_model(), torch.rand(1, 3, *SIZE)
    with pytest.raises(AlmrrError, match="Divide 8-bit values"):
        model.training_forward(good, (good * 255).to(torch.uint8))
    with pytest.raises(AlmrrError, match="got"):
        model.training_forward(good[:, :1], good)


def test_a_saved_model_comes_back_equal_without_any_download(build_model, tmp_path: Path) -> None:
    model = build_model(
        "tf_efficientnet_lite0",
        "expansion",
        refinement_input="projection",
        refinement_channels=2,
        residual_channels=2,
        memory_size=6,
        prior=0.02,
        standardize=True,
    )
    model.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "model.sha256"]
    loaded = ALMRR.load(tmp_path, scan_backend="torch")
    assert not loaded.training
    assert loaded.settings == model.settings
    assert loaded.image_size == model.image_size
    assert loaded.backbone.settings == model.backbone.settings
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    images = torch.rand(1, 3, *SIZE)
    assert torch.equal(loaded(images), model(images))


def test_a_model_of_version_0_2_loads_without_what_it_had_not(build_model, tmp_path: Path) -> None:
    model = build_model()
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in (
        *("fine_channels", "memory_exponent", "memory_input", "memory_size"),
        *("posterior_gamma", "prior", "residual_channels"),
    ):
        del config["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.sha256").unlink()
    assert ALMRR.load(tmp_path).settings == model.settings


def test_an_interrupted_save_leaves_what_was_there(build_model, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # a folder cannot be replaced by a file
    (tmp_path / "config.json" / "kept").touch()
    with pytest.raises(OSError, match=r"config\.json"):
        build_model().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "config.json" / "kept").exists()


def test_a_folder_that_does_not_fit_is_refused_naming_what_differs(
    build_model, tmp_path: Path
) -> None:
    build_model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def expect(message: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(AlmrrError, match=message):
            ALMRR.load(tmp_path)

    expect(
        r"mfrm.reduce.weight is \(24, 272, 1, 1\), not \(32, 272",
        model=config["model"] | {"latent": 32},
    )
    expect(r"and \d+ more", model=config["model"] | {"depth": 3})
    expect("unknown, missing or impossible values.*latnet", model=config["model"] | {"latnet": 32})
    expect("unknown, missing or impossible values", model=config["model"] | {"latent": -3})
    expect("mfrm.encoder.blocks.1.* is not in the network", model=config["model"] | {"depth": 1})
    expect(
        r"missing values \(backbone.feature_location, backbone.name\)",
        backbone={"stride_in_1x1": False},
    )
    expect("multiple of 16", image_size=[100, 100])
    expect("impossible values.*version", version=99)
    expect("impossible values.*format", format="other")
    expect("impossible values.*model", model=[1])
    expect(
        "model of almrr-pipeline 0.1.*train it again, or use almrr-pipeline 0.1",
        **{"format": "almrr", "version": 1, "model": config["model"] | {"image_size": [128, 160]}},
    )


def test_a_damaged_folder_is_refused(build_model, tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"holds no model: there is no config.json"):
        ALMRR.load(tmp_path)
    build_model().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()[:1000]
    )
    with pytest.raises(AlmrrError, match="cannot be read as weights"):
        ALMRR.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(AlmrrError, match=r"there is no model.safetensors"):
        ALMRR.load(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(AlmrrError, match="cannot be read"):
        ALMRR.load(tmp_path)


@pytest.mark.gpu
def test_cpu_and_gpu_agree(build_model) -> None:
    """In full float32: TF32, cuDNN's default, changes single pixels of such maps by 0.01 to 0.2."""
    model, images = build_model(residual_channels=2).requires_grad_(False), torch.rand(2, 3, *SIZE)
    exact = copy.deepcopy(model).double()(images.double())
    with algorithms(deterministic=True):
        given = model.to("cuda")(images.to("cuda"))
    torch.testing.assert_close(given.cpu().double(), exact, rtol=0, atol=1e-3)
