"""Weights files, and the folder of a model: model.safetensors and config.json.

A folder may come from anybody: what it holds is checked, and sizes that do not agree are refused
before they take memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import write_atomically
from almrr_pipeline.config import BackboneSettings, ModelSettings, Section, Side, list_faults
from almrr_pipeline.model.checksums import read_settings, write_checksums

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_NOT_SAVED = {"backbone": {"weights", "sha256"}}
"""Where the backbone's weights came from: they are in the model's own file."""
_ADDED = {
    *("fine_channels", "memory_exponent", "memory_input", "memory_size"),
    *("posterior_gamma", "prior", "residual_channels"),
}
"""Settings of `model` that version 0.2.0 did not have: off, by default, where a file lacks them."""
_NETWORK_NAME = re.compile(r"[\w-]+(\.[\w-]+)?", re.ASCII)
"""Of a network that timm builds itself; hf-hub:NAME and local-dir:FOLDER lead elsewhere."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_NAMED = 3
"""Differences that an error names before it counts the rest."""


class ModelConfig(Section):
    """config.json: what is needed to build the network that the weights belong to."""

    backbone: BackboneSettings
    image_size: tuple[Side, Side]
    """Rows and columns of the network's input."""
    model: ModelSettings


def write_model(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder; each replaces an older one when it is complete."""
    with write_atomically(folder / WEIGHTS_FILE) as path:
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        path.write_bytes(save(stored))  # save_file does not tell that a disk is full
    with write_atomically(folder / CONFIG_FILE) as path:
        text = config.model_dump_json(indent=2, exclude=_NOT_SAVED)
        path.write_text(text + "\n", encoding="utf-8")
    write_checksums(folder, WEIGHTS_FILE, CONFIG_FILE)


def read_config(folder: Path) -> ModelConfig:
    """Read the config.json of a saved model.

    Raises:
        AlmrrError: it is missing, cannot be read, is of version 0.1, or holds values that are
            unknown, missing or out of range.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(read_settings(path))
    except (FileNotFoundError, NotADirectoryError):
        raise AlmrrError(f"{folder} holds no model: there is no {CONFIG_FILE} in it.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read ({error}).") from error
    if isinstance(values, dict) and values.get("format") == "almrr" and values.get("version") == 1:
        raise AlmrrError(
            f"{folder} holds a model of almrr-pipeline 0.1, which this version cannot read; "
            "train it again, or use almrr-pipeline 0.1."
        )
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        faults = list_faults(error)
        raise AlmrrError(f"{path}: unknown, missing or impossible values ({faults}).") from None
    complete = config.model_dump(mode="json", exclude=_NOT_SAVED)
    names = ((s, k) for s in ("backbone", "model") for k in complete[s].keys() - values[s] - _ADDED)
    missing = [f"{section}.{name}" for section, name in names]
    if missing:  # a default could differ from the value that the weights were trained with
        raise AlmrrError(f"{path}: missing values ({', '.join(sorted(missing))}).")
    backbone = config.backbone
    if not _NETWORK_NAME.fullmatch(backbone.name):
        name = backbone.name[:100]
        raise AlmrrError(f"{path}: backbone.name is {name!r}, no name of timm's own.")
    if (backbone.weights, backbone.sha256) != ("hub", None):
        raise AlmrrError(f"{path}: backbone.weights is given, but they are in {WEIGHTS_FILE}.")
    return config


def read_header(path: Path) -> dict[str, Tensor]:
    """The names, shapes and types of a .safetensors file, as tensors that take no memory.

    Raises:
        AlmrrError: the file is missing, or damaged.
    """
    if not path.is_file():
        raise AlmrrError(f"There are no weights at {path}: there is no {path.name} in its folder.")
    header = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise AlmrrError(f"{path}: {name} is of the type {part.get_dtype()}.")
                header[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise AlmrrError(
            f"{path} cannot be read as weights ({error}); copy the model again."
        ) from error
    return header


def check_header(network: nn.Module, header: Mapping[str, Tensor], *, origin: str) -> None:
    """Refuse weights that do not fit a network, which may be on the meta device.

    Raises:
        AlmrrError: tensors are missing, too many, or have other shapes or kinds of number.
    """
    own = network.state_dict()
    _refuse(_differences(own, header, exact=True), origin)
    other = [
        f"{name} is {tensor.dtype}"
        for name, tensor in header.items()
        if tensor.is_floating_point() != own[name].is_floating_point()
    ]
    _refuse(other, origin)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors, .pth or .pt file, on the CPU, in the file's types.

    Raises:
        AlmrrError: the file is missing or holds no such tensors.
    """
    if not path.is_file():
        raise AlmrrError(f"There are no weights at {path}: there is no {path.name} in its folder.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another format makes torch's unpickler raise anything
        raise AlmrrError(
            f"{path} cannot be read as weights ({error}); give a .safetensors, .pth or .pt file."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise AlmrrError(f"{path} holds no dictionary of tensors; save the network's state_dict.")
    return content


def load_weights(
    network: nn.Module, tensors: Mapping[str, Tensor], *, origin: str, exact: bool = False
) -> None:
    """Load the network's tensors, in place; a batch norm's step counter may be missing.

    Args:
        network: the network.
        tensors: by the names in its state_dict.
        origin: where they came from, for messages.
        exact: whether to refuse other tensors, such as a classifier's; by default they are ignored.

    Raises:
        AlmrrError: tensors are missing, have other shapes, or are too many; names them.
    """
    own = network.state_dict()
    _refuse(_differences(own, tensors, exact=exact), origin)
    network.load_state_dict({name: tensors.get(name, tensor) for name, tensor in own.items()})


def _differences(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, exact: bool
) -> list[str]:
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    wrong = [f"{name} is missing" for name in own if name not in tensors.keys() | counters]
    wrong += [f"{name} is not in the network" for name in tensors if exact and name not in own]
    return wrong + [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]


def _refuse(wrong: list[str], origin: str) -> None:
    if wrong:
        more = [f"and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
        raise AlmrrError(
            f"{origin} does not hold this network's weights: "
            f"{'; '.join(wrong[:_NAMED] + more)}. Check the network's name and settings."
        )
