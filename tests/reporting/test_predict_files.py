from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from almrr_pipeline.common import progress
from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.reporting import predict_files as predict_files_module
from almrr_pipeline.reporting.predict_files import find_images, predict_files


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(model_folder, device="cpu", batch_size=2)


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _contents(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


# --- what is found ---


def test_a_folder_gives_its_images_sorted(tmp_path: Path) -> None:
    names = ["b.PNG", "a.jpeg", "ö c.tif", ".hidden.png", "notes.txt", "._a.jpeg"]
    _touch(*(tmp_path / name for name in names), tmp_path / "deeper" / "d.png")
    assert [path.name for path in find_images([tmp_path])] == ["a.jpeg", "b.PNG", "ö c.tif"]


def test_what_is_not_taken_is_counted_by_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = ["a.JFIF", "b.gif", "c.jpe", "d.pgm", "x/e.jp2", "x/f.tga"]
    others = ["notes.txt", "x/a.heic", "x/b.HEIC", "x/frame0001", "x/.hidden"]
    _touch(*(tmp_path / name for name in taken + others))
    found = find_images([tmp_path, tmp_path / "notes.txt"], recursive=True)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [*taken, "notes.txt"]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "4 files do not have the suffix of an image and were not taken: "
        "2 .heic, 1 .txt, 1 without one; accepted are .bmp, "
    )


def test_sub_folders_are_looked_into_on_demand(tmp_path: Path) -> None:
    _touch(tmp_path / "x" / "a.png", tmp_path / "y" / "z" / "a.png", tmp_path / ".git" / "a.png")
    assert find_images([tmp_path], recursive=True) == [
        tmp_path / "x" / "a.png",
        tmp_path / "y" / "z" / "a.png",
    ]
    with pytest.raises(AlmrrError, match="--recursive"):
        find_images([tmp_path])


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    _touch(tmp_path / "frame.0001")
    assert find_images([tmp_path / "frame.0001"]) == [tmp_path / "frame.0001"]


def test_no_image_comes_twice(tmp_path: Path) -> None:
    _touch(tmp_path / "a.png")
    assert find_images([tmp_path / "a.png", tmp_path, tmp_path / ".." / tmp_path.name]) == [
        tmp_path / "a.png"
    ]


def test_two_links_to_one_file_are_two_images(tmp_path: Path) -> None:
    _touch(tmp_path / "store" / "blob")
    links = [tmp_path / "links" / name for name in ("a.png", "b.png")]
    links[0].parent.mkdir()
    for link in links:
        link.symlink_to(tmp_path / "store" / "blob")
    assert find_images([tmp_path / "links"]) == links


def test_what_does_not_exist_and_what_is_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="nowhere"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(AlmrrError, match="holds no image; expected"):
        find_images([tmp_path])


# --- what is written ---


def test_scores_hold_what_the_predictor_says(
    predictor: Predictor, noise: list[ImageArray], noise_paths: list[Path], tmp_path: Path
) -> None:
    predict_files(predictor, noise_paths, tmp_path / "out")
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(scores) == ["image", "score", "threshold", "is_anomalous"]
    assert list(scores["image"]) == [path.as_posix() for path in noise_paths]
    predictions = predictor(noise)
    assert list(scores["score"]) == pytest.approx([found.score for found in predictions], abs=1e-6)
    assert list(scores["is_anomalous"]) == [found.is_anomalous for found in predictions]
    assert set(scores["threshold"]) == {0.5}
    assert list(scores["is_anomalous"]) == list(scores["score"] > scores["threshold"])


def test_overlays_show_every_image(
    predictor: Predictor, noise: list[ImageArray], noise_paths: list[Path], tmp_path: Path
) -> None:
    predict_files(predictor, noise_paths, tmp_path / "out")
    for path, image in zip(noise_paths, noise, strict=True):
        with Image.open(tmp_path / "out" / "overlays" / path.name) as overlay:
            assert overlay.mode == "RGB"
            assert (
                overlay.width % image.shape[1] == 0
            )  # narrow images are enlarged by a whole factor
            assert overlay.height > image.shape[0]


def test_maps_hold_the_anomaly_maps(
    predictor: Predictor, noise: list[ImageArray], noise_paths: list[Path], tmp_path: Path
) -> None:
    predict_files(predictor, noise_paths, tmp_path / "npy", overlays=False, maps="npy")
    predict_files(predictor, noise_paths, tmp_path / "png", overlays=False, maps="png")
    for path, found in zip(noise_paths, predictor(noise), strict=True):
        exact = np.load(tmp_path / "npy" / "maps" / f"{path.stem}.npy")
        gray = np.asarray(Image.open(tmp_path / "png" / "maps" / path.name))
        assert exact.dtype == np.float32
        np.testing.assert_allclose(exact, found.anomaly_map, atol=1e-6)
        np.testing.assert_allclose(gray / 65535, exact, atol=0.5 / 65535 + 1e-7)
    assert not (tmp_path / "npy" / "overlays").exists()


