from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from almrr_pipeline.config import Parameters, load_parameters, parse_parameters
from almrr_pipeline.common.errors import AlmrrError


@pytest.fixture
def values(project: Path) -> dict[str, Any]:
    return yaml.safe_load((project / "params.yaml").read_text())


def test_the_shipped_parameters_are_valid(project: Path) -> None:
    parameters = load_parameters(project / "params.yaml")
    assert parameters.suite == "sample"
    assert parameters.categories == ["sample_brick", "sample_grass", "sample_gravel"]


def test_the_shipped_parameters_name_every_parameter(values: dict[str, Any]) -> None:
    """DVC notices a change only of what params.yaml names."""
    assert _names(values) == _names(parse_parameters(values).model_dump(mode="json"))


def _names(values: dict[str, Any], prefix: str = "") -> set[str]:
    nested = [(f"{prefix}{name}", value) for name, value in values.items()]
    return {name for name, _ in nested}.union(
        *(_names(value, f"{name}.") for name, value in nested if isinstance(value, dict))
    )


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("train", "stpes", 5, "train.stpes: unknown parameter"),
        ("train", "steps", "many", "train.steps"),
        ("train", "steps", 0, "train.steps"),
        ("train", "optimizer", "sgd", "train.optimizer"),
        ("synthesis", "anomaly_free", 1.5, "synthesis.anomaly_free"),
        ("data", "image_size", [250, 256], "data.image_size"),
        ("data", "image_size", [64, 64], "data.image_size"),
        ("model", "refinement_input", "mean", "refinement_input"),
        ("threshold", "false_alarm_rate", 0.0, "threshold.false_alarm_rate"),
    ],
)
def test_a_wrong_parameter_is_named(values: dict[str, Any], section: str, name: str, value: object, said: str) -> None:
    values[section][name] = value
    with pytest.raises(AlmrrError, match=r"^params\.yaml: .*") as caught:
        parse_parameters(values)
    assert said in str(caught.value)


def test_a_category_named_twice_is_refused(values: dict[str, Any]) -> None:
    values["categories"] = ["nanotwice", "nanotwice"]
    with pytest.raises(AlmrrError, match="named twice"):
        parse_parameters(values)


def test_no_category_at_all_is_refused(values: dict[str, Any]) -> None:
    values["categories"] = []
    with pytest.raises(AlmrrError, match="categories"):
        parse_parameters(values)


def test_overrides_hold_for_their_category_alone(values: dict[str, Any]) -> None:
    values["overrides"] = {"sample_grass": {"train": {"steps": 7}, "data": {"tiling": {"enabled": True}}}}
    parameters = parse_parameters(values)
    assert parameters.for_category("sample_grass").train.steps == 7
    assert parameters.for_category("sample_grass").data.tiling.enabled
    assert parameters.for_category("sample_grass").data.tiling.overlap == parameters.data.tiling.overlap
    assert parameters.for_category("sample_brick") == parameters


def test_a_seed_in_the_name_repeats_a_category_with_its_overrides(values: dict[str, Any]) -> None:
    values["categories"] = ["nanotwice", "nanotwice_seed3"]
    values["overrides"] = {"nanotwice": {"train": {"steps": 7}}}
    parameters = parse_parameters(values)
    assert parameters.for_category("nanotwice").seed == 0
    assert parameters.for_category("nanotwice_seed3").seed == 3
    assert parameters.for_category("nanotwice_seed3").train.steps == 7


@pytest.mark.parametrize("section", ["trian", "backbone"])
def test_an_override_of_what_cannot_differ_is_refused(values: dict[str, Any], section: str) -> None:
    """Categories share one backbone's weights, so it cannot be overridden for one of them."""
    values["overrides"] = {"sample_grass": {section: {"name": "resnet18"}}}
    with pytest.raises(AlmrrError, match=rf"overrides\.sample_grass\.{section}"):
        parse_parameters(values)


@pytest.mark.parametrize(
    ("section", "name", "value"), [("data", "mirror", "/mnt"), ("data", "strict", True), ("report", "title", "Mine")]
)
def test_an_override_without_effect_is_refused(values: dict[str, Any], section: str, name: str, value: object) -> None:
    values["overrides"] = {"sample_grass": {section: {name: value}}}
    with pytest.raises(AlmrrError, match=rf"overrides\.sample_grass\.{section}\.{name}: .* may differ"):
        parse_parameters(values)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("data", {"image_size": [128, 128], "tiling": {"enabled": True}, "calibration": 0.2}),
        ("report", {"examples": 5}),
    ],
)
def test_an_override_with_an_effect_is_taken(values: dict[str, Any], section: str, changes: dict[str, Any]) -> None:
    values["overrides"] = {"sample_grass": {section: changes}}
    own = parse_parameters(values).for_category("sample_grass").model_dump(mode="json")
    assert own[section] == values[section] | changes | (
        {"tiling": values["data"]["tiling"] | {"enabled": True}} if section == "data" else {}
    )


def test_sections_are_frozen(values: dict[str, Any]) -> None:
    parameters: Parameters = parse_parameters(values)
    with pytest.raises(ValueError, match="frozen"):
        parameters.train.steps = 3  # type: ignore[misc]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"no .*params\.yaml"):
        load_parameters(tmp_path / "params.yaml")
