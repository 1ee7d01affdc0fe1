"""A model's folder: model.safetensors and config.json, written whole or not at all, and read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings, ModelSettings, Section, Side

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT_KEYS = {"format", "version"}
"""What config.json of version 0.1 had besides its sections."""


class ModelConfig(Section):
    """config.json: what is needed to build a model for its weights."""

    backbone: BackboneSettings
    """Where the weights came from (`weights`, `sha256`) is not written."""
    image_size: tuple[Side, Side]
    """Rows and columns of the network's input."""
    model: ModelSettings


def write_model(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the two files into an existing folder; each appears complete or not at all."""
    with write_beside(folder / WEIGHTS_FILE) as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with write_beside(folder / CONFIG_FILE) as path:
        text = config.model_dump_json(indent=2, exclude={"backbone": {"weights", "sha256"}})
        path.write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path) -> ModelConfig:
    """Read the config.json of a saved model.

    Raises:
        AlmrrError: it is missing, cannot be read, or does not describe a model of this version.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.keys() >= _FORMAT_KEYS:
            raise AlmrrError(
                f"{folder} is a model of almrr-pipeline 0.1, which this version cannot read; "
                "train it again, or use almrr-pipeline 0.1."
            )
        return ModelConfig.model_validate(config)
    except (FileNotFoundError, NotADirectoryError):
        raise AlmrrError(f"{folder} holds no model: there is no {CONFIG_FILE} in it.") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise AlmrrError(f"{path}: unknown, missing or impossible values ({wrong}).") from error
    except (ValueError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read ({error}).") from error


def read_tensors(folder: Path, *, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of a saved model, which must have the names and shapes of `expected`.

    Raises:
        AlmrrError: they are missing, cannot be read, or differ; says in what.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise AlmrrError(f"{folder} holds no weights: there is no {WEIGHTS_FILE} in it.") from None
    except (SafetensorError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read as weights ({error}).") from error
    differences = [f"{name} is not in the weights" for name in expected if name not in tensors]
    differences += [f"{name} is not in the model" for name in tensors if name not in expected]
    differences += [
        f"{name} is {tuple(tensors[name].shape)} in the weights, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise AlmrrError(f"{folder}: {CONFIG_FILE} does not fit {WEIGHTS_FILE}: {'; '.join(differences[:3])}{more}.")
    return tensors


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """A path of the same suffix to write to, which takes the place of `path` on success, else is removed."""
    partial = path.with_name(f".partial.{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
