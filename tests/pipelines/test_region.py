"""A region of interest, from a folder of images to thresholds, metrics and verdicts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import Region, draw_region, from_file, to_file
from almrr_pipeline.config import (
    BackboneSettings,
    DataSettings,
    EvaluateSettings,
    InferenceSettings,
    ModelSettings,
    SynthesisSettings,
    TrainSettings,
)
from almrr_pipeline.datasets.doctor import examine
from almrr_pipeline.evaluation.maps import AnomalyMaps
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.pipelines.evaluate import compute_metrics, open_test_set, score_images
from almrr_pipeline.pipelines.fetch import list_images
from almrr_pipeline.pipelines.synthesize import simulate_anomalies
from almrr_pipeline.pipelines.train import calibrate_thresholds, fit_model, save_model
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet

CATEGORY = "folder_parts"
SIDE = 150
CORNERS = [(0.2, 0.2), (0.8, 0.3), (0.7, 0.9), (0.1, 0.7)]
INSIDE, OUTSIDE = (slice(60, 90), slice(60, 90)), (slice(0, 25), slice(60, 90))
TINY = ModelSettings(
    latent=16, dim=16, depth=1, state=4, decoder=(16, 16), refinement_width=4, memory_size=8,
    memory_exponent=2.0, standardize=True,
)  # fmt: skip
SEED, INFERENCE = 0, InferenceSettings(scan_backend="torch", false_alarm_rate=0.2)


def _draw(generator: np.random.Generator, *spots: tuple[slice, slice]) -> ImageArray:
    image = generator.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    for spot in spots:
        image[spot] = (250, 20, 20)
    return image


@dataclass(frozen=True)
class Trained:
    """What the stages have made of a folder of images."""

    root: Path
    data: DataSettings
    manifest: pd.DataFrame
    region: Region
    synthetic_set: SyntheticSet
    model: Path


def _write_folder(root: Path) -> None:
    generator = np.random.default_rng(0)
    for name, spots in {
        **{f"train/good/{k}": () for k in range(10)},
        **{f"test/good/{k}": () for k in range(2)},
        "test/spot/inside": (INSIDE,),
        "test/spot/both": (INSIDE, OUTSIDE),
        "test/spot/outside": (OUTSIDE,),
    }.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_draw(generator, *spots)).save(path)
        if spots:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for spot in spots:
                mask[spot] = 255
            path = root / f"ground_truth/spot/{path.stem}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)


def _train(root: Path, data: DataSettings, manifest: pd.DataFrame | None = None) -> Trained:
    """The stages' own functions, one after the other."""
    if manifest is None:
        manifest, region_file = list_images(CATEGORY, root / CATEGORY, root, data)
    else:
        region_file = to_file(draw_region([CORNERS], (SIDE, SIDE)))
    textures = root / "textures"
    textures.mkdir(exist_ok=True)
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(textures / "a.png")
    synthesis = SynthesisSettings.model_validate(
        {"samples": 12, "anomaly_free": 0.2, "workers": 1, "shapes": {"line": 1.0, "band": 1.0}}
    )
    scratch = root / "scratch"
    folder = simulate_anomalies(
        manifest, region_file, textures, root, data, synthesis, SEED, scratch
    )
    synthetic_set = SyntheticSet.load(folder)
    torch.manual_seed(SEED)
    backbone = build_backbone(BackboneSettings(name="test_resnet"), weights=None)
    network = ALMRR(backbone, TINY, image_size=data.image_size, scan_backend="torch")
    (root / "backbone.json").write_text("{}")
    settings = TrainSettings(steps=3, batch_size=4, accelerator="cpu", devices=1, log_every=1)
    trained, history = fit_model(
        network, synthetic_set, manifest, root, settings, CATEGORY, SEED, scratch
    )
    config = calibrate_thresholds(
        trained, history, manifest, region_file, root, data, INFERENCE, CATEGORY
    )
    model = save_model(trained, history, config, scratch)
    region = from_file(region_file)
    assert region is not None
    return Trained(root, data, manifest, region, synthetic_set, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("region")
    _write_folder(root / CATEGORY)
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["whole images", "tiles"])
def trained(request: pytest.FixtureRequest, folder: Path) -> Trained:
    values = {"image_size": (128, 128), "region": [CORNERS], "tiling": {"enabled": request.param}}
    return _train(folder, DataSettings.model_validate(values | {"validation_fraction": 0.4}))


@pytest.mark.parametrize(
    ("region", "match"),
    [
        ("there_is_none.png", "data.region: There is no image at there_is_none.png; check the"),
        ("black.png", "data.region: next to nothing of the images would count; white is"),
        (
            "wide.png",
            r"data.region: \S+wide.png is 200 x 100 pixels, and the images are 150 x 150;",
        ),
        ([[(0.1, 0.1)] * 3], "next to nothing .* corners are fractions"),
    ],
)
def test_a_region_that_cannot_be_is_one_sentence(
    folder: Path, tmp_path: Path, region: Any, match: str
) -> None:
    for name, value, size in (("black.png", 0, (150, 150)), ("wide.png", 255, (200, 100))):
        Image.new("L", size, value).save(tmp_path / name)
    if isinstance(region, str) and (tmp_path / region).is_file():
        region = str(tmp_path / region)
    data = DataSettings(region=region)
    with pytest.raises(AlmrrError, match=match) as refused:
        list_images(CATEGORY, folder / CATEGORY, folder, data)
    assert str(refused.value).count(". ") == 0
    diagnosis = examine(folder / CATEGORY, data)
    assert [f.text for f in diagnosis.findings if f.level == "error"] == [str(refused.value)[:-1]]


def test_the_check_says_what_counts_and_whose_defects_do_not(folder: Path) -> None:
    diagnosis = examine(folder / CATEGORY, DataSettings(region=[CORNERS]))
    assert not diagnosis.has_errors
    assert any(re.fullmatch(r"  region +3\d\.\d% of an image counts", x) for x in diagnosis.lines())
    assert any(
        f.text.startswith("ground_truth/spot/outside_mask.png: all of its defects are outside")
        for f in diagnosis.findings
    )


def test_an_image_with_all_of_its_defects_outside_is_normal(trained: Trained) -> None:
    rows = trained.manifest.set_index("image")
    label = {Path(name).stem: row["label"] for name, row in rows.iterrows() if "spot" in name}
    assert label == {"inside": "defective", "both": "defective", "outside": "normal"}


def test_simulated_anomalies_are_inside(trained: Trained) -> None:
    made, blank = trained.synthetic_set, np.array([124, 116, 104])
    counted = (made.normals != blank).any(axis=-1)
    fraction = counted.mean(axis=(1, 2))
    assert bool((fraction > 0).all())
    assert bool((fraction < 1).any())
    if not trained.data.tiling.enabled:
        assert fraction == pytest.approx(trained.region.fraction, abs=0.01)
    masks = np.asarray(made.masks, dtype=bool)
    assert masks.any(axis=(1, 2)).sum() >= 6
    assert not (masks & ~counted[made.normal_index]).any()
    changed = (made.augmented != made.normals[made.normal_index]).any(axis=-1)
    assert not (changed & ~counted[made.normal_index]).any()


def test_a_defect_outside_changes_no_score_and_no_map(trained: Trained) -> None:
    generator = np.random.default_rng(5)
    image = _draw(generator)
    other = np.where(trained.region.at((SIDE, SIDE))[..., None], image, 255 - image)
    other[OUTSIDE] = (250, 20, 20)
    defective = image.copy()
    defective[INSIDE] = (250, 20, 20)
    first, second, third = Predictor(trained.model, device="cpu", scan_backend="torch")(
        [image, other, defective]
    )
    assert first.score == second.score
    np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
    assert third.score != first.score
    assert not first.anomaly_map[~trained.region.at((SIDE, SIDE))].any()
    assert first.anomaly_map[INSIDE].min() > 0


def test_what_is_outside_has_no_part_in_weights_and_thresholds(
    folder: Path, trained: Trained, tmp_path: Path
) -> None:
    if trained.data.tiling.enabled:
        pytest.skip("whole images show it")
    outside = ~trained.region.at((SIDE, SIDE))
    for path in (folder / CATEGORY / "train/good").glob("*.png"):
        image = np.array(Image.open(path))
        image[outside] = 255 - image[outside]
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target)
    # With the checksums of before, by which images are chosen for validation.
    again = _train(tmp_path, trained.data, trained.manifest)
    for name in ("model.safetensors", "inference.json"):
        assert (again.model / name).read_bytes() == (trained.model / name).read_bytes()


def test_metrics_leave_out_what_is_outside(trained: Trained, tmp_path: Path) -> None:
    tests = open_test_set(trained.model, trained.manifest, trained.root, trained.data)
    predictor = Predictor(trained.model, device="cpu", scan_backend="torch").map_predictor
    for scaled in predictor.maps(trained.root / name for name in tests.rows["image"]):
        np.save(tmp_path / f"{scaled.index:06d}.npy", scaled.anomaly_map)
    maps = AnomalyMaps.load(tmp_path)
    counted = trained.region.at(maps[0].shape)
    settings = EvaluateSettings(bootstrap=0)
    scores = score_images(maps, tests)
    metrics, _ = compute_metrics(maps, scores, tests, settings, SEED)
    counts = metrics["counts"]
    assert counts["defective_images"] == 2
    assert counts["normal_pixels"] + counts["defective_pixels"] == 5 * counted.sum()
    assert counts["regions"] == 2
    for path in tmp_path.iterdir():  # what a map holds outside does not matter
        np.save(path, np.where(counted, np.load(path), 0.99).astype(np.float32))
    again, _ = compute_metrics(maps, scores, tests, settings, SEED)
    for name in ("pixel_auroc", "pixel_ap", "aupro_30", "reliability", "defect_types"):
        assert again[name] == metrics[name]
