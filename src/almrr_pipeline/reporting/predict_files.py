"""From folders of photographs to a folder of results: overlays, scores.csv and anomaly maps.

The results are written into a hidden folder inside the output folder and moved to their places at
the end, scores.csv last: a folder that holds a scores.csv is complete, and an interrupted run
leaves nothing.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import STAGING_PREFIX, staging_folder
from almrr_pipeline.common.images import IMAGE_SUFFIXES, encode_map, read_image
from almrr_pipeline.common.progress import track
from almrr_pipeline.inference.streams import submit_ahead
from almrr_pipeline.reporting.overlays import draw_overlay

if TYPE_CHECKING:  # they bring torch, which is not needed to see that a path is wrong
    from almrr_pipeline.inference.map_predictor import ImageInput
    from almrr_pipeline.inference.predictor import Prediction, Predictor

logger = logging.getLogger(__name__)

MapFormat: TypeAlias = Literal["npy", "png", "none"]

SCORES_FILE = "scores.csv"
OVERLAYS_FOLDER = "overlays"
MAPS_FOLDER = "maps"
_RESULTS = frozenset({SCORES_FILE, OVERLAYS_FOLDER, MAPS_FOLDER})
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
    """Outcome of a run."""

    verdicts: list[Verdict] = field(default_factory=list)
    """In the order of the images."""
    unreadable: dict[Path, AlmrrError] = field(default_factory=dict)
    """Images that could not be read, and why."""


def find_images(paths: Iterable[Path], *, recursive: bool = False) -> list[Path]:
    """List the images among the paths and in the folders among them, each once.

    A folder gives the files with the suffix of an image, sorted by name, hidden ones left out; a
    file that is named itself is taken whatever its suffix.

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
) -> Summary:
    """Predict images and write overlays/, maps/ and scores.csv.

    Overlays and maps are named after their images, in sub-folders as below the deepest folder that
    contains all images. Maps have the image's size: npy holds float32 in [0, 1], png 16-bit gray
    (65535 for 1).

    Args:
        predictor: the model.
        images: their paths; see `find_images`. Unreadable ones are logged and left out.
        output: folder for the results; made when it does not exist.
        overlays: whether to draw the images with heat, outline and verdict.
        maps: format of the anomaly maps, or "none".
        overwrite: replace the results of an earlier run.

    Raises:
        AlmrrError: not one image can be read, or the output folder is not free or cannot be
            written; nothing is left behind then.
    """
    images = list(dict.fromkeys(images))
    check_output(output, images, overwrite=overwrite)
    summary = Summary()
    progress = track(len(images), unit="images", description="predict")
    with _results_folder(output) as folder, progress as advance:

        def leave_out(image: ImageInput, error: AlmrrError) -> None:
            logger.warning("Left out: %s", error)
            summary.unreadable[Path(str(image))] = error
            advance(1)

        predictions = predictor.stream(images, on_unreadable=leave_out)
        write = _ResultWriter(predictor, images, folder, _name_results(images), overlays, maps)
        for _, written in submit_ahead(write, predictions, ahead=_WRITTEN_AHEAD, threads=2):
            summary.verdicts.append(written.result())
            advance(1)
        if not summary.verdicts:
            raise AlmrrError(f"None of the {len(images)} images could be read.")
        _write_scores(summary.verdicts, folder / SCORES_FILE)
    return summary


