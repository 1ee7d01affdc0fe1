"""The frozen backbone: its maps, its strides, its weights, and that nothing of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.model.backbone import Backbone, build_backbone
from almrr_pipeline.model.weights_io import read_weights

CAFFE_WEIGHTS = "weights/resnet50_imagenet_stride_in_1x1_to_layer3_fp16.pth"


def build(name: str, weights: Path | None = None, **options: Any) -> Backbone:
    return build_backbone(BackboneSettings(name=name, **options), weights=weights)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build("test_resnet")


@pytest.mark.parametrize(
    ("name", "location", "channels"),
    [
        ("tf_efficientnet_lite0", "bottleneck", (24, 40, 112)),
        ("tf_efficientnet_lite0", "expansion", (144, 240, 672)),
        ("test_resnet", "bottleneck", (32, 48, 192)),
    ],
)
def test_maps_are_at_strides_4_8_16(
    name: str, location: str, channels: tuple[int, int, int]
) -> None:
    backbone = build(name, None, feature_location=location)  # type: ignore[arg-type]
    maps = backbone(torch.rand(2, 3, 128, 160))
    assert backbone.channels == channels
    assert [tuple(x.shape) for x in maps] == [
        (2, channels[0], 32, 40),
        (2, channels[1], 16, 20),
        (2, channels[2], 8, 10),
    ]


def test_expansion_features_follow_an_activation() -> None:
    maps = build("tf_efficientnet_lite0", None, feature_location="expansion")(
        torch.rand(1, 3, 128, 128)
    )
    assert all(float(x.min()) == 0.0 for x in maps)


def test_images_are_normalized_as_the_network_was_trained(backbone: Backbone) -> None:
    images = torch.rand(1, 3, 128, 128)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = torch.stack([(images[0, c] - mean[c]) / std[c] for c in range(3)])[None]
    torch.testing.assert_close(build("resnet18").mean.flatten(), mean)
    own = (backbone.mean, backbone.std)
    backbone.mean, backbone.std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
    torch.testing.assert_close(backbone(images), list(backbone.network(normalized)))
    backbone.mean, backbone.std = own


def test_training_mode_does_not_reach_the_backbone(backbone: Backbone) -> None:
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_no_gradient_and_no_activation_is_kept(backbone: Backbone) -> None:
    kept: list[torch.Tensor] = []
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        maps = backbone(images)
    assert kept == []
    assert not any(x.requires_grad for x in maps)


def test_the_stages_after_stride_16_are_not_built() -> None:
    assert "layer4" not in dict(build("resnet18").network.named_children())
    assert len(build("tf_efficientnet_lite0").network.get_submodule("blocks")._modules) == 5


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file_with_more_in_it(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in whole.state_dict().items()
    }
    if suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    backbone = build("test_resnet", path)
    own = backbone.network.state_dict()
    assert "fc.weight" in tensors
    assert all(torch.equal(own[name], tensors[name].to(own[name].dtype)) for name in own)
    assert backbone.network.get_parameter("conv1.0.weight").dtype == torch.float32


def test_weights_with_the_older_stride_load(shared: Path) -> None:
    backbone = build("resnet50.tv_in1k", shared / CAFFE_WEIGHTS, stride_in_1x1=True)
    block = backbone.network.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert backbone.channels == (256, 512, 1024)
    stored = read_weights(shared / CAFFE_WEIGHTS)
    weight = backbone.network.get_parameter("layer3.5.conv3.weight")
    torch.testing.assert_close(weight, stored["layer3.5.conv3.weight"].float(), rtol=0, atol=0)


def test_the_place_of_the_stride_matters(shared: Path) -> None:
    images = torch.rand(1, 3, 128, 128)
    maps = [
        build("resnet50.tv_in1k", shared / CAFFE_WEIGHTS, stride_in_1x1=flag)(images)
        for flag in (True, False)
    ]
    torch.testing.assert_close(maps[0][0], maps[1][0])  # stage 1 has stride 1
    assert float(F.mse_loss(maps[0][2], maps[1][2])) > 0.1 * float(maps[0][2].var())


def test_an_older_file_without_step_counters_loads(tmp_path: Path) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    path = tmp_path / "old.pth"
    torch.save(
        {name: tensor for name, tensor in tensors.items() if "num_batches" not in name}, path
    )
    assert build("test_resnet", path).channels == (32, 48, 192)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(AlmrrError, match="no network 'resnet5000'"):
        build("resnet5000")
    with pytest.raises(AlmrrError, match="no feature maps at strides 4, 8 and 16"):
        build("vit_tiny_patch16_224")
    with pytest.raises(AlmrrError, match="stride_in_1x1 is for ResNets"):
        build("resnet18", None, stride_in_1x1=True)
    with pytest.raises(AlmrrError, match="feature_location: test_resnet has only 'bottleneck'"):
        build("test_resnet", None, feature_location="expansion")


def test_bad_weights_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="no weights at"):
        build("test_resnet", tmp_path / "absent.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("this is no archive")
        with pytest.raises(AlmrrError, match="cannot be read as weights"):
            build("test_resnet", tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(AlmrrError, match="no dictionary of tensors"):
        build("test_resnet", tmp_path / "list.pth")
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(AlmrrError, match=r"conv1.0.weight is missing; .*; and \d+ more"):
        build("test_resnet", tmp_path / "other.pth")
    tensors = timm.create_model("test_resnet").state_dict()
    tensors["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 4)
    torch.save(tensors, tmp_path / "shape.pth")
    with pytest.raises(AlmrrError, match=r"layer1.0.conv1.weight is \(1, 2, 3, 4\), not"):
        build("test_resnet", tmp_path / "shape.pth")
