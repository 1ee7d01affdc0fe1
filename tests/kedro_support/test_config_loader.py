from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.config_loader import ParamsYamlLoader, tracking_uri


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    shutil.copytree(project / "conf", tmp_path / "conf")
    shutil.copy(project / "params.yaml", tmp_path)
    return tmp_path


def _loader(folder: Path, env: str | None = None, **runtime: object) -> ParamsYamlLoader:
    resolvers = {"tracking_uri": lambda: tracking_uri(folder)}
    return ParamsYamlLoader(
        str(folder / "conf"),
        env=env,
        runtime_params=runtime,
        base_env="base",
        default_run_env="local",
        custom_resolvers=resolvers,
    )


def test_values_come_from_params_yaml(copy: Path) -> None:
    assert _loader(copy)["parameters"]["train"]["batch_size"] == 8


def test_the_working_directory_does_not_matter(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert _loader(copy)["parameters"]["suite"] == "sample"


def test_each_layer_covers_the_one_below_and_keeps_its_siblings(copy: Path) -> None:
    (copy / "conf/base/parameters.yml").write_text("train: {steps: 11, batch_size: 5}\n")
    (copy / "conf/quick").mkdir()
    (copy / "conf/quick/parameters.yml").write_text("train: {steps: 12}\n")
    base = _loader(copy)["parameters"]["train"]
    quick = _loader(copy, env="quick", train={"batch_size": 6})["parameters"]["train"]
    assert (base["steps"], base["batch_size"]) == (11, 5)
    assert (quick["steps"], quick["batch_size"]) == (12, 6)
    assert quick["optimizer"] == "adamw"


def test_each_category_has_its_own_sections(copy: Path) -> None:
    loader = _loader(copy, overrides={"sample_grass": {"train": {"steps": 7}}})
    parameters = loader["parameters"]
    assert parameters["sample_grass"]["train"]["steps"] == 7
    assert parameters["sample_brick"]["train"]["steps"] == parameters["train"]["steps"]
    assert parameters["sample_brick"]["category"] == "sample_brick"


def test_each_seed_of_a_category_has_the_sections_of_the_category(copy: Path) -> None:
    loader = _loader(copy, seeds=[3, 5], overrides={"sample_grass": {"train": {"steps": 7}}})
    grass = loader["parameters"]["sample_grass"]
    for seed in (3, 5):
        own = grass[f"seed_{seed}"]
        assert (own["category"], own["seed"]) == ("sample_grass", seed)
        assert own["train"] == grass["train"]
        assert own["train"]["steps"] == 7
    assert "seed_0" not in grass


def test_an_unknown_runtime_parameter_is_refused(copy: Path) -> None:
    with pytest.raises(AlmrrError, match=r"train\.stpes: unknown parameter"):
        _loader(copy, train={"stpes": 3})["parameters"]


def test_a_missing_params_yaml_is_named(copy: Path) -> None:
    (copy / "params.yaml").unlink()
    with pytest.raises(AlmrrError, match=r"no .*params\.yaml"):
        _loader(copy)["parameters"]


def test_mlflow_logs_to_the_project_unless_told_otherwise(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(copy) == f"sqlite:///{copy.as_posix()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking_uri(copy) == "http://localhost:5000"


def test_relative_paths_are_those_below_the_project(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    paths = {"mt_defect": "images/mt", "nanotwice": "/srv/nano"}
    data = {"paths": paths, "mirror": "http://example.org/mirror"}

    values = _loader(copy, data=data, backbone={"weights": "w.pt"})["parameters"]

    assert values["data"]["paths"] == {"mt_defect": f"{copy}/images/mt", "nanotwice": "/srv/nano"}
    assert values["data"]["mirror"] == "http://example.org/mirror"
    assert values["backbone"]["weights"] == f"{copy}/w.pt"


@pytest.mark.parametrize("content", [b"\xff", b"a: [", b"[1]", b"5", b"&a [*a]", b"a: &a [*a]"])
def test_a_broken_params_yaml_is_one_sentence(copy: Path, content: bytes) -> None:
    (copy / "params.yaml").write_bytes(content)
    with pytest.raises(AlmrrError, match=r"params\.yaml (cannot be read|holds no names)"):
        _loader(copy)["parameters"]


def test_there_is_nothing_to_deliver_without_a_project(copy: Path) -> None:
    from almrr_pipeline.kedro_support.sync import deliver_waiting

    with pytest.raises(AlmrrError, match="There is no Kedro project in"):  # no pyproject.toml
        deliver_waiting(copy)
