"""What `almrr train` refuses, before DVC is started; tests/test_project.py has the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from almrr_pipeline.cli import almrr
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.own_data.runs import evaluate_surface, make_report, train_surface
from almrr_pipeline.own_data.surface import Surface, add_surface


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    shutil.copytree(project / "conf", tmp_path / "conf")
    shutil.copy(project / "params.yaml", tmp_path)
    return tmp_path


def _refused(project: Path, name: str, *arguments: object, **options: bool) -> str:
    """The sentence of a training that does not begin; nothing was written."""
    before = {path: path.read_bytes() for path in project.rglob("*.yaml")}
    with pytest.raises(AlmrrError) as raised:
        list(train_surface(project, name, *arguments, **options))  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in project.rglob("*.yaml")} == before
    return str(raised.value)


def test_a_wrong_path_or_an_unknown_name_is_refused(copy: Path) -> None:
    assert "prats; correct the path" in _refused(copy, "parts", copy / "prats")
    assert "name the folder of its images too" in _refused(copy, "parts", None)
    assert "letters, digits" in _refused(copy, "my parts", copy / "parts")


def test_a_folder_that_the_check_refuses_is_not_trained_on(copy: Path) -> None:
    (copy / "parts/test/scratch").mkdir(parents=True)
    image = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(image).save(copy / "parts/test/scratch/0.png")
    assert _refused(copy, "parts", copy / "parts").startswith("parts: there is neither a folder")


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a/b", "a\nb", "\udcff", "x" * 61, "folder_", "."]
)
def test_what_is_no_name_is_refused(copy: Path, name: str) -> None:
    for arguments in (("train", name, "parts"), ("train", name), ("test", name)):
        assert "is no name; take up to 60 letters" in _error(copy, *arguments)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.steps=nan", "train.steps: Input should be a valid integer"),
        ("train.steps=-1", "train.steps: Input should be greater than or equal to 1"),
        ("train.steps=&a [*a]", "what follows the = is not YAML"),
        ("train.steps=2024-99-99", "what follows the = is not YAML"),
        ("train.steps=!!python/object:os.system x", "what follows the = is not YAML"),
        ("train.steps=\udcff", "what follows the = is not YAML"),
        ("train.steps.x=1", "train.steps: Input should be a valid integer"),
        ("data.value_range=[5,1]", "black is smaller than white"),
        ("data.value_range=[.nan,1]", "data.value_range.0: Input should be a finite number"),
        ("data.image_size=[7,7]", "Input should be a multiple of 16"),
        ("model.dim=1000000000", "model.dim: Input should be less than"),
        ("+data.paths.folder_x=/srv/Prüfling 7", "data.paths: not among what may differ"),
        ("seeds=[1]", "write one as train.steps=500"),
    ],
)
def test_a_value_that_is_none_is_refused(copy: Path, assignment: str, said: str) -> None:
    (copy / "parts/normal").mkdir(parents=True)
    Image.new("L", (32, 32)).save(copy / "parts/normal/0.png")
    assert said in _error(copy, "train", "parts", "parts", "-S", assignment)
    assert not (copy / "conf/suite/own.yaml").exists()


@pytest.mark.parametrize(
    "content", [b"\xff", b"a: [", b"[1]", b"5", b"&a [*a]", b"a: &a [*a]", b"{}"]
)
def test_a_broken_params_yaml_is_one_sentence(copy: Path, content: bytes) -> None:
    (copy / "params.yaml").write_bytes(content)
    for arguments in (("report",), ("test", "sample_brick"), ("train", "parts", "parts")):
        assert "params.yaml" in _error(copy, *arguments)


def _error(folder: Path, *arguments: str) -> str:
    """The sentence that a command in a project ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(almrr, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    return result.stderr


def test_other_settings_of_a_known_name_are_listed(copy: Path) -> None:
    add_surface(copy, Surface("parts", "parts", {"train": {"steps": 5}}))
    said = _refused(copy, "parts", copy / "others", ["train.steps=6"])
    assert "folder: parts -> others; train.steps: 5 -> 6" in said
    assert "--change" in said


def test_no_report_is_made_while_a_category_has_no_results(copy: Path) -> None:
    (line,) = make_report(copy)
    assert line.startswith("No report: sample_brick, sample_grass, sample_gravel has no results")


def test_an_unknown_category_is_answered_with_those_known(copy: Path) -> None:
    with pytest.raises(AlmrrError, match=r"no category parts; params\.yaml has sample_"):
        list(evaluate_surface(copy, "parts"))


def test_outside_of_a_project_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(almrr, ["report"])
    assert result.exit_code == 1
    assert "There is no params.yaml here" in result.output
