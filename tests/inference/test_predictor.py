from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.transform import resize
from torch import Tensor, nn

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import resize_image
from almrr_pipeline.config import InferenceSettings, Tiling
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import MapPredictor, resolve_device
from almrr_pipeline.inference.predictor import Predictor, image_score
from almrr_pipeline.inference.threads import batches_at_once
from almrr_pipeline.model.almrr import ALMRR

WHOLE = Tiling()
TILES = Tiling(enabled=True, overlap=0.25)


def _predictor(
    model: nn.Module,
    *,
    image_size: tuple[int, int] = (32, 48),
    tiling: Tiling = WHOLE,
    batch_size: int = 4,
) -> MapPredictor:
    return MapPredictor(model, image_size, tiling, batch_size, torch.device("cpu"))


def _maps(
    model: nn.Module, images: list, *, at: Literal["network", "image"] = "network", **changes: Any
) -> list[np.ndarray]:
    found = list(_predictor(model, **changes).maps(images))
    assert [one.index for one in found] == list(range(len(images)))
    return [one.anomaly_map if at == "network" else one.at_image_size() for one in found]


# --- maps ---


def test_without_tiling_the_map_is_that_of_the_resized_image(
    brightness: nn.Module, noise: list[ImageArray]
) -> None:
    for image, found in zip(noise, _maps(brightness, noise), strict=True):
        np.testing.assert_allclose(found, resize_image(image, (32, 48))[..., 0] / 255, atol=1e-6)


def test_with_tiling_the_map_has_the_images_own_resolution(
    brightness: nn.Module, noise: list[ImageArray]
) -> None:
    for image, found in zip(noise, _maps(brightness, noise, tiling=TILES), strict=True):
        np.testing.assert_allclose(found, image[..., 0] / 255, atol=1e-6)


def test_tiling_scales_first(brightness: nn.Module, noise: list[ImageArray]) -> None:
    tiling = Tiling(enabled=True, scale=0.5)
    for image, found in zip(noise, _maps(brightness, noise, tiling=tiling), strict=True):
        size = (max(1, round(image.shape[0] / 2)), max(1, round(image.shape[1] / 2)))
        np.testing.assert_allclose(found, resize_image(image, size)[..., 0] / 255, atol=1e-6)


@pytest.mark.parametrize(
    "tiling", [WHOLE, TILES, Tiling(enabled=True, scale=0.3)], ids=["whole", "tiles", "scaled"]
)
def test_at_image_maps_have_the_images_own_size(
    brightness: nn.Module, noise: list[ImageArray], tiling: Tiling
) -> None:
    found = _maps(brightness, noise, tiling=tiling, at="image")
    assert [anomaly_map.shape for anomaly_map in found] == [image.shape[:2] for image in noise]
    assert all(anomaly_map.dtype == np.float32 for anomaly_map in found)
    assert all(anomaly_map.min() >= 0 and anomaly_map.max() <= 1 for anomaly_map in found)


def test_a_map_is_enlarged_bilinearly_with_pixel_centers_aligned(brightness: nn.Module) -> None:
    image = np.random.default_rng(0).integers(0, 256, size=(64, 96, 3), dtype=np.uint8)
    small = resize_image(image, (32, 48))[..., 0] / 255
    (found,) = _maps(brightness, [image], at="image")
    np.testing.assert_allclose(found, resize(small, (64, 96), order=1, mode="edge"), atol=1e-5)


def test_the_maximum_never_rises_when_a_map_is_resized(
    brightness: nn.Module, noise: list[ImageArray]
) -> None:
    pairs = zip(
        _maps(brightness, noise, at="network"), _maps(brightness, noise, at="image"), strict=True
    )
    assert all(own.max() <= network.max() for network, own in pairs)


def test_tiles_of_different_images_share_batches(brightness: nn.Module) -> None:
    images = [np.zeros((32, 80, 3), dtype=np.uint8)] * 3  # two tiles each
    _maps(brightness, images, tiling=TILES, batch_size=4)
    assert brightness.batches == [4, 2]


def test_paths_and_arrays_give_the_same(
    brightness: nn.Module, noise: list[ImageArray], noise_paths: list[Path]
) -> None:
    for from_path, from_array in zip(
        _maps(brightness, noise_paths), _maps(brightness, noise), strict=True
    ):
        np.testing.assert_array_equal(from_path, from_array)


