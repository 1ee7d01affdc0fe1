"""The installed package: what its root offers, and that it works without a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
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
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "docs/package.md", "LICENSE"):
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


RUN = """
import pathlib, runpy, sys
tests, folder, commands = sys.argv[1:]
sys.path.append(tests)
from importlib import metadata
from requirements_alone import hide_others

needs = metadata.Distribution.at(next(pathlib.Path(folder).glob("*.dist-info"))).requires
hide_others(need for need in needs if "extra ==" not in need)
import almrr_pipeline
assert pathlib.Path(almrr_pipeline.__file__).is_relative_to(folder)
for command in commands.splitlines():
    sys.argv = ["almrr", *command.split()]
    try:
        runpy.run_module("almrr_pipeline", run_name="__main__")  # as `python -m` does
    except SystemExit as end:
        print("ended with", end.code, flush=True)
import almrr_pipeline.inference.export, almrr_pipeline.serving.server
"""
"""Commands of the unpacked wheel, with its requirements alone: no extra is there."""


def _run_installed(wheel_folder: Path, cwd: Path, commands: Sequence[str]) -> list[str]:
    """What each command printed, in a folder that is no checkout."""
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", RUN, tests, str(wheel_folder), "\n".join(commands)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(wheel_folder), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return re.split(r"(?<=ended with \d)\n", done.stdout)[:-1]


def test_the_wheel_holds_what_is_no_python(wheel_folder: Path, project: Path) -> None:
    source = project / "src" / "almrr_pipeline"
    others = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".nbi", ".nbc"}
    }
    assert others
    assert all((wheel_folder / "almrr_pipeline" / path).is_file() for path in others)


def test_without_extras_the_installed_command_predicts_and_says_what_training_needs(
    wheel_folder: Path, model_folder: Path, noise: list[ImageArray], tmp_path: Path
) -> None:
    for name in ("images/a", "own/normal/a", "own/test/good/b", "own/test/hole/c"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(noise[0]).save(path)
    predict = f"predict {model_folder} images -o results --scan-backend torch"  # not compiled
    core = ("--version", predict, "check own --html check.html")
    training = ("train parts own", "test parts", "report", "repro", "sync")
    archive = f"predict {model_folder} images -o archive --engine ray"
    said = _run_installed(wheel_folder, tmp_path, [*core, *training, archive])
    assert said[0].startswith("almrr, version ")
    assert "1 images: " in said[1]
    assert (tmp_path / "results" / "overlays" / "a.png").is_file()
    assert "hole" in said[2]
    assert (tmp_path / "check.html").is_file()
    for text in said[3:8]:
        assert re.fullmatch(
            r"Error: (dvc|kedro|psutil) is not installed, which this command needs; run: "
            r"pip install 'almrr-pipeline\[pipeline\]'\.\nended with 1",
            text,
        )
    assert "almrr-pipeline[ray]" in said[8]
    assert len(said) == 9


def test_the_page_of_a_package_index_has_no_relative_link(project: Path) -> None:
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (project / metadata["readme"]).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text) + list(metadata["urls"].values())
    assert links
    assert all(link.startswith("https://") for link in links)
    rows = re.findall(r"^\| (`[^|]+)\|", text, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert {"pipeline", "onnx", "ray"} <= named <= set(metadata["optional-dependencies"])
