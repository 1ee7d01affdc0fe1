"""Folders of photographs in, a folder of results out: overlays, scores.csv and, if asked for, the anomaly maps.

The results are written into a hidden folder inside the output folder and moved to their places at the very end,
scores.csv last: a folder that holds a scores.csv is complete, and a run that was interrupted leaves nothing.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import IMAGE_SUFFIXES, read_image
from almrr_pipeline.inference.streams import map_ahead
from almrr_pipeline.inference.tiling import AnomalyMap
from almrr_pipeline.reporting.overlays import draw_overlay

if TYPE_CHECKING:  # they bring torch, which is not needed to see that a path is wrong
    from almrr_pipeline.inference.predictor import Prediction, Predictor

logger = logging.getLogger(__name__)

MapFormat: TypeAlias = Literal["npy", "png", "none"]

SCORES_FILE = "scores.csv"
OVERLAYS_FOLDER = "overlays"
MAPS_FOLDER = "maps"
_RESULTS = frozenset({SCORES_FILE, OVERLAYS_FOLDER, MAPS_FOLDER})
_PARTIAL = ".partial-"
_WRITTEN_AHEAD = 4
"""Results that may be on their way to the disk while the network goes on."""


@dataclass(frozen=True)
class Verdict:
    """A row of scores.csv."""

    image: Path
    """As it was given or found."""
    score: float
    threshold: float | None
    is_anomalous: bool | None


@dataclass
class Summary:
    """What became of the images."""

    verdicts: list[Verdict] = field(default_factory=list)
    """In the order of the images."""
    unreadable: dict[Path, AlmrrError] = field(default_factory=dict)
    """Images that could not be read, and why."""


def find_images(paths: Iterable[Path], *, recursive: bool = False) -> list[Path]:
    """List the images that are named, or lie in the folders that are named, each once.

    A folder gives the files whose suffix is that of an image, sorted by name, hidden ones left out; a file that is
    named itself is taken whatever its suffix.

    Raises:
        AlmrrError: a path does not exist, or a folder holds no image.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for image in _list_folder(path, recursive) if path.is_dir() else [path]:
            if not image.is_file():
                raise AlmrrError(f"There is no image or folder at {image}; check the path.")
            found.setdefault(_absolute(image), image)
    return list(found.values())


