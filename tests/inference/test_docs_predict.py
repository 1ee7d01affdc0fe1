from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from almrr_pipeline.cli import almrr
from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.inference import export
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.inference.tiling import TileGrid


@pytest.fixture
def workplace(
    model_folder: Path, noise: list[ImageArray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A model folder and photographs below the working directory, as in docs/predict.md."""
    shutil.copytree(model_folder, tmp_path / "data" / "06_models" / "sample_brick" / "seed_0")
    (tmp_path / "photographs").mkdir()
    for name, image in zip("ab", noise, strict=False):
        Image.fromarray(image).save(tmp_path / "photographs" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _documentation(project: Path) -> str:
    return (project / "docs" / "predict.md").read_text(encoding="utf-8")


def _python(project: Path, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", _documentation(project), flags=re.DOTALL)
    (code,) = [block for block in blocks if containing in block]
    return code


def test_the_documented_predictor_code_runs(
    workplace: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(_python(project, "predictor.stream"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a.png", "b.png"]


@pytest.mark.xdist_group("export")  # the fixture's graph is made once
def test_the_documented_onnx_code_gives_the_predictors_score(
    workplace: Path, project: Path, monkeypatch: pytest.MonkeyPatch, copy_onnx: mock.Mock
) -> None:
    monkeypatch.setattr(export, "export_onnx", copy_onnx)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX is an extra")
    folder = workplace / "data" / "06_models" / "sample_brick" / "seed_0"
    (command,) = re.findall(
        r"^    almrr (export .* --format onnx .*)$", _documentation(project), flags=re.MULTILINE
    )
    result = CliRunner().invoke(almrr, shlex.split(command))
    assert result.exit_code == 0, result.output
    names: dict[str, object] = {}
    exec(_python(project, "onnxruntime"), names)
    (expected,) = Predictor(folder, device="cpu")([workplace / "photographs" / "a.png"])
    assert names["score"] == pytest.approx(expected.score, abs=1e-4)


def test_the_documented_number_of_tiles_is_right() -> None:
    assert len(TileGrid((3000, 4096), tile=(256, 256), overlap=0.25)) == 336


def test_the_documented_spread_of_the_real_rate_is_right() -> None:
    """The real rate of a threshold follows Beta(n + 1 - k, k); simulated with uniform scores."""
    generator = np.random.default_rng(0)
    real = 1 - np.sort(generator.random((20_000, 20)), axis=1)[:, 19]  # rank ceil(21 x 0.95) = 20
    assert real.mean() == pytest.approx(0.05, abs=0.003)
    assert real.std() == pytest.approx(np.sqrt(0.05 * 0.95 / 20), abs=0.005)
