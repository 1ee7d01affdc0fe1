from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import (
    RENAMED,
    Parameters,
    TrainSettings,
    load_parameters,
    parse_parameters,
)


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


def test_the_composed_defaults_are_those_of_the_sections(project: Path) -> None:
    """All values of conf/config.yaml and their order; suite and categories have no default."""
    composed = yaml.safe_load((project / "conf/config.yaml").read_text())
    assert composed.pop("defaults")[0] == "_self_"
    assert composed.pop("categories") == "???"
    defaults = Parameters(suite="any", categories=["any"]).model_dump(mode="json")
    del defaults["suite"], defaults["budget"], defaults["categories"]
    assert _leaves(composed) == _leaves(defaults)


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values in their order; as text, since True equals 1 and 1 equals 1.0."""
    leaves: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", repr(value)))
    return leaves


def _names(values: dict[str, Any], prefix: str = "") -> set[str]:
    nested = [(f"{prefix}{name}", value) for name, value in values.items()]
    return {name for name, _ in nested}.union(
        *(_names(value, f"{name}.") for name, value in nested if isinstance(value, dict))
    )


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("train", "stpes", 5, "train.stpes: unknown parameter"),
        ("train", "steps", "many", "train.steps"),
        ("train", "steps", 0, "train.steps"),
        ("train", "optimizer", "sgd", "train.optimizer"),
        ("synthesis", "anomaly_free", 1.5, "synthesis.anomaly_free"),
        ("data", "image_size", [250, 256], "data.image_size"),
        ("data", "image_size", [64, 64], "data.image_size"),
        ("model", "refinement_input", "mean", "refinement_input"),
        ("model", "residual_channels", -1, "model.residual_channels"),
        ("model", "prior", 0.0, "model.prior"),
        ("model", "prior", 1.0, "model.prior"),
        ("model", "posterior_gamma", 1.5, "neither 0 nor train.focal_gamma (2)"),
        ("inference", "false_alarm_rate", 0.0, "inference.false_alarm_rate"),
        ("synthesis", "grid_exponents", [5, 0], "synthesis.grid_exponents: 5 to 0 is no range"),
        ("synthesis", "opacity", [0.8, 0.2], "synthesis.opacity: 0.8 to 0.2 is no range"),
        ("synthesis", "materials", {"texture": 0.0}, "synthesis.materials: all weights are 0"),
    ],
)
def test_a_wrong_parameter_is_named(
    values: dict[str, Any], section: str, name: str, value: object, message: str
) -> None:
    values[section][name] = value
    with pytest.raises(AlmrrError, match=r"^params\.yaml: .*") as caught:
        parse_parameters(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_parameter_of_version_0_1_is_refused_with_its_new_name(
    values: dict[str, Any], old: str, new: str
) -> None:
    section, _, name = old.partition(".")
    if name:
        values[section][name] = "any"
    else:
        values[section] = {"any": "any"}
    with pytest.raises(AlmrrError) as caught:
        parse_parameters(values)
    assert str(caught.value) == f"params.yaml: {old}: since version 0.2 its name is {new}."


@pytest.mark.parametrize("new", RENAMED.values())
def test_the_new_name_exists(new: str) -> None:
    value: Any = Parameters(suite="any", categories=["any"])
    for name in new.partition(",")[0].split("."):
        value = getattr(value, name)


def test_selection_by_the_word_of_version_0_1_is_refused_with_the_new_one(
    values: dict[str, Any],
) -> None:
    values["train"]["selection"] = "held_out"
    with pytest.raises(AlmrrError, match=r"train\.selection: .*'validation' \(got 'held_out'\)"):
        parse_parameters(values)


@pytest.mark.parametrize(
    ("section", "name"),
    [("threshold", "false_alarm_rate"), ("data", "calibration"), ("evaluate", "mirrored")],
)
def test_an_override_of_version_0_1_is_refused_with_its_new_name(
    values: dict[str, Any], section: str, name: str
) -> None:
    values["overrides"] = {"sample_grass": {section: {name: 0.2}}}
    new = RENAMED.get(section) or RENAMED[f"{section}.{name}"]
    with pytest.raises(AlmrrError, match=f"since version 0.2 its name is {new}"):
        parse_parameters(values).for_category("sample_grass")


@pytest.mark.parametrize("name", ["categories", "seeds"])
def test_an_entry_named_twice_is_refused(values: dict[str, Any], name: str) -> None:
    values[name] = [values[name][0]] * 2
    with pytest.raises(AlmrrError, match=f"{name}: .*named twice"):
        parse_parameters(values)


@pytest.mark.parametrize("name", ["categories", "seeds"])
def test_an_empty_list_is_refused(values: dict[str, Any], name: str) -> None:
    values[name] = []
    with pytest.raises(AlmrrError, match=name):
        parse_parameters(values)


@pytest.mark.parametrize("seed", [-1, 2**32, "first"])
def test_a_seed_out_of_range_is_refused(values: dict[str, Any], seed: object) -> None:
    values["seeds"] = [0, seed]
    with pytest.raises(AlmrrError, match=r"seeds\.1"):
        parse_parameters(values)


def test_a_seed_in_a_categorys_name_is_refused_with_its_place(values: dict[str, Any]) -> None:
    values["categories"] = ["nanotwice_seed3"]
    with pytest.raises(AlmrrError, match=r"nanotwice_seed3: list its seed under seeds instead"):
        parse_parameters(values)


def test_an_own_folder_may_be_called_after_a_seed(values: dict[str, Any]) -> None:
    values["categories"] = ["folder_poppy_seed3"]
    assert parse_parameters(values).categories == ["folder_poppy_seed3"]


def test_overrides_hold_for_their_category_alone(values: dict[str, Any]) -> None:
    values["overrides"] = {
        "sample_grass": {"train": {"steps": 7}, "data": {"tiling": {"enabled": True}}}
    }
    parameters = parse_parameters(values)
    assert parameters.for_category("sample_grass").train.steps == 7
    assert parameters.for_category("sample_grass").data.tiling.enabled
    assert (
        parameters.for_category("sample_grass").data.tiling.overlap
        == parameters.data.tiling.overlap
    )
    assert parameters.for_category("sample_brick") == parameters


@pytest.mark.parametrize("section", ["trian", "backbone"])
def test_an_override_of_what_cannot_differ_is_refused(values: dict[str, Any], section: str) -> None:
    """Categories share one backbone's weights, so it cannot be overridden for one of them."""
    values["overrides"] = {"sample_grass": {section: {"name": "resnet18"}}}
    with pytest.raises(AlmrrError, match=rf"overrides\.sample_grass\.{section}"):
        parse_parameters(values)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("data", "mirror", "/mnt"), ("data", "strict", True), ("report", "title", "Mine")],
)
def test_an_override_without_effect_is_refused(
    values: dict[str, Any], section: str, name: str, value: object
) -> None:
    values["overrides"] = {"sample_grass": {section: {name: value}}}
    with pytest.raises(
        AlmrrError, match=rf"overrides\.sample_grass\.{section}\.{name}: .* may differ"
    ):
        parse_parameters(values)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (
            "data",
            {"image_size": [128, 128], "tiling": {"enabled": True}, "validation_fraction": 0.2},
        ),
        ("report", {"examples": 5}),
    ],
)
def test_an_override_with_an_effect_is_taken(
    values: dict[str, Any], section: str, changes: dict[str, Any]
) -> None:
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