def predict_files(
    predictor: Predictor,
    images: Sequence[Path],
    output: Path,
    *,
    overlays: bool = True,
    maps: MapFormat = "none",
    overwrite: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> Summary:
    """Predict images and write overlays/, maps/ and scores.csv.

    Overlays and maps are named after their images, in sub-folders as below the deepest folder that all images
    share. Maps have the image's size: npy holds float32 in [0, 1], png 16-bit gray where 65535 stands for 1.

    Args:
        predictor: the model.
        images: their paths; see `find_images`.
        output: folder for the results; made when it does not exist.
        overlays: whether to draw the images with heat, outline and verdict.
        maps: format of the anomaly maps, or "none".
        overwrite: replace the results of an earlier run.
        on_image: called after each image, read or not.

    Raises:
        AlmrrError: not one image can be read, the output folder is not free or cannot be written; nothing is left
        behind then.
    """
    images = list(dict.fromkeys(images))
    check_output(output, images, overwrite=overwrite)
    summary = Summary()
    with _results_folder(output) as folder:
        write = _ResultWriter(predictor, folder, _name_results(images), overlays, maps)
        outcomes = zip(images, predictor.try_stream(images), strict=True)
        for image, written in map_ahead(write, outcomes, ahead=_WRITTEN_AHEAD, threads=2):
            if isinstance(written, AlmrrError):
                logger.warning("Left out: %s", written)
                summary.unreadable[image] = written
            else:
                summary.verdicts.append(written)
            on_image()
        if not summary.verdicts:
            raise AlmrrError(f"None of the {len(images)} images could be read.")
        _write_scores(summary.verdicts, folder / SCORES_FILE)
    return summary


def check_output(output: Path, images: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output folder whose contents would be lost.

    Raises:
        AlmrrError: `output` is a file, holds something else than results of an earlier run, holds such results while
            `overwrite` is False, or holds one of the images.
    """
    if output.exists() and not output.is_dir():
        raise AlmrrError(f"The output {output} is a file; name a folder.")
    entries = {entry.name for entry in output.iterdir()} if output.exists() else set()
    foreign = sorted(name for name in entries if name not in _RESULTS and not name.startswith(_PARTIAL))
    if foreign:
        raise AlmrrError(
            f"The output folder {output} holds other files, such as {foreign[0]}; name an empty or a new one."
        )
    if entries and not overwrite:
        raise AlmrrError(
            f"The output folder {output} holds earlier results; name another, or replace them with --overwrite."
        )
    place = output.resolve()
    for image in images:
        if place in image.parent.resolve().joinpath(image.name).parents:
            raise AlmrrError(f"The image {image} lies in the output folder {output}; name another output folder.")


def to_sixteen_bits(anomaly_map: AnomalyMap) -> npt.NDArray[np.uint16]:
    """Gray values that a PNG can hold: float32 in [0, 1] becomes uint16, 65535 for 1; shape (H, W)."""
    gray: npt.NDArray[np.uint16] = np.rint(anomaly_map * np.float32(65535)).astype(np.uint16)
    return gray


def _list_folder(folder: Path, recursive: bool) -> list[Path]:
    entries = folder.rglob("*") if recursive else folder.iterdir()
    images = sorted(
        entry
        for entry in entries
        if entry.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in entry.relative_to(folder).parts)
        and entry.is_file()
    )
    if not images:
        deeper = not recursive and any(entry.is_dir() for entry in folder.iterdir())
        advice = (
            "look into its sub-folders with --recursive" if deeper else f"expected {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
        raise AlmrrError(f"The folder {folder} holds no image; {advice}.")
    return images


def _absolute(path: Path) -> Path:
    """Absolute and without `..`, but links stay as they are: two links to one file are two images with two names."""
    return Path(os.path.normpath(path.absolute()))


def _name_results(images: Sequence[Path]) -> dict[Path, str]:
    """Name each image's results: its path below the deepest shared folder, without suffix if all stay distinct."""
    absolute = {image: _absolute(image) for image in images}
    try:
        shared = os.path.commonpath([path.parent for path in absolute.values()])
    except ValueError as error:
        raise AlmrrError("The images lie on different drives; run once for each drive.") from error
    names = {image: path.relative_to(shared) for image, path in absolute.items()}
    distinct = len({name.with_suffix("") for name in names.values()}) == len(names)
    return {image: (name.with_suffix("") if distinct else name).as_posix() for image, name in names.items()}


@contextmanager
def _results_folder(output: Path) -> Iterator[Path]:
    """A hidden folder to write results into; they move to `output` if the block succeeds, and vanish if it fails."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    partial: Path | None = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=output))
        yield partial
        _publish(partial, output)
    except OSError as error:
        raise AlmrrError(
            f"The results cannot be written to {output} ({error}); free some space or name another."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it holds the results, or was never made
                folder.rmdir()


def _publish(partial: Path, output: Path) -> None:
    """Replace earlier results by new ones; without a scores.csv while that is going on."""
    (output / SCORES_FILE).unlink(missing_ok=True)
    for entry in output.iterdir():
        if entry != partial:
            shutil.rmtree(entry)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == SCORES_FILE):
        entry.rename(output / entry.name)


@dataclass(frozen=True)
class _ResultWriter:
    """Writes what belongs to one image; called from several threads at once."""

    predictor: Predictor
    folder: Path
    names: Mapping[Path, str]
    overlays: bool
    maps: MapFormat

    def __call__(self, item: tuple[Path, Prediction | AlmrrError]) -> tuple[Path, Verdict | AlmrrError]:
        image, outcome = item
        if isinstance(outcome, AlmrrError):
            return image, outcome
        if self.overlays:
            self._write_overlay(image, outcome)
        if self.maps != "none":
            _write_map(outcome.anomaly_map, self.folder / MAPS_FOLDER / f"{self.names[image]}.{self.maps}")
        return image, Verdict(image, outcome.score, self.predictor.image_threshold, outcome.is_anomalous)

    def _write_overlay(self, image: Path, prediction: Prediction) -> None:
        overlay = draw_overlay(
            read_image(image),  # again: holding images back while a batch fills would cost memory without bound
            prediction.anomaly_map,
            threshold=self.predictor.pixel_threshold,
            score=prediction.score,
            is_anomalous=prediction.is_anomalous,
        )
        target = self.folder / OVERLAYS_FOLDER / f"{self.names[image]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay).save(target, format="PNG")


def _write_map(anomaly_map: AnomalyMap, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        np.save(target, anomaly_map)
    else:
        Image.fromarray(to_sixteen_bits(anomaly_map)).save(target, format="PNG")


def _write_scores(verdicts: Iterable[Verdict], target: Path) -> None:
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "score", "threshold", "is_anomalous"])
        writer.writerows(
            [verdict.image.as_posix(), verdict.score, verdict.threshold, verdict.is_anomalous] for verdict in verdicts
        )
