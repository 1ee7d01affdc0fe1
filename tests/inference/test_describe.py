from __future__ import annotations

from pathlib import Path

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.describe import count_parameters, describe_model
from almrr_pipeline.model.almrr import ALMRR


def test_counted_parameters_are_those_of_the_network(model_folder: Path) -> None:
    model = ALMRR.load(model_folder)
    counts = count_parameters(model_folder)
    assert counts["backbone (frozen)"] == sum(
        parameter.numel() for parameter in model.backbone.parameters()
    )
    trained = counts["reconstruction (MFRM)"] + counts["refinement (FRM)"]
    assert trained == sum(parameter.numel() for parameter in model.trainable_parameters())


def test_description_says_what_the_model_is(model_folder: Path) -> None:
    text = describe_model(model_folder)
    for words in (
        "sample_brick",
        "test_resnet",
        "128 x 128",
        "resized",
        "9 x 9",
        "0.5 (",
        "at most 5.00%",
        "19 normal validation images",
    ):
        assert words in text


def test_description_says_how_images_are_cut(tiling_model_folder: Path) -> None:
    assert "overlap by 25%" in describe_model(tiling_model_folder)


def test_description_says_that_maps_are_means_over_flips(
    model_folder: Path, flips_model_folder: Path
) -> None:
    assert "three flips" in describe_model(flips_model_folder)
    assert "three flips" not in describe_model(model_folder)


def test_description_says_that_there_is_no_threshold(uncalibrated_folder: Path) -> None:
    assert describe_model(uncalibrated_folder).count("never calibrated") == 2


def test_damaged_weights_are_named(tmp_path: Path, model_folder: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:100] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(AlmrrError, match=r"model\.safetensors cannot be read"):
        describe_model(tmp_path)