def test_redacted_parameters_have_no_secrets_and_no_folders_of_this_machine(
    values: dict[str, Any],
) -> None:
    values["data"]["mirror"] = "https://me:secret@example.org/mirror?token=secret"
    values["data"]["paths"] = {"nanotwice": "/home/me/private/nanotwice.zip"}
    values["data"]["addresses"] = {
        "mt_defect": ["https://me:secret@example.org/mt.zip", "/home/me/mt"]
    }
    values["backbone"]["weights"] = "C:\\home\\me\\weights.pth"
    values["predict"]["images"] = "/home/me/images"
    values["data"]["region"] = "/home/me/region.png"
    values["overrides"] = {"mt_defect": {"data": {"region": "/home/me/other.png"}}}
    redacted = parse_parameters(values).redacted()
    assert redacted["data"]["mirror"] == "https://example.org/mirror?..."
    assert redacted["data"]["paths"] == {"nanotwice": "nanotwice.zip"}
    assert redacted["data"]["addresses"] == {"mt_defect": ["https://example.org/mt.zip", "mt"]}
    assert redacted["backbone"]["weights"] == "weights.pth"
    assert redacted["predict"]["images"] == "images"
    assert redacted["data"]["region"] == "region.png"
    assert redacted["overrides"] == {"mt_defect": {"data": {"region": "other.png"}}}
    assert "secret" not in str(redacted)
    assert "home" not in str(redacted)


def test_redaction_leaves_all_else_as_it_is(values: dict[str, Any]) -> None:
    parameters = parse_parameters(values)
    assert parameters.redacted() == parameters.model_dump(mode="json", exclude={"scale"})


@pytest.mark.parametrize(
    ("per_image", "images", "steps"),
    [(0.0, 10, 1600), (2.0, 10, 400), (2.0, 300, 600), (2.5, 301, 752), (2.0, 5000, 1600)],
)
def test_steps_may_follow_the_number_of_images(per_image: float, images: int, steps: int) -> None:
    settings = TrainSettings(steps=1600, steps_per_image=per_image, batch_size=4)
    assert settings.for_images(images) == settings.model_copy(update={"steps": steps})


def test_fewer_steps_than_the_least_are_what_was_asked_for() -> None:
    assert TrainSettings(steps=5, steps_per_image=2.0).for_images(100).steps == 5


def test_a_region_is_a_path_below_the_project_or_polygons(values: dict[str, Any]) -> None:
    square = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]
    values["data"]["region"] = "region.png"
    values["overrides"] = {
        "a": {"data": {"region": "a.png"}},
        "b": {"data": {"region": [square]}},
        "c": {"data": {"region": None}},
    }
    parameters = parse_parameters(values).anchored(Path("/root"))
    regions = {name: parameters.for_category(name).data.region for name in "abcd"}
    corners = tuple(map(tuple, square))
    root = Path("/root")
    expected = {"a": str(root / "a.png"), "b": (corners,), "c": None, "d": str(root / "region.png")}
    assert regions == expected
    for wrong in (square, [square[:2]], [[*square, [1.2, 0.0]]], 7):
        values["data"]["region"] = wrong
        with pytest.raises(AlmrrError, match=r"data\.region: neither the path of an image nor"):
            parse_parameters(values)
