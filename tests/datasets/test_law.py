"""The law of folders with real files: taken rightly, or named, whatever the modes and the masks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_pipeline.datasets.doctor import Diagnosis, examine
from almrr_pipeline.datasets.manifest import build_manifest, open_mask

Save = Callable[[np.ndarray, Path], object]


def _as(mode: str) -> Save:
    return lambda gray, path: Image.fromarray(gray).convert(mode).save(path)


def _pages(gray: np.ndarray, path: Path) -> None:
    further = [Image.fromarray(255 - gray), Image.fromarray(gray // 2)]
    Image.fromarray(gray).save(path, save_all=True, append_images=further)


def _deep(gray: np.ndarray, path: Path) -> None:
    Image.fromarray(gray.astype(np.uint16) * 257).save(path)


def _tiff(convert: Callable[[np.ndarray], np.ndarray], **options: object) -> Save:
    return lambda gray, path: tifffile.imwrite(path, convert(gray), **options)


def _color(gray: np.ndarray) -> np.ndarray:
    return np.dstack([gray] * 3)


IMAGES: dict[str, tuple[str, Save]] = {
    "gray": (".png", _as("L")),
    "color": (".bmp", _as("RGB")),
    "lossy": (".jfif", _as("RGB")),
    "bits": (".png", _as("1")),
    "palette": (".gif", _as("P")),
    "alpha": (".png", _as("RGBA")),
    "gray and alpha": (".PNG", _as("LA")),
    "cmyk": (".tif", _as("CMYK")),
    "16 bits": (".png", _deep),
    "12 bits": (".tif", _tiff(lambda gray: gray.astype(np.uint16) * 16)),
    "signed": (".tif", _tiff(lambda gray: gray.astype(np.int16) - 128)),
    "float": (".tiff", _tiff(lambda gray: (gray / 255).astype(np.float32))),
    "float color": (".tif", _tiff(lambda gray: _color(gray / 255), photometric="rgb")),
    "white is 0": (".tif", _tiff(lambda gray: 255 - gray, photometric="miniswhite")),
    "pages": (".tif", _pages),
    "frames": (".webp", _pages),
    "five channels": (".tif", _tiff(lambda gray: np.dstack([gray] * 5), photometric="rgb")),
    "not finite": (".tif", _tiff(lambda gray: np.full(gray.shape, np.nan, np.float32))),
    "damaged": (".png", lambda _, path: path.write_bytes(b"\x89PNG\r\n\x1a\n")),
    "empty": (".jpg", lambda _, path: path.touch()),
    "unknown suffix": (".heic", lambda _, path: path.touch()),
}


def _red(mask: np.ndarray, path: Path) -> None:
    Image.fromarray(np.dstack([mask, mask * 0, mask * 0])).save(path)


def _alpha(mask: np.ndarray, path: Path) -> None:
    Image.fromarray(np.dstack([mask * 0, mask * 0, mask * 0, mask])).save(path)


def _palette(mask: np.ndarray, path: Path) -> None:
    image = Image.fromarray(mask // 255).convert("P")
    image.putpalette([0, 0, 0, 90, 20, 40])
    image.save(path)


def _times(factor: float, dtype: type = np.uint8) -> Save:
    """Masks are 0 and 255."""
    return lambda mask, path: Image.fromarray((mask * factor).astype(dtype)).save(path)


MASKS: dict[str, Save] = {
    "white": _times(1),
    "red": _red,
    "alpha": _alpha,
    "palette": _palette,
    "bits": _as("1"),
    "0 and 1": _times(1 / 255),
    "0 and 1 in 16 bits": _times(1 / 255, np.uint16),
    "16 bits": _times(257, np.uint16),
    "class": _times(100 / 255),
    "inverted": lambda mask, path: Image.fromarray(255 - mask).save(path),
    "turned": lambda mask, path: Image.fromarray(np.vstack([mask, mask]).T.copy()).save(path),
    "pages": lambda mask, path: _pages(mask, path.with_suffix(".tif")),
    "damaged": lambda _, path: path.write_bytes(b"\x89PNG"),
    "absent": lambda _, path: None,
}


class _File(NamedTuple):
    place: str
    kind: str
    size: tuple[int, int]
    seed: int
    mask: str


SIDES = st.integers(1, 8)
FILES = st.builds(
    _File,
    st.sampled_from(["train/good", "train/good", "test/ok", "test/crack", "validation"]),
    st.sampled_from(["gray", *IMAGES]),
    st.tuples(SIDES, SIDES),
    st.integers(0, 999),
    st.sampled_from([*MASKS]),
)
LABELS = {"train": "good", "validation": "good", "test/ok": "good", "test/crack": "crack"}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(FILES, min_size=1, max_size=7))
def test_every_file_is_taken_rightly_or_named(files: list[_File]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train/good").mkdir(parents=True)
        Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)).save(
            folder / "train/good/first.png"
        )
        saved, masks = {}, {}
        for number, file in enumerate(files):
            path, size, mask = _save(folder, number, file)
            saved[path] = (file.place, size)
            if mask is not None:
                masks[mask] = path
        diagnosis = examine(folder)
        _check_images(diagnosis, saved, folder)
        _check_masks(diagnosis, masks)


def _save(folder: Path, number: int, file: _File) -> tuple[Path, tuple[int, int], Path | None]:
    """Save an image, and the mask of a defective one: two pixels of at least 36."""
    suffix, save = IMAGES[file.kind]
    path = folder / file.place / f"{number}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_defective = file.place == "test/crack"
    size = (6 + file.size[0] % 3, 6 + file.size[1] % 3) if is_defective else file.size
    gray = np.random.default_rng(file.seed).integers(0, 256, size, dtype=np.uint8)
    gray[0, 0] = 255
    save(gray, path)
    if not is_defective:
        return path, size, None
    mask = np.zeros(size, np.uint8)
    mask[1, 2:4] = 255
    target = folder / "masks/crack" / f"{number}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    MASKS[file.mask](mask, target)
    return path, size, target


def _named(diagnosis: Diagnosis) -> set[Path]:
    named = {path for finding in diagnosis.findings for path in finding.images}
    return named | {each.path for each in diagnosis.account.unused if each.level != "info"}


def _check_images(
    diagnosis: Diagnosis, saved: dict[Path, tuple[str, tuple[int, int]]], folder: Path
) -> None:
    found = {each.item.image: each for each in diagnosis.images}
    for path, (place, size) in saved.items():
        split = place.partition("/")[0]
        if path not in found:
            assert path in _named(diagnosis)
            continue
        each = found[path]
        assert (each.item.split, each.item.defect_type) == (split, LABELS.get(place, "good"))
        assert each.facts.size == size
    if diagnosis.has_errors:
        return
    manifest = build_manifest(
        diagnosis.account.items, root=folder, expected=None, strict=False, name="folder_law"
    )
    assert {folder / name for name in manifest["image"]} == set(found)


def _check_masks(diagnosis: Diagnosis, masks: dict[Path, Path]) -> None:
    """A mask is that of two pixels, or the file or its image is named."""
    named = _named(diagnosis)
    found = {each.item.image: each for each in diagnosis.images}
    for mask, image in masks.items():
        if {mask, mask.with_suffix(".tif"), image} & named or image not in found:
            continue
        each = found[image]
        assert each.item.mask is not None
        opened = open_mask(each.item.mask, mask, each, image, diagnosis.settings)
        assert opened.regions == (2,)
