"""Export of the fused model to files that run without this package: ONNX, OpenVINO, torch.export.

Input "images": RGB, float32 in [0, 1], shape (batch, 3, H, W), any batch, the model's own H and W.
Output "anomaly_map": float32 in [0, 1], shape (batch, H, W).

The selective scan is one `Scan` node in ONNX and in its parallel form in torch.export, so that the
graph has no step per token. Values are not checked inside the graph: the caller divides by 255 and
resizes, as `Predictor` does.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import check_target_file, write_atomically
from almrr_pipeline.common.progress import report_waiting
from almrr_pipeline.inference.complete_graph import check_completable, complete_graph
from almrr_pipeline.inference.fuse import FusedALMRR, fuse
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.kernels.scan.onnx_backend import write_scans

INPUT, OUTPUT = "images", "anomaly_map"
_TRACED_BATCH = 2
"""Images in the batch that is traced; a batch of one would be taken as fixed."""


def export_onnx(
    model: ALMRR | FusedALMRR,
    path: Path,
    *,
    flips: bool = False,
    complete: InferenceConfig | None = None,
) -> None:
    """Write the model, fused, as ONNX, with the weights inside the file.

    Args:
        model: the model; stays as it is.
        path: the file.
        flips: export the mean over flips (`almrr_pipeline.inference.tta`).
        complete: what turns maps into scores and verdicts, to put all of it into the graph
            (`almrr_pipeline.inference.complete_graph`); None for the network alone.

    Raises:
        AlmrrError: the file cannot be written there, or the packages that write ONNX are missing.
    """
    check_target_file(path)
    if complete is not None:
        check_completable(complete)
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AlmrrError(
            f"ONNX needs a package that is not installed ({error}): "
            "pip install 'almrr-pipeline[onnx]'."
        ) from error
    with report_waiting(f"Exporting {path.name}"):
        graph, images, dynamic_shapes = _prepare_tracing(model, flips, scan_backend="onnx")
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
        exported = program.model_proto
        write_scans(exported)
        if complete is not None:
            complete_graph(exported, complete)
    with write_atomically(path) as partial:
        onnx.save(exported, partial)


def export_openvino(
    model: ALMRR | FusedALMRR,
    path: Path,
    *,
    flips: bool = False,
    complete: InferenceConfig | None = None,
) -> None:
    """Write the model, fused, for OpenVINO: the graph `path` (.xml), its weights next to it (.bin).

    Arguments and errors are those of `export_onnx`, through which it goes.
    """
    check_target_file(path)
    try:
        import openvino
    except ImportError as error:
        raise AlmrrError(
            f"OpenVINO is not installed ({error}): pip install 'almrr-pipeline[openvino]'."
        ) from error
    with tempfile.TemporaryDirectory(prefix=".almrr-", dir=path.parent) as folder:
        source, graph = Path(folder, "model.onnx"), Path(folder, path.stem + ".xml")
        export_onnx(model, source, flips=flips, complete=complete)
        openvino.save_model(openvino.Core().read_model(source), graph, compress_to_fp16=False)
        graph.with_suffix(".bin").replace(path.with_suffix(".bin"))  # the weights first
        graph.replace(path)


def export_torch(model: ALMRR | FusedALMRR, path: Path, *, flips: bool = False) -> None:
    """Write the model, fused, as a program: `torch.export.load(path).module()(images)` gives maps.

    Arguments and errors are those of `export_onnx`.
    """
    check_target_file(path)
    graph, images, shapes = _prepare_tracing(model, flips, scan_backend="parallel")
    with report_waiting(f"Exporting {path.name}"):
        program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    with write_atomically(path) as partial:
        torch.export.save(program, partial)


class _Graph(nn.Module):
    """The exported function: fused, on the CPU, input unchecked."""

    def __init__(self, model: ALMRR | FusedALMRR, scan_backend: str) -> None:
        super().__init__()
        self.fused = (fuse(model) if isinstance(model, ALMRR) else copy.deepcopy(model)).cpu()
        self.fused.encoder.set_scan_backend(scan_backend)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.fused.compute(images)


def _prepare_tracing(
    model: ALMRR | FusedALMRR, flips: bool, *, scan_backend: str
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The exported function, an example of its input, and the axes that may vary."""
    example = torch.full((_TRACED_BATCH, 3, *model.image_size), 0.5)
    graph = average_flips(_Graph(model, scan_backend), flips)
    return graph, example, {INPUT: {0: torch.export.Dim("batch")}}
