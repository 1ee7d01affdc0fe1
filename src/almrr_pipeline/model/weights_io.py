"""A model's folder: model.safetensors and config.json, written whole or not at all, and read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "almrr"
FORMAT_VERSION = 1


def write_model(
    folder: Path, *, tensors: Mapping[str, Tensor], backbone: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    """Write the two files into an existing folder; each is written beside its place and renamed."""
    config = {"format": FORMAT, "version": FORMAT_VERSION, "backbone": dict(backbone), "model": dict(model)}
    with write_beside(folder / WEIGHTS_FILE) as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with write_beside(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a saved model: its sections "backbone" and "model".

    Raises:
        AlmrrError: it is missing, cannot be read, or is of another format or version.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AlmrrError(f"{folder} holds no model: there is no {CONFIG_FILE} in it.") from None
    except (ValueError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read ({error}).") from error
    known = isinstance(config, dict) and config.get("format") == FORMAT
    if not known or not all(isinstance(config.get(section), dict) for section in ("backbone", "model")):
        raise AlmrrError(f"{path} does not describe an ALMRR model.")
    if config.get("version") != FORMAT_VERSION:
        raise AlmrrError(f"{path} is of format version {config.get('version')!r}; this package reads {FORMAT_VERSION}.")
    return dict(config)


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