def check_output(output: Path, images: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output folder whose contents would be lost.

    Raises:
        AlmrrError: `output` is a file, holds something else than results of an earlier run, holds
            such results while `overwrite` is False, or holds one of the images.
    """
    if output.exists() and not output.is_dir():
        raise AlmrrError(f"The output {output} is a file; name a folder.")
    entries = {entry.name for entry in output.iterdir()} if output.exists() else set()
    foreign = sorted(
        name for name in entries if name not in _RESULTS and not name.startswith(STAGING_PREFIX)
    )
    if foreign:
        raise AlmrrError(
            f"The output folder {output} holds other files, such as {foreign[0]}; "
            "name an empty or a new one."
        )
    if entries and not overwrite:
        raise AlmrrError(
            f"The output folder {output} holds earlier results; name another, or replace them with "
            "--overwrite."
        )
    resolved = output.resolve()
    for image in images:
        if resolved in image.parent.resolve().joinpath(image.name).parents:
            raise AlmrrError(
                f"The image {image} is in the output folder {output}; name another output folder."
            )


def _list_folder(folder: Path, recursive: bool) -> list[Path]:
    entries = folder.rglob("*") if recursive else folder.iterdir()
    images = sorted(
        entry
        for entry in entries
        if entry.suffix.lower() in IMAGE_SUFFIXES
        and not any(name.startswith(".") for name in entry.relative_to(folder).parts)
        and entry.is_file()
    )
    if not images:
        advice = f"expected {', '.join(sorted(IMAGE_SUFFIXES))}"
        if not recursive and any(entry.is_dir() for entry in folder.iterdir()):
            advice = "look into its sub-folders with --recursive"
        raise AlmrrError(f"The folder {folder} holds no image; {advice}.")
    return images


def _absolute(path: Path) -> Path:
    """Absolute, without `..`; links stay: two links to one file are two images with two names."""
    return Path(os.path.normpath(path.absolute()))


def _name_results(images: Sequence[Path]) -> dict[Path, str]:
    """Each image's path below the deepest common folder, without suffix if all stay distinct."""
    absolute = {image: _absolute(image) for image in images}
    try:
        common = os.path.commonpath([path.parent for path in absolute.values()])
    except ValueError as error:
        raise AlmrrError("The images are on different drives; run once for each drive.") from error
    names = {image: path.relative_to(common) for image, path in absolute.items()}
    if len({name.with_suffix("") for name in names.values()}) == len(names):
        names = {image: name.with_suffix("") for image, name in names.items()}
    return {image: name.as_posix() for image, name in names.items()}


@contextmanager
def _results_folder(output: Path) -> Iterator[Path]:
    """A hidden folder for results: they move to `output` on success and are removed on failure."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        with staging_folder(output) as staged:
            yield staged
            _publish(staged, output)
    except OSError as error:
        raise AlmrrError(
            f"The results cannot be written to {output} ({error}); free some space or name another."
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # it holds the results, or was never made
                folder.rmdir()


def _publish(staged: Path, output: Path) -> None:
    """Replace earlier results by new ones; without a scores.csv while that is going on."""
    (output / SCORES_FILE).unlink(missing_ok=True)
    for entry in output.iterdir():
        if entry != staged:
            shutil.rmtree(entry)
    for entry in sorted(staged.iterdir(), key=lambda entry: entry.name == SCORES_FILE):
        entry.rename(output / entry.name)
    staged.rmdir()


@dataclass(frozen=True)
class _ResultWriter:
    """Writes the overlay and the map of one image; called from several threads at once."""

    predictor: Predictor
    images: Sequence[Path]
    folder: Path
    names: Mapping[Path, str]
    overlays: bool
    maps: MapFormat

    def __call__(self, prediction: Prediction) -> Verdict:
        image = self.images[prediction.index]
        if self.overlays:
            target = self._target(OVERLAYS_FOLDER, image, "png")
            self._draw(image, prediction).save(target, format="PNG")
        if self.maps != "none":
            target = self._target(MAPS_FOLDER, image, self.maps)
            if self.maps == "npy":
                np.save(target, prediction.anomaly_map)
            else:
                target.write_bytes(encode_map(prediction.anomaly_map))
        threshold = self.predictor.image_threshold
        return Verdict(image, prediction.score, threshold, prediction.is_anomalous)

    def _target(self, folder: str, image: Path, suffix: str) -> Path:
        target = self.folder / folder / f"{self.names[image]}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _draw(self, image: Path, prediction: Prediction) -> Image.Image:
        # Read again: holding images back while a batch fills would cost memory without bound.
        overlay = draw_overlay(
            read_image(image),
            prediction.anomaly_map,
            threshold=self.predictor.pixel_threshold,
            score=prediction.score,
            is_anomalous=prediction.is_anomalous,
        )
        return Image.fromarray(overlay)


def _write_scores(verdicts: Iterable[Verdict], target: Path) -> None:
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "score", "threshold", "is_anomalous"])
        for verdict in verdicts:
            image = verdict.image.as_posix()
            writer.writerow([image, verdict.score, verdict.threshold, verdict.is_anomalous])
