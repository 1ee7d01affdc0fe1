"""The installed package: what its root offers, and that it works without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import almrr_pipeline
from almrr_pipeline.common.arrays import ImageArray


def test_the_root_offers_what_a_notebook_needs() -> None:
    from almrr_pipeline import ALMRR, Prediction, Predictor, __version__
    from almrr_pipeline.inference import predictor
    from almrr_pipeline.model import almrr

    assert (ALMRR, Prediction, Predictor) == (
        almrr.ALMRR,
        predictor.Prediction,
        predictor.Predictor,
    )
    assert __version__[0].isdigit()
    assert set(almrr_pipeline.__all__) <= set(dir(almrr_pipeline))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Picture'"):
        almrr_pipeline.Picture  # noqa: B018


def test_importing_the_root_imports_no_torch() -> None:
    code = "import sys, almrr_pipeline; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def wheel_folder(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, unpacked: what `pip install` would put into site-packages."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building in the checkout would leave build/ there
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((project / name).read_bytes())
    files = [path for path in (project / "src" / "almrr_pipeline").rglob("*") if path.is_file()]
    for path in files:
        if "__pycache__" not in path.parts:
            target = source / path.relative_to(project)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def _run_installed(wheel_folder: Path, cwd: Path, *arguments: str) -> str:
    """Run `almrr` from the unpacked wheel, in a folder that is no checkout."""
    code = (
        "import almrr_pipeline, pathlib, runpy, sys; "
        "assert pathlib.Path(almrr_pipeline.__file__).is_relative_to(sys.argv.pop(1)); "
        "runpy.run_module('almrr_pipeline', run_name='__main__')"  # as `python -m` does
    )
    command = [sys.executable, "-c", code, str(wheel_folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_is_no_python(wheel_folder: Path, project: Path) -> None:
    source = project / "src" / "almrr_pipeline"
    others = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".nbi", ".nbc"}
    }
    assert others
    assert all((wheel_folder / "almrr_pipeline" / path).is_file() for path in others)


def test_the_installed_command_predicts_outside_a_checkout(
    wheel_folder: Path, model_folder: Path, noise: list[ImageArray], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(noise[0]).save(tmp_path / "images" / "a.png")
    assert "Usage: almrr" in _run_installed(wheel_folder, tmp_path, "--help")
    arguments = ("predict", str(model_folder), "images", "-o", "results")
    assert "1 images: " in _run_installed(wheel_folder, tmp_path, *arguments)
    assert (tmp_path / "results" / "overlays" / "a.png").is_file()
