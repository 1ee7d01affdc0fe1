"""One file that maps anomalies without this package: the fused model as ONNX, or as a program of torch.export.

Input "images": RGB, float32 in [0, 1], shape (batch, 3, H, W), any batch, the model's own H and W.
Output "anomaly_map": float32 in [0, 1], shape (batch, H, W).

The selective scan is taken in its parallel form, so that the graph has no step per token. Values are not checked inside
the graph: whoever calls it divides by 255 and resizes, as `Predictor` does.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.inference.fuse import FusedALMRR
from almrr_pipeline.model.weights_io import write_beside

INPUT, OUTPUT = "images", "anomaly_map"
_EXAMPLES = 2
"""Images in the batch that is traced; a batch of one would be taken as fixed."""


def export_onnx(model: ALMRR | FusedALMRR, path: Path, *, flips: bool = False) -> None:
    """Write the model, fused, as ONNX, with the weights inside the file.

    Args:
        model: what is written.
        path: the file.
        mirrored: write the mean over mirror images, as `almrr_pipeline.inference.tta` takes it.

    Raises:
        AlmrrError: the file cannot be written there, or the packages that write ONNX are not installed.
    """
    _check_target(path)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AlmrrError(
            f"ONNX needs a package that is not here ({error}): pip install 'almrr-pipeline[onnx]'."
        ) from error
    graph, images = average_flips(_Graph(model), flips), _example(model)
    program = torch.onnx.export(
        graph,
        (images,),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with write_beside(path) as partial:
        program.save(partial, external_data=False)


def export_torch(model: ALMRR | FusedALMRR, path: Path, *, flips: bool = False) -> None:
    """Write the model, fused, as a program: `torch.export.load(path).module()(images)` gives the maps.

    Args:
        model: what is written.
        path: the file.
        mirrored: write the mean over mirror images, as `almrr_pipeline.inference.tta` takes it.

    Raises:
        AlmrrError: the file cannot be written there.
    """
    _check_target(path)
    graph, images = average_flips(_Graph(model), flips), _example(model)
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    with write_beside(path) as partial:
        torch.export.save(program, partial)


class _Graph(nn.Module):
    """What a graph holds of a model: fused, on the CPU, the scan in its parallel form, the input unchecked."""

    def __init__(self, model: ALMRR | FusedALMRR) -> None:
        super().__init__()
        self.fused = (model.fuse() if isinstance(model, ALMRR) else copy.deepcopy(model)).cpu()
        self.fused.encoder.set_scan_backend("parallel")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.fused.compute(images)


def _example(model: ALMRR | FusedALMRR) -> Tensor:
    return torch.full((_EXAMPLES, 3, *model.image_size), 0.5)


def _check_target(path: Path) -> None:
    """Refuse, before the minute that tracing takes, a place where no file can be put."""
    if not path.parent.is_dir():
        raise AlmrrError(f"There is no folder {path.parent} to write {path.name} to; make it first.")
    if path.is_dir():
        raise AlmrrError(f"{path} is a folder; name a file.")
