"""The network run by onnxruntime or OpenVINO in place of torch, from a graph exported once."""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import hash_file, report_disk_errors, write_atomically
from almrr_pipeline.inference.export import INPUT, export_onnx
from almrr_pipeline.inference.threads import batches_at_once
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.weights_io import WEIGHTS_FILE

_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
_FORM = 1  # of the exported graph; a higher number makes graphs of earlier versions unused
_FIRST_CALL = threading.Lock()
"""OpenVINO's binding fills its tables at the first call: two threads that do so at the same time
wait for each other forever, one with the interpreter's lock and one with the table's."""


class ExportedNetwork(nn.Module):
    """A graph of `export_onnx` as a network: (B, 3, H, W) -> (B, H, W), on the CPU.

    Several threads may call it at the same time.

    Args:
        path: the ONNX file.
        runtime: onnxruntime or openvino.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        super().__init__()
        load = {"onnxruntime": _load_onnxruntime, "openvino": _load_openvino}[runtime]
        self._run = load(import_runtime(runtime), path)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map anomalies: float32 RGB in [0, 1] -> float32 in [0, 1]."""
        return torch.from_numpy(self._run(images.contiguous().numpy()))


def import_runtime(runtime: str) -> Any:  # noqa: ANN401 - a module without types
    """Import onnxruntime or OpenVINO; AlmrrError, with what installs it, if it is missing."""
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise AlmrrError(
            f"The runtime {runtime} is not installed ({error}): "
            f"pip install 'almrr-pipeline[{_EXTRAS[runtime]}]'."
        ) from error


def cached_graph(folder: Path, model: ALMRR, *, flips: bool) -> Path:
    """The ONNX graph of a model folder, exported at the first call; later ones find it.

    It is in `$XDG_CACHE_HOME/almrr-pipeline` (~/.cache by default) under the hash of the weights
    and of what else shapes the graph: the model folder, which DVC may own, stays as it is.
    """
    weights, shape = hash_file(folder / WEIGHTS_FILE), (folder / "config.json").read_text()
    key = hashlib.sha256(f"{_FORM} {weights} {shape} {flips}".encode()).hexdigest()[:32]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root, "almrr-pipeline", f"{key}.onnx")
    checksum = path.with_suffix(".sha256")  # a graph that was damaged since is exported again
    if not (path.exists() and checksum.is_file() and checksum.read_text() == hash_file(path)):
        with report_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(model, path, flips=flips)
        with write_atomically(checksum) as partial:
            partial.write_text(hash_file(path))
    return path


def _load_onnxruntime(onnxruntime: Any, path: Path) -> Callable[..., Any]:  # noqa: ANN401
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads, where they wait for work in a loop, take the cores from batches of other threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def _load_openvino(openvino: Any, path: Path) -> Callable[..., Any]:  # noqa: ANN401
    hints = {
        # float32 also where the processor has bfloat16, so that scores are those of torch.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": batches_at_once(),  # each a group of threads, which one call keeps busy
    }
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    own = threading.local()  # a request is one thread's: another's call would end in an error

    def infer(images: Any) -> Any:  # noqa: ANN401
        if not hasattr(own, "request"):
            with _FIRST_CALL:
                own.request = compiled.create_infer_request()
                return own.request.infer([images])[0].copy()
        return own.request.infer([images])[0].copy()  # overwritten by the next call

    return infer