def test_images_are_drawn_only_a_little_ahead(brightness: nn.Module) -> None:
    drawn = []

    def draw() -> Iterator[ImageArray]:
        for position in range(1000):
            drawn.append(position)
            yield np.zeros((40, 40, 3), dtype=np.uint8)

    maps = _predictor(brightness, batch_size=2).maps(draw())
    next(maps)
    mapped = 1 + batches_at_once()  # a batch, and those that are mapped meanwhile
    assert len(drawn) <= 2 * mapped + 2 * 2 + 1  # and two batches ahead
    maps.close()


def test_decoding_does_not_happen_in_the_callers_thread(
    brightness: nn.Module, noise_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = set()
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        readers.add(threading.get_ident())
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    _maps(brightness, noise_paths)
    assert readers
    assert threading.get_ident() not in readers


def test_inference_mode_does_not_leak_out(brightness: nn.Module, noise: list[ImageArray]) -> None:
    for _ in _predictor(brightness, batch_size=2).maps(noise):
        assert not torch.is_inference_mode_enabled()


def test_no_images_give_no_maps(brightness: nn.Module) -> None:
    assert _maps(brightness, []) == []


def test_a_model_in_training_mode_is_refused(
    brightness: nn.Module, noise: list[ImageArray]
) -> None:
    with pytest.raises(ValueError, match="training mode"):
        _maps(brightness.train(), noise)


def test_a_broken_model_is_noticed(noise: list[ImageArray]) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0] / 0

    with pytest.raises(AlmrrError, match="not finite"):
        _maps(Broken().eval(), noise)


def test_too_large_a_batch_is_named(noise: list[ImageArray]) -> None:
    class Greedy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(
        AlmrrError, match="batch of 4 does not fit into cpu's memory; lower the batch size"
    ):
        _maps(Greedy().eval(), noise)


def test_a_batch_holds_at_least_one(brightness: nn.Module, noise: list[ImageArray]) -> None:
    with pytest.raises(AlmrrError, match="batch size is 0"):
        _maps(brightness, noise, batch_size=0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 3), dtype=np.float32),
        np.zeros((40, 40), dtype=np.uint8),
        np.zeros((40, 40, 4), dtype=np.uint8),
        np.zeros((3, 40, 40), dtype=np.uint8),
        np.zeros((0, 40, 3), dtype=np.uint8),
    ],
    ids=["float", "gray", "alpha", "channels first", "empty"],
)
def test_arrays_that_are_no_images_are_refused(brightness: nn.Module, image: np.ndarray) -> None:
    fine = np.zeros((40, 40, 3), dtype=np.uint8)
    with pytest.raises(AlmrrError, match=r"Image 1 .*uint8 with shape \(rows, columns, 3\)"):
        _maps(brightness, [fine, image])


def test_one_image_must_stand_in_a_list(brightness: nn.Module) -> None:
    for lone in (np.zeros((40, 40, 3), dtype=np.uint8), Path("a.png"), "a.png"):
        with pytest.raises(AlmrrError, match="put it into a list"):
            _maps(brightness, lone)  # type: ignore[arg-type]


def test_an_unreadable_image_is_named_in_its_turn(
    brightness: nn.Module, noise_paths: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    maps = _predictor(brightness, batch_size=8).maps([noise_paths[0], text])
    assert next(maps).anomaly_map.shape == (32, 48)
    with pytest.raises(AlmrrError, match=r"text\.png"):
        next(maps)


# --- score ---


def _slow_score(anomaly_map: np.ndarray, side: int) -> float:
    """The definition, pixel by pixel, for odd sides."""
    reach = side // 2
    rows, columns = anomaly_map.shape
    means = [
        anomaly_map[max(0, r - reach) : r + reach + 1, max(0, c - reach) : c + reach + 1]
        .astype(np.float64)
        .mean()
        for r in range(rows)
        for c in range(columns)
    ]
    return float(max(means))


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([1, 3, 5, 9, 31]),
    st.integers(0, 9),
)
def test_score_is_the_largest_mean_of_a_window(size: tuple[int, int], side: int, seed: int) -> None:
    anomaly_map = np.random.default_rng(seed).random(size, dtype=np.float32)
    assert image_score(anomaly_map, side) == pytest.approx(
        _slow_score(anomaly_map, side), abs=1e-12
    )


