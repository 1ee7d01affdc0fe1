from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.doctor import Diagnosis, examine
from almrr_pipeline.reporting.doctor_page import render_diagnosis


def _texture(seed: int, size: tuple[int, int] = (140, 150)) -> ImageArray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=size), 2)
    gray = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder: 4 training images, 2 normal and 2 defective test images, with masks."""
    root = tmp_path / "parts"
    for seed in range(8):
        place = ("train/good", "test/good", "test/hole")[(seed > 3) + (seed > 5)]
        _save(_texture(seed), root / place / f"{seed}.png")
    mask = np.zeros((140, 150), np.uint8)
    mask[40:60, 50:80] = 255
    for seed in (6, 7):
        _save(mask, root / f"ground_truth/hole/{seed}_mask.png")
    return root


def _texts(diagnosis: Diagnosis, level: str) -> str:
    return " | ".join(f.text for f in diagnosis.findings if f.level == level)


def test_a_sound_folder_has_no_findings(folder: Path) -> None:
    diagnosis = examine(folder)
    assert diagnosis.findings == []
    text = "\n".join(diagnosis.lines())
    for line in ("train", "4 images", "2 masks: 2 regions, 2.86% to 2.86%", "150 x 140 (8)"):
        assert line in text


def _swap_to_inverted(folder: Path) -> None:
    path = folder / "ground_truth/hole/6_mask.png"
    _save(255 - np.asarray(Image.open(path)), path)


def _classes(folder: Path) -> None:
    path = folder / "ground_truth/hole/6_mask.png"
    mask = np.asarray(Image.open(path)) // 255 * np.uint8(200)
    mask[100:110] = 100
    _save(mask, path)


def _mask_of_another_size(folder: Path) -> None:
    _save(np.full((20, 30), 255, np.uint8), folder / "ground_truth/hole/7_mask.png")


def _copy_in_test(folder: Path) -> None:
    Image.open(folder / "train/good/1.png").save(folder / "test/good/again.bmp")


def _brighter_jpeg_in_test(folder: Path) -> None:
    brighter = np.clip(_texture(1).astype(int) + 20, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).save(folder / "test/good/again.jpg", quality=90)


def _normal_and_defective(folder: Path) -> None:
    Image.open(folder / "test/hole/6.png").save(folder / "test/good/6.png")


def _damaged(folder: Path) -> None:
    (folder / "test/hole/6.png").write_bytes((folder / "test/hole/6.png").read_bytes()[:300])


def _without_mask(folder: Path) -> None:
    (folder / "ground_truth/hole/7_mask.png").unlink()


def _deep_test_images(folder: Path) -> None:
    _save(_texture(9)[..., 0].astype(np.uint16) * 257, folder / "test/hole/7.png")


def _unsure_name(folder: Path) -> None:
    (folder / "test/good").rename(folder / "test/gut")


def _nothing_to_train_on(folder: Path) -> None:
    for path in (folder / "train/good").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_swap_to_inverted, "covers 97% of the image: inverted?"),
        (_classes, "values from 100 to 100 would be dropped"),
        (_mask_of_another_size, "has 30 x 20 pixels, its image has 150 x 140"),
        (_copy_in_test, "the same image is in test and train"),
        (_brighter_jpeg_in_test, "nearly the same image is in two splits"),
        (_normal_and_defective, "the same image is normal and defective"),
        (_damaged, "test/hole/6.png: cannot be read"),
        (_without_mask, "test/hole/7.png: is defective, but its mask is not there"),
        (_deep_test_images, "its values are uint16, and no training image's are"),
        (_unsure_name, "is gut a folder of normal images or a defect type?"),
        (_nothing_to_train_on, "no normal image to train on"),
    ],
)
def test_what_gives_wrong_numbers_is_an_error(folder: Path, spoil, said: str) -> None:
    spoil(folder)
    diagnosis = examine(folder)
    assert said in _texts(diagnosis, "error")
    assert diagnosis.has_errors
    assert said.replace("'", "&#39;") in render_diagnosis(diagnosis)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_swap_to_inverted, "6_mask.png: covers 97% of the image: inverted?"),
        (_classes, "values from 100 to 100 would be dropped"),
        (_brighter_jpeg_in_test, "1.png, test/good/again.jpg: nearly the same image"),
        (_normal_and_defective, "the same image is normal and defective"),
        (_deep_test_images, "hole/7.png: its values are uint16"),
    ],
)
def test_a_fetch_warns_of_wrong_numbers_and_refuses_them_where_strict(
    folder: Path, workplace: Any, caplog: pytest.LogCaptureFixture, spoil, said: str
) -> None:
    paths = {"folder_tiles": str(folder)}
    workplace.fetch("folder_tiles", workplace.request(paths=paths, strict=True))
    shutil.rmtree(workplace.root)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    spoil(folder)
    workplace.fetch("folder_tiles", workplace.request(paths=paths))
    shutil.rmtree(workplace.root)
    assert said in caplog.text
    with pytest.raises(AlmrrError, match=re.escape(said)):
        workplace.fetch("folder_tiles", workplace.request(paths=paths, strict=True))
    assert workplace.leftovers() == []


def test_specimens_that_look_the_same_are_named_by_a_fetch(
    folder: Path, workplace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    blended = 0.7 * _texture(0) + 0.3 * _texture(20)
    _save(blended.astype(np.uint8), folder / "test/good/like_0.png")
    paths = {"folder_tiles": str(folder)}
    workplace.fetch("folder_tiles", workplace.request(paths=paths, strict=True))
    assert "train/good/0.png, test/good/like_0.png: 1 pairs of images" in caplog.text


def test_the_settings_decide_what_is_read(folder: Path) -> None:
    for path in folder.glob("ground_truth/hole/*.png"):
        _save(255 - np.asarray(Image.open(path)), path)
    for path in folder.glob("t*/*/*.png"):
        _save(np.asarray(Image.open(path))[..., 0].astype(np.uint16) * 16, path)
    settings = DataSettings(mask_values=(0,), value_range=(0, 4080))
    diagnosis = examine(folder, settings)
    assert diagnosis.findings == []
    assert "any: 0 is black, 4080 is white" in "\n".join(diagnosis.lines())
    assert "<figure>" in render_diagnosis(diagnosis)
    assert "more than 0.02 megapixels" in _texts(
        examine(folder, settings.model_copy(update={"max_megapixels": 0.02})), "error"
    )


def test_what_may_give_wrong_numbers_is_a_warning(folder: Path) -> None:
    Image.open(folder / "train/good/1.png").save(folder / "train/good/again.png")
    _save(np.zeros((140, 150), np.uint8), folder / "ground_truth/hole/6_mask.png")
    (folder / "test/good/report.heic").write_bytes(b"x")
    diagnosis = examine(folder)
    warnings = _texts(diagnosis, "warning")
    for said in ("several times in train", "the mask shows no defect", "report.heic"):
        assert said in warnings
    assert not diagnosis.has_errors


def test_defects_too_small_for_the_input_are_counted_with_a_remedy(tmp_path: Path) -> None:
    for seed, place in enumerate(("train/good", "test/good", "test/scratch")):
        _save(_texture(seed, (300, 2400)), tmp_path / place / "0.png")
    mask = np.zeros((300, 2400), np.uint8)
    mask[100:103, 500:510] = 255
    _save(mask, tmp_path / "ground_truth/scratch/0_mask.png")
    (finding,) = examine(tmp_path).findings
    # 3 x 10 pixels become 2.56 x 1.07 at 256 x 256: 2.7 in area, and 4 at 320 x 320
    assert "1 of 1 defective regions have fewer than 4 pixels" in finding.text
    assert "set data.image_size to [320, 320]" in finding.text
    assert examine(tmp_path, DataSettings(image_size=(320, 320))).findings == []
    assert "data.tiling" not in finding.text
    mask[:] = 0
    mask[100:102, 500:502] = 255
    _save(mask, tmp_path / "ground_truth/scratch/0_mask.png")
    (finding,) = examine(tmp_path).findings
    assert "set data.tiling.enabled to true and data.tiling.scale to 1" in finding.text


def test_names_that_are_not_text_are_shown(folder: Path) -> None:
    (folder / "train/good/0.png").rename(folder / "train/good/\udcff<b>\n.png")
    (folder / "test/hole").rename(folder / "test/h\udcf6le")
    odd = folder.rename(folder.with_name("parts\udcff"))
    diagnosis = examine(odd)
    page = render_diagnosis(diagnosis)
    page.encode("utf-8")
    assert any(r"h\udcf6le" in finding.text for finding in diagnosis.findings)
    assert "<b>\n" not in page.replace("<b>error", "")


def test_images_are_not_kept(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (640, 480, 3), dtype=np.uint8)
    for shift in range(40):
        _save(np.roll(noise, shift), folder / f"train/good/large{shift}.bmp")
    tracemalloc.start()
    examine(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 640 * 480 * 3  # all of them decoded: 37 MB


def test_neither_the_doctor_nor_its_page_brings_torch() -> None:
    code = (
        "import sys, almrr_pipeline.datasets.doctor, almrr_pipeline.reporting.doctor_page; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
