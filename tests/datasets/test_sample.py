from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy import ndimage

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import read_image
from almrr_pipeline.common.masks import read_mask
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.drawn_defects import DRAWINGS
from almrr_pipeline.datasets.manifest import build_manifest, count_items
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.datasets.sample import (
    CROP,
    IMAGES_PER_DEFECT_TYPE,
    LEAST_DEFECT,
    TEST_REGION,
    TRAIN_REGION,
    VALIDATION_REGION,
    VISIBLE,
    Camera,
    Sample,
    cut_surface,
    draw_camera,
    draw_defective,
    outline_difference,
    write_category,
)
from almrr_pipeline.datasets.textures import read_package_image

DATASET = Sample()
CATEGORIES = ("sample_brick", "sample_grass", "sample_gravel")


pytestmark = pytest.mark.xdist_group("sample")  # the suite is drawn once


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole suite as it is fetched, in a folder for each category."""
    root = tmp_path_factory.mktemp("data")
    for category in CATEGORIES:
        (root / category).mkdir()
        DATASET.fetch(
            category, target=root / category, request=FetchRequest(scratch=root / "scratch")
        )
    return root


@pytest.fixture(scope="module")
def gravel() -> npt.NDArray[np.float64]:
    return read_package_image("gravel.png")[..., 0] / 255.0


def test_suite_has_three_categories_and_its_dataset_is_known() -> None:
    assert DATASET.categories == CATEGORIES
    assert all(isinstance(dataset_for(category), Sample) for category in CATEGORIES)


@pytest.mark.parametrize("category", CATEGORIES)
def test_manifest_is_accepted_with_the_expected_counts(data: Path, category: str) -> None:
    items = DATASET.items(category, data / category)
    assert count_items(items) == DATASET.expected(category)
    manifest = build_manifest(items, root=data, expected=DATASET.expected(category), strict=True)
    assert set(manifest["defect_type"]) == {"good", *DRAWINGS}
    assert set(manifest["width"]) == set(manifest["height"]) == {CROP}
    assert manifest["sha256"].is_unique


def test_the_same_images_are_drawn_each_time(data: Path, tmp_path: Path) -> None:
    DATASET.fetch("sample_brick", target=tmp_path, request=FetchRequest(scratch=tmp_path))
    for path in (data / "sample_brick").rglob("*.png"):
        assert (
            path.read_bytes() == (tmp_path / path.relative_to(data / "sample_brick")).read_bytes()
        ), path


REGIONS = {"train": TRAIN_REGION, "validation": VALIDATION_REGION, "test": TEST_REGION}


def test_the_regions_are_apart_and_inside_the_photograph() -> None:
    covered = np.zeros((512, 512), int)
    for rows, columns in REGIONS.values():
        region = np.zeros((512, 512), bool)
        region[rows, columns] = True
        assert region.sum() == (rows.stop - rows.start) * (columns.stop - columns.start)
        assert min(rows.stop - rows.start, columns.stop - columns.start) >= CROP
        covered += ndimage.binary_dilation(region, iterations=4)
    assert covered.max() == 1


def test_no_pixel_is_in_the_images_of_two_splits(tmp_path: Path) -> None:
    photograph, brightnesses = (
        np.full((512, 512), 0.5),
        {"train": 0.25, "validation": 0.5, "test": 0.75},
    )
    for split, region in REGIONS.items():
        photograph[region] = brightnesses[split]
    write_category(photograph, tmp_path, seed=(0, 0))
    for item in DATASET.items("sample_brick", tmp_path):
        image, outside = read_image(item.image), np.ones((CROP, CROP), bool)
        if item.mask:
            outside = ~ndimage.binary_dilation(read_mask(item.mask), iterations=6)
        brightness = image[outside] / 255
        assert np.abs(brightness / brightnesses[item.split] - 1).max() < 0.2, item.image


@pytest.mark.parametrize("split", REGIONS)
def test_crops_reach_all_ends_of_their_region(split: str) -> None:
    places = np.arange(512.0)[:, None], np.arange(512.0)[None, :]
    for lengths, across in zip(REGIONS[split], places, strict=True):
        generator = np.random.default_rng(0)
        crops = [
            cut_surface(np.broadcast_to(across, (512, 512)), REGIONS[split], generator)
            for _ in range(1000)
        ]
        assert {crop.shape for crop in crops} == {(CROP, CROP)}
        assert min(crop.min() for crop in crops) == lengths.start
        assert max(crop.max() for crop in crops) == lengths.stop - 1


@pytest.mark.parametrize("defect", DRAWINGS)
def test_ground_truth_is_where_the_image_differs_visibly(
    defect: str, gravel: npt.NDArray[np.float64]
) -> None:
    for seed in range(4):
        image, mask = draw_defective(gravel, defect, np.random.default_rng(seed), strength=0.8)
        without = find_normal_twin(gravel, defect, seed, image)
        difference = np.abs(image.astype(float) - without)
        assert mask.sum() >= LEAST_DEFECT
        assert (
            ndimage.gaussian_filter(difference, 0.7)[~mask].max() < 4 * VISIBLE
        )  # single specks, which are left out
        assert (difference[~ndimage.binary_dilation(mask)] < VISIBLE).mean() > 0.998
        assert (ndimage.maximum_filter(difference, 5)[mask] >= VISIBLE).mean() > 0.9


def find_normal_twin(
    photograph: npt.NDArray[np.float64], defect: str, seed: int, image: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """The image that the draws of the accepted drawing give without the defect."""
    generator = np.random.default_rng(seed)
    while True:
        surface = cut_surface(photograph, TEST_REGION, generator)
        camera = draw_camera(generator)
        drawn = camera.take(np.clip(DRAWINGS[defect](surface, generator, 0.8), 0, 1))
        if np.array_equal(drawn, image):
            return camera.take(surface)


@pytest.mark.parametrize("category", CATEGORIES)
def test_defects_vary_in_size_and_contrast(data: Path, category: str) -> None:
    for defect in DRAWINGS:
        masks = [
            read_mask(path)
            for path in sorted((data / category / "ground_truth" / defect).iterdir())
        ]
        areas = np.array([mask.sum() for mask in masks])
        assert len(masks) == IMAGES_PER_DEFECT_TYPE
        assert areas.min() >= LEAST_DEFECT
        assert areas.max() < 0.25 * CROP**2
        assert areas.max() > 1.2 * areas.min(), defect


@pytest.mark.parametrize("defect", DRAWINGS)
def test_stronger_defects_stand_out_more(defect: str, gravel: npt.NDArray[np.float64]) -> None:
    surface = gravel[100 : 100 + CROP, 330 : 330 + CROP]

    def contrast(strength: float) -> float:
        seeds = range(8)
        drawn = [DRAWINGS[defect](surface, np.random.default_rng(seed), strength) for seed in seeds]
        return float(np.mean([np.abs(each - surface).sum() for each in drawn]))

    assert contrast(0.35) < contrast(0.7) < contrast(1.0)


@pytest.mark.parametrize("defect", DRAWINGS)
def test_drawing_leaves_the_surface_that_it_is_given_alone(
    defect: str, gravel: npt.NDArray[np.float64]
) -> None:
    surface = gravel[:CROP, -CROP:].copy()
    DRAWINGS[defect](surface, np.random.default_rng(0), 1.0)
    np.testing.assert_array_equal(surface, gravel[:CROP, -CROP:])


def test_outline_closes_gaps_fills_what_is_enclosed_and_leaves_out_specks() -> None:
    without = np.full((40, 40), 100, np.uint8)
    with_defect = without.copy()
    with_defect[10:21, 10:21] = 200
    with_defect[13:18, 13:18] = 100  # enclosed
    with_defect[12, 15] = 100  # a gap of one pixel
    with_defect[33, 33] = 120  # a speck
    mask = outline_difference(without, with_defect)
    assert mask[10:21, 10:21].all()
    assert not mask[25:].any()
    assert mask.sum() <= 13 * 13


def test_equal_images_have_no_outline() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8)
    assert not outline_difference(image, image).any()


def test_black_photograph_is_refused() -> None:
    with pytest.raises(AlmrrError, match="No stain could be drawn visibly"):
        draw_defective(np.zeros((512, 512)), "stain", np.random.default_rng(0), strength=1.0)


def test_camera_changes_light_slightly() -> None:
    cameras = [draw_camera(np.random.default_rng(seed)) for seed in range(50)]
    assert all(0.85 < camera.light.min() <= camera.light.max() < 1.16 for camera in cameras)
    assert all(np.abs(camera.noise).max() < 10 for camera in cameras)
    assert (
        Camera(np.full((2, 2), 2.0), np.zeros((2, 2))).take(np.full((2, 2), 0.75)).tolist()
        == [[255] * 2] * 2
    )


def test_normal_images_are_crops_of_the_photograph_under_another_light(
    data: Path, gravel: npt.NDArray[np.float64]
) -> None:
    crop = np.asarray(Image.open(data / "sample_gravel" / "train" / "good" / "000.png"), float)
    windows = np.lib.stride_tricks.sliding_window_view(gravel[TRAIN_REGION], (CROP, CROP))
    sparse = windows[:, :, ::16, ::16].reshape(*windows.shape[:2], -1)
    centerd = sparse - sparse.mean(-1, keepdims=True)
    wanted = crop[::16, ::16].ravel() - crop[::16, ::16].mean()
    scores = (centerd @ wanted) / (np.linalg.norm(centerd, axis=-1) * np.linalg.norm(wanted))
    assert scores.max() > 0.98


def test_drawing_defects_shares_no_code_with_the_anomalies_of_training() -> None:
    program = (
        "import sys, almrr_pipeline.datasets.sample;"
        "print([name for name in sys.modules if name.startswith('almrr_pipeline.synthesis')])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"