def test_score_by_hand() -> None:
    anomaly_map = np.zeros((20, 20), dtype=np.float32)
    anomaly_map[10, 10] = 0.9
    assert image_score(anomaly_map, 3) == pytest.approx(0.1)  # one of nine pixels
    anomaly_map = np.zeros((20, 20), dtype=np.float32)
    anomaly_map[0, 0] = 0.8
    assert image_score(anomaly_map, 3) == pytest.approx(0.2)  # in the corner, one of four


def test_score_of_a_constant_map_is_the_constant_up_to_the_border() -> None:
    for side in (1, 2, 9, 64):
        assert image_score(np.full((16, 24), 0.25, dtype=np.float32), side) == pytest.approx(
            0.25, abs=1e-12
        )


# --- device ---


def test_auto_takes_cuda_or_else_the_cpu() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu:7", "hpu", "meta", ""])
def test_an_absent_device_is_named(name: str) -> None:
    with pytest.raises(AlmrrError, match=f"device {name!r} cannot be used"):
        resolve_device(name)


# --- predictor ---


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(model_folder, device="cpu")


def test_predictions_have_the_images_sizes_and_follow_the_definition(
    predictor: Predictor, model_folder: Path, noise: list[ImageArray]
) -> None:
    model = ALMRR.load(model_folder)
    network_maps = _maps(model, noise, image_size=(128, 128))
    for image, network_map, found in zip(noise, network_maps, predictor(noise), strict=True):
        assert found.anomaly_map.shape == image.shape[:2]
        assert found.score == pytest.approx(image_score(network_map, 9), abs=1e-4)
        assert found.is_anomalous is (found.score > 0.5)


def test_maps_are_those_that_the_scores_are_taken_from(
    predictor: Predictor, noise: list[ImageArray]
) -> None:
    scores = [image_score(one.anomaly_map, 9) for one in predictor.map_predictor.maps(noise)]
    assert scores == pytest.approx([found.score for found in predictor(noise)], abs=1e-6)


@pytest.mark.parametrize("folder", ["model_folder", "tiling_model_folder"])
def test_company_in_a_batch_changes_nothing(
    folder: str, noise: list[ImageArray], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    together = Predictor(path, device="cpu", batch_size=3)(noise)
    alone = Predictor(path, device="cpu", batch_size=1)
    for image, found in zip(noise, together, strict=True):
        (single,) = alone([image])
        np.testing.assert_allclose(found.anomaly_map, single.anomaly_map, atol=1e-5)
        assert found.score == pytest.approx(single.score, abs=1e-5)


def test_verdict_is_strictly_above(model_folder: Path, noise: list[ImageArray]) -> None:
    score = Predictor(model_folder, device="cpu")(noise[:1])[0].score
    at = Predictor(model_folder, device="cpu", image_threshold=score)(noise[:1])[0]
    below = Predictor(model_folder, device="cpu", image_threshold=float(np.nextafter(score, 0)))(
        noise[:1]
    )[0]
    assert (at.is_anomalous, below.is_anomalous) == (False, True)


def test_thresholds_given_take_the_place_of_the_models_own(model_folder: Path) -> None:
    stored = Predictor(model_folder, device="cpu")
    assert (stored.image_threshold, stored.pixel_threshold) == (0.5, 0.5)
    given = Predictor(model_folder, device="cpu", image_threshold=0.0, pixel_threshold=0.9)
    assert (given.image_threshold, given.pixel_threshold) == (0.0, 0.9)


def test_without_threshold_the_verdict_stays_open(
    uncalibrated_folder: Path, noise: list[ImageArray]
) -> None:
    assert Predictor(uncalibrated_folder, device="cpu")(noise[:1])[0].is_anomalous is None


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_unreadable_images_are_reported_in_their_turn_and_the_others_go_on(
    model_folder: Path, noise_paths: list[Path], tmp_path: Path, batch_size: int
) -> None:
    predictor = Predictor(model_folder, device="cpu", batch_size=batch_size)
    missing = tmp_path / "missing.png"
    images = [missing, noise_paths[0], missing, missing, noise_paths[1], missing]
    events: list[object] = []
    errors: list[AlmrrError] = []

    def report(image: object, error: AlmrrError) -> None:
        events.append(image)
        errors.append(error)

    for prediction in predictor.stream(images, on_unreadable=report):
        events.append(prediction.index)
    assert events == [missing, 1, missing, missing, 4, missing]
    assert "missing.png" in str(errors[0])
    with pytest.raises(AlmrrError, match=r"missing\.png"):
        predictor(images)


def test_maps_leave_unreadable_images_out(
    brightness: nn.Module, noise_paths: list[Path], tmp_path: Path
) -> None:
    missing, unreadable = tmp_path / "missing.png", []
    maps = _predictor(brightness).maps(
        [noise_paths[0], missing, noise_paths[1]],
        on_unreadable=lambda image, _: unreadable.append(image),
    )
    assert [one.at_image_size().shape for one in maps] == [(20, 30), (150, 40)]
    assert unreadable == [missing]


def test_what_a_callback_raises_ends_the_run(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    def refuse(image: object, error: AlmrrError) -> None:
        raise KeyError(image)

    with pytest.raises(KeyError):
        list(predictor.stream([tmp_path / "missing.png", noise_paths[0]], on_unreadable=refuse))


def test_the_map_predictor_is_frozen(predictor: Predictor) -> None:
    with pytest.raises(FrozenInstanceError):
        predictor.map_predictor.batch_size = 3  # type: ignore[misc]


def test_it_is_built_from_the_inference_section(
    model_folder: Path, flips_model_folder: Path, noise: list[ImageArray]
) -> None:
    settings = InferenceSettings(batch_size=3, flips=True)
    built = MapPredictor.build(ALMRR.load(model_folder), settings, tiling=WHOLE, device="cpu")
    assert (built.batch_size, built.image_size, built.tiling) == (3, (128, 128), WHOLE)
    expected = Predictor(flips_model_folder, device="cpu", batch_size=3)  # of equal weights
    for found, prediction in zip(built.maps(noise), expected(noise), strict=True):
        np.testing.assert_array_equal(found.at_image_size(), prediction.anomaly_map)


def test_a_folder_may_be_named_by_a_string(model_folder: Path) -> None:
    assert Predictor(str(model_folder), device="cpu").config.category == "sample_brick"


def test_settings_of_another_model_are_refused(tmp_path: Path, model_folder: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    InferenceConfig(category="x", image_size=(256, 256)).save(tmp_path)
    with pytest.raises(AlmrrError, match="belong to different models"):
        Predictor(tmp_path, device="cpu")


def test_images_of_one_pixel_and_of_one_row(
    predictor: Predictor, tiling_model_folder: Path
) -> None:
    small = [np.full((1, 1, 3), 7, dtype=np.uint8), np.full((1, 200, 3), 7, dtype=np.uint8)]
    for model in (predictor, Predictor(tiling_model_folder, device="cpu")):
        assert [found.anomaly_map.shape for found in model(small)] == [(1, 1), (1, 200)]


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model_folder: Path, noise: list[ImageArray]) -> None:
    on_gpu = Predictor(model_folder, device="cuda")
    assert on_gpu.map_predictor.device.type == "cuda"
    assert not any(
        isinstance(module, nn.BatchNorm2d) for module in on_gpu.map_predictor.model.modules()
    )
    assert {tensor.device.type for tensor in on_gpu.map_predictor.model.state_dict().values()} == {
        "cuda"
    }
    for expected, found in zip(
        Predictor(model_folder, device="cpu")(noise), on_gpu(noise), strict=True
    ):
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=2e-3)


def test_inference_needs_neither_mlflow_nor_kedro() -> None:
    code = (
        "import sys, almrr_pipeline.inference.predictor, almrr_pipeline.reporting.predict_files, "
        "almrr_pipeline.inference.calibration, almrr_pipeline.inference.describe; "
        "print(sorted({'mlflow', 'kedro', 'dvc'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("suffix", ["tif", "jpg", "bmp"])
def test_other_formats_are_read(predictor: Predictor, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"gray.{suffix}"
    Image.fromarray(np.full((30, 50), 90, dtype=np.uint8)).save(path)
    assert predictor([path])[0].anomaly_map.shape == (30, 50)


@pytest.mark.parametrize("smoothing", [1, 2, 9, 40])
def test_a_large_map_is_scored_in_bands_as_a_whole(
    smoothing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    anomaly_map = np.random.default_rng(0).random((61, 47), dtype=np.float32)
    whole = image_score(anomaly_map, smoothing)
    monkeypatch.setattr("almrr_pipeline.inference.predictor._LARGE_MAP", 0)
    monkeypatch.setattr("almrr_pipeline.inference.predictor._BAND", 8)
    assert image_score(anomaly_map, smoothing) == pytest.approx(whole, rel=1e-13)
