from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import to_file
from almrr_pipeline.config import DataSettings, InferenceSettings, Tiling
from almrr_pipeline.evaluation.thresholds import conformal_threshold
from almrr_pipeline.inference.inference_config import MODEL_FILES, InferenceConfig, Thresholds
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.pipelines.train import calibrate_thresholds


def _settings(**changes: object) -> InferenceConfig:
    threshold = conformal_threshold([0.1, 0.2, 0.3], 0.25)
    values = {
        "category": "nanotwice",
        "image_size": (128, 256),
        "thresholds": Thresholds(image=threshold, pixel=threshold),
    }
    return InferenceConfig(**{**values, **changes})  # type: ignore[arg-type]


def _fill(folder: Path, settings: InferenceConfig) -> Path:
    for name in MODEL_FILES:
        (folder / name).touch()
    settings.save(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        _settings(),
        _settings(
            thresholds=None,
            tiling=Tiling(enabled=True, scale=0.5, overlap=0.5),
            smoothing=1,
            flips=True,
        ),
        _settings(
            thresholds=Thresholds(
                image=conformal_threshold([], 0.1), pixel=conformal_threshold([], 0.1)
            )
        ),
    ],
    ids=["calibrated", "uncalibrated", "nothing held out"],
)
def test_what_was_saved_is_loaded(tmp_path: Path, settings: InferenceConfig) -> None:
    assert InferenceConfig.load(_fill(tmp_path, settings)) == settings


def test_the_file_says_value_rate_and_guarantee(tmp_path: Path) -> None:
    values = json.loads((_fill(tmp_path, _settings()) / "inference.json").read_text())
    assert set(values) == {
        "category",
        "image_size",
        "tiling",
        "region",
        "smoothing",
        "flips",
        "reading",
        "thresholds",
    }
    assert values["thresholds"]["image"]["value"] == 0.3
    assert values["thresholds"]["image"]["normals"] == 3
    assert values["thresholds"]["image"]["guaranteed_rate"] == 0.25
    assert "25.00%" in values["thresholds"]["image"]["guarantee"]


def test_saving_leaves_nothing_beside(tmp_path: Path) -> None:
    _settings().save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["inference.json"]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _settings().smoothing = 3  # type: ignore[misc]


@pytest.mark.parametrize("missing", MODEL_FILES)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (_fill(tmp_path, _settings()) / missing).unlink()
    with pytest.raises(AlmrrError, match=f"no model folder: {missing} missing"):
        InferenceConfig.load(tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="nowhere does not exist"):
        InferenceConfig.load(tmp_path / "nowhere")


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(AlmrrError, match="is a file, not a folder"):
        InferenceConfig.load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "Invalid JSON"),
        ("[]", "an object"),
        ('{"category": "x", "image_size": [100, 128]}', r"image_size\.0"),
        ('{"category": "x", "image_size": [128, 128], "color": 1}', "color: Extra inputs"),
        ('{"image_size": [128, 128]}', "category: Field required"),
    ],
)
def test_wrong_content_is_explained(tmp_path: Path, content: str, complaint: str) -> None:
    (_fill(tmp_path, _settings()) / "inference.json").write_text(content)
    with pytest.raises(AlmrrError, match=complaint):
        InferenceConfig.load(tmp_path)


def test_a_model_of_version_0_1_is_refused_in_one_sentence(tmp_path: Path) -> None:
    content = '{"category": "x", "image_size": [128, 128], "mirrored": false}'
    (_fill(tmp_path, _settings()) / "inference.json").write_text(content)
    with pytest.raises(AlmrrError, match=r"is a model of almrr-pipeline 0\.1") as caught:
        InferenceConfig.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "mirrored" not in str(caught.value)


def test_weights_selected_on_the_validation_images_take_the_guarantee_away() -> None:
    with_guarantee = _settings()
    without = with_guarantee.without_guarantee()
    for name in ("image", "pixel"):
        before, after = getattr(with_guarantee.thresholds, name), getattr(without.thresholds, name)
        assert (after.value, after.guaranteed_rate) == (before.value, None)
        assert "weights were selected on the 3 normal validation images" in after.guarantee
    assert _settings(thresholds=None).without_guarantee() == _settings(thresholds=None)


@pytest.mark.parametrize("selected", [False, True], ids=["last", "validation"])
def test_thresholds_of_chosen_weights_carry_no_guarantee(
    model_folder: Path, noise_paths: list[Path], *, selected: bool
) -> None:
    manifest = pd.DataFrame(
        {
            "image": [path.name for path in noise_paths],
            "split": ["train"] * 4 + ["validation"] * 3,
            "label": "normal",
        }
    )
    chosen = {"validation_ap": [0.7]} if selected else {}
    config = calibrate_thresholds(
        ALMRR.load(model_folder),
        pd.DataFrame({"step": [1], "loss": [0.5], **chosen}),
        manifest,
        to_file(None),
        noise_paths[0].parent,
        DataSettings(image_size=(128, 128)),
        InferenceSettings(),
        "sample_brick",
    )
    assert config.thresholds is not None
    assert config.thresholds.image.normals == 3
    rates = (config.thresholds.image.guaranteed_rate, config.thresholds.pixel.guaranteed_rate)
    assert (rates[0] is None, rates[1] is None) == (selected, selected)
