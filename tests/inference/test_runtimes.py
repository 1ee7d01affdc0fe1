"""Runtimes give torch's predictions, from one graph that is exported once."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference import runtimes
from almrr_pipeline.inference.predictor import Predictor


@pytest.mark.xdist_group("export")  # the fixture's graph is made once
def test_runtimes_predict_as_torch_from_one_graph(
    model_folder: Path,
    noise: list[ImageArray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    copy_onnx: mock.Mock,
) -> None:
    monkeypatch.setattr(runtimes, "export_onnx", copy_onnx)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = sorted(model_folder.iterdir())
    expected = Predictor(model_folder)(noise)
    assert np.std([p.anomaly_map.std() for p in expected]) > 0
    written = set()
    for runtime in ("onnxruntime", "openvino"):
        given = Predictor(model_folder, runtime=runtime)(noise)
        for ours, theirs in zip(given, expected, strict=True):
            np.testing.assert_allclose(ours.anomaly_map, theirs.anomaly_map, rtol=0, atol=1e-4)
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)
        written.update((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.onnx"))
    assert len(written) == 1
    (graph,) = tmp_path.rglob("*.onnx")
    graph.write_bytes(graph.read_bytes()[:-100])
    assert Predictor(model_folder, runtime="onnxruntime")(noise[:1])
    assert sorted(model_folder.iterdir()) == before


def test_a_runtime_of_the_cpu_refuses_another_device(model_folder: Path) -> None:
    with pytest.raises(AlmrrError, match="runs on the CPU, not on cuda"):
        Predictor(model_folder, runtime="openvino", device="cuda")