def test_sub_folders_are_kept(
    predictor: Predictor, noise: list[ImageArray], tmp_path: Path
) -> None:
    for name in ("in/x/a.png", "in/y/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(noise[0]).save(tmp_path / name)
    predict_files(predictor, find_images([tmp_path / "in"], recursive=True), tmp_path / "out")
    assert _contents(tmp_path / "out") == ["overlays/x/a.png", "overlays/y/a.png", "scores.csv"]


def test_equal_stems_keep_their_suffixes(
    predictor: Predictor, noise: list[ImageArray], tmp_path: Path
) -> None:
    for name in ("a.png", "a.bmp"):
        Image.fromarray(noise[0]).save(tmp_path / name)
    predict_files(predictor, [tmp_path / "a.png", tmp_path / "a.bmp"], tmp_path / "out", maps="npy")
    assert _contents(tmp_path / "out") == [
        "maps/a.bmp.npy",
        "maps/a.png.npy",
        "overlays/a.bmp.png",
        "overlays/a.png.png",
        "scores.csv",
    ]


def test_without_threshold_the_cells_are_empty(
    uncalibrated_folder: Path, noise_paths: list[Path], tmp_path: Path
) -> None:
    predict_files(Predictor(uncalibrated_folder, device="cpu"), noise_paths[:1], tmp_path / "out")
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert scores[["threshold", "is_anomalous"]].isna().all(axis=None)


def test_unreadable_images_are_left_out_and_reported(
    predictor: Predictor,
    noise_paths: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    images = [broken, *noise_paths[:2]]
    with caplog.at_level(logging.INFO):
        summary = predict_files(predictor, images, tmp_path / "out")
    assert list(summary.unreadable) == [broken]
    assert [verdict.image for verdict in summary.verdicts] == noise_paths[:2]
    assert "3 images (100 %)" in caplog.text
    assert "broken.png" in caplog.text
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 2


def test_nothing_is_left_when_no_image_can_be_read(predictor: Predictor, tmp_path: Path) -> None:
    _touch(tmp_path / "a.png")
    with pytest.raises(AlmrrError, match="None of the 1 images"):
        predict_files(predictor, [tmp_path / "a.png"], tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


# --- what is in the way ---


def test_earlier_results_are_refused_or_replaced(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_files(predictor, noise_paths, out, maps="npy")
    before = _contents(out)
    with pytest.raises(AlmrrError, match=r"earlier results.*--overwrite"):
        predict_files(predictor, noise_paths[:1], out)
    assert _contents(out) == before
    predict_files(predictor, noise_paths[:1], out, overwrite=True)
    assert _contents(out) == ["overlays/00.png", "scores.csv"]


def test_an_empty_folder_is_filled(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    predict_files(predictor, noise_paths[:1], tmp_path)
    assert _contents(tmp_path) == ["overlays/00.png", "scores.csv"]


def test_other_peoples_files_are_never_replaced(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    _touch(tmp_path / "thesis.tex")
    with pytest.raises(AlmrrError, match=r"other files, such as thesis\.tex"):
        predict_files(predictor, noise_paths, tmp_path, overwrite=True)
    assert _contents(tmp_path) == ["thesis.tex"]


def test_images_in_the_output_folder_are_never_replaced(
    predictor: Predictor, noise: list[ImageArray], tmp_path: Path
) -> None:
    image = tmp_path / "overlays" / "a.png"
    image.parent.mkdir()
    Image.fromarray(noise[0]).save(image)
    with pytest.raises(AlmrrError, match="is in the output folder"):
        predict_files(predictor, [image], tmp_path, overwrite=True)
    assert _contents(tmp_path) == ["overlays/a.png"]


def test_a_file_is_no_output_folder(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    _touch(tmp_path / "out")
    with pytest.raises(AlmrrError, match="is a file"):
        predict_files(predictor, noise_paths, tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), AlmrrError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "interrupted"],
)
def test_a_failure_leaves_the_earlier_results_alone(
    predictor: Predictor,
    noise_paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    out = tmp_path / "out"
    predict_files(predictor, noise_paths, out)
    before = {name: (out / name).read_bytes() for name in _contents(out)}
    monkeypatch.setattr(predict_files_module, "_write_scores", _raiser(error))
    with pytest.raises(raised):
        predict_files(predictor, noise_paths[:2], out, maps="npy", overwrite=True)
    assert {name: (out / name).read_bytes() for name in _contents(out)} == before
    assert {entry.name for entry in out.iterdir()} == {"overlays", "scores.csv"}


def test_what_a_killed_run_left_is_cleared_away(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    _touch(tmp_path / ".staging@host@1@abc" / "overlays" / "00.png")
    with pytest.raises(AlmrrError, match="--overwrite"):
        predict_files(predictor, noise_paths[:1], tmp_path)
    predict_files(predictor, noise_paths[:1], tmp_path, overwrite=True)
    assert _contents(tmp_path) == ["overlays/00.png", "scores.csv"]


def test_a_place_that_cannot_be_written_is_named(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    _touch(tmp_path / "file")
    with pytest.raises(AlmrrError, match=r"file.out cannot be written"):
        predict_files(predictor, noise_paths[:1], tmp_path / "file" / "out")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_results_are_readable_by_others(
    predictor: Predictor, noise_paths: list[Path], tmp_path: Path
) -> None:
    umask = os.umask(0o022)
    try:
        predict_files(predictor, noise_paths[:1], tmp_path / "out")
    finally:
        os.umask(umask)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*")} == {
        "0o755",
        "0o644",
    }


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail
