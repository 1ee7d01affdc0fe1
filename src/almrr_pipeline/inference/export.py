"""Export of the fused model to one file that runs without this package: ONNX or torch.export.

Input "images": RGB, float32 in [0, 1], shape (batch, 3, H, W), any batch, the model's own H and W.
Output "anomaly_map": float32 in [0, 1], shape (batch, H, W).

The selective scan is exported in its parallel form, so that the graph has no step per token. Values
are not checked inside the graph: the caller divides by 255 and resizes, as `Predictor` does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import write_atomically
from almrr_pipeline.inference.fuse import FusedALMRR, fuse
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.model.almrr import ALMRR

INPUT, OUTPUT = "images", "anomaly_map"
_TRACED_BATCH = 2
"""Images in the batch that is traced; a batch of one would be taken as fixed."""


def export_onnx(model: ALMRR | FusedALMRR, path: Path, *, flips: bool = False) -> None:
    """Write the model, fused, as ONNX, with the weights inside the file.

    Args:
        model: the model; stays as it is.
        path: the file.
        flips: export the mean over flips (`almrr_pipeline.inference.tta`).

    Raises:
        AlmrrError: the file cannot be written there, or the packages that write ONNX are missing.
    """
    _check_target(path)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AlmrrError(
            f"ONNX needs a package that is not installed ({error}): "
            "pip install 'almrr-pipeline[onnx]'."
        ) from error
    graph, images, dynamic_shapes = _prepare_tracing(model, flips)
    program = torch.onnx.export(
        graph,
        (images,),
        dynamic_shapes=dynamic_shapes,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with write_atomically(path) as partial:
        program.save(partial, external_data=False)


def export_torch(model: ALMRR | FusedALMRR, path: Path, *, flips: bool = False) -> None:
    """Write the model, fused, as a program: `torch.export.load(path).module()(images)` gives maps.

    Arguments and errors are those of `export_onnx`.
    """
    _check_target(path)
    graph, images, dynamic_shapes = _prepare_tracing(model, flips)
    program = torch.export.export(graph, (images,), dynamic_shapes=dynamic_shapes, strict=False)
    with write_atomically(path) as partial:
        torch.export.save(program, partial)


class _Graph(nn.Module):
    """The exported function: fused, on the CPU, scan in parallel form, input unchecked."""

    def __init__(self, model: ALMRR | FusedALMRR) -> None:
        super().__init__()
        self.fused = (fuse(model) if isinstance(model, ALMRR) else copy.deepcopy(model)).cpu()
        self.fused.encoder.set_scan_backend("parallel")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.fused.compute(images)


def _prepare_tracing(
    model: ALMRR | FusedALMRR, flips: bool
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The exported function, an example of its input, and the axes that may vary."""
    example = torch.full((_TRACED_BATCH, 3, *model.image_size), 0.5)
    return average_flips(_Graph(model), flips), example, {INPUT: {0: torch.export.Dim("batch")}}


def _check_target(path: Path) -> None:
    """Refuse, before the minute that tracing takes, a place where no file can be written."""
    if not path.parent.is_dir():
        raise AlmrrError(
            f"There is no folder {path.parent} to write {path.name} to; make it first."
        )
    if path.is_dir():
        raise AlmrrError(f"{path} is a folder; name a file.")
