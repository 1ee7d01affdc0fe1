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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from PIL import Image

from almrr_pipeline.common.arrays import AnomalyMap, release_pages
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import (
    STAGING_PREFIX,
    check_writable,
    escape_name,
    escape_text,
    staging_folder,
)
from almrr_pipeline.common.images import (
    IMAGE_SUFFIXES,
    encode_map,
    list_images,
    read_image,
    report_others,
)
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import show_counted
from almrr_pipeline.inference.looks import describe_drift
from almrr_pipeline.inference.streams import submit_ahead
from almrr_pipeline.reporting.overlays import draw_overlay

if TYPE_CHECKING:  # they bring torch, which is not needed to see that a path is wrong
    from almrr_pipeline.inference.map_predictor import ImageInput
    from almrr_pipeline.inference.predictor import Prediction, Predictor

logger = logging.getLogger(__name__)

MapFormat: TypeAlias = Literal["npy", "png", "none"]

SCORES_FILE = "scores.csv"
_RESULTS = frozenset({SCORES_FILE, "overlays", "maps"})
_STRIP = 512  # rows of an overlay that are copied at a time
_WRITTEN_AHEAD = 4
"""Results that may be on their way to the disk while the network goes on."""


@dataclass(frozen=True)
class Verdict:
    """A row of scores.csv; the image's path is as it was given or found."""

    image: Path
    score: float
    threshold: float | None
    is_anomalous: bool | None
    unlike: tuple[str, ...] = ()  # see Prediction; not a column


@dataclass(frozen=True)
class Summary:
    """Outcome of a run: verdicts in the order of the images, and images that cannot be read."""

    verdicts: list[Verdict] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def describe_drift(self) -> str | None:
        """How the images, if half of them are, are unlike those of the calibration, or None."""
        unlike = Counter(how for verdict in self.verdicts for how in verdict.unlike)
        return describe_drift(len(self.verdicts), unlike)


def find_images(paths: Iterable[Path], *, recursive: bool = False) -> list[Path]:
    """List the images among the paths and in the folders among them, each once.

    A folder gives the files with the suffix of an image, sorted by name, hidden ones left out; a
    file that is named itself is taken whatever its suffix. What a folder holds else is logged.

    Raises:
        AlmrrError: a path does not exist, or a folder holds no image.
    """
    found: dict[Path, Path] = {}
    others: Counter[str] = Counter()
    for path in paths:
        is_folder = path.is_dir()
        images = list_images(path, recursive=recursive, others=others) if is_folder else [path]
        if not images:
            advice = f"expected {', '.join(sorted(IMAGE_SUFFIXES))}"
            if not recursive and any(entry.is_dir() for entry in path.iterdir()):
                advice = "look into its sub-folders with --recursive"
            raise AlmrrError(f"The folder {path} holds no image; {advice}.")
        for image in images:
            if not image.is_file():
                where = escape_name(image)
                raise AlmrrError(f"There is no image or folder at {where}; check the path.")
            found.setdefault(_absolute(image), image)
    report_others(others)
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
    summary, names = Summary(), _name_results(images)
    progress = track(len(images), unit="images", description="predict")
    with _results_folder(output) as folder, progress as advance:

        def leave_out(image: ImageInput, error: AlmrrError) -> None:
            logger.warning("Left out: %s", escape_text(str(error)))
            summary.unreadable.append(Path(str(image)))
            advance(1)

        def write(prediction: Prediction) -> Verdict:
            image = images[prediction.index]
            if overlays:
                _write_overlay(
                    predictor, image, prediction, folder / f"overlays/{names[image]}.png"
                )
            if maps != "none":
                _write_map(prediction.anomaly_map, folder / f"maps/{names[image]}.{maps}")
            threshold = predictor.image_threshold
            found = prediction
            return Verdict(image, found.score, threshold, found.is_anomalous, found.unlike)

        predictions = predictor.stream(images, on_unreadable=leave_out)
        for _, written in submit_ahead(write, predictions, ahead=_WRITTEN_AHEAD, threads=2):
            summary.verdicts.append(written.result())
            advance(1)
        if not summary.verdicts:
            raise AlmrrError(f"None of the {len(images)} images could be read.")
        _write_scores(summary.verdicts, folder / SCORES_FILE)
    return summary


def check_output(output: Path, images: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output folder whose contents would be lost, or that cannot be written.

    Raises:
        AlmrrError: `output` is a file, holds something else than results of an earlier run, holds
            such results while `overwrite` is False, holds one of the images, or cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise AlmrrError(f"The output {output} is a file; name a folder.")
    entries = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    for name in entries:
        if name not in _RESULTS and not name.startswith(STAGING_PREFIX):
            raise AlmrrError(
                f"The output folder {output} holds other files, such as {name}; "
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
                f"The image {escape_name(image)} is in the output folder {output}; name another "
                "output folder."
            )
    check_writable(output)


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
            (output / SCORES_FILE).unlink(missing_ok=True)
            for entry in set(output.iterdir()) - {staged}:
                shutil.rmtree(entry)
            for entry in sorted(staged.iterdir(), key=lambda entry: entry.name == SCORES_FILE):
                entry.rename(output / entry.name)
            staged.rmdir()
    except OSError as error:
        raise AlmrrError(
            f"The results cannot be written to {output} ({error}); free some space or name another."
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # it holds the results, or was never made
                folder.rmdir()


def _write_overlay(predictor: Predictor, image: Path, prediction: Prediction, target: Path) -> None:
    overlay = draw_overlay(
        # again: holding images while a batch fills takes memory without bound
        show_counted(read_image(image, predictor.config.reading), predictor.config.region),
        prediction.anomaly_map,
        threshold=predictor.pixel_threshold,
        score=prediction.score,
        is_anomalous=prediction.is_anomalous,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas = Image.new("RGB", overlay.shape[1::-1])
    for top in range(0, len(overlay), _STRIP):  # as a whole it would be copied twice
        canvas.paste(Image.fromarray(overlay[top : top + _STRIP]), (0, top))
        release_pages(overlay)
    # a fifth of the time of Pillow's own choice, a tenth more bytes
    canvas.save(target, compress_level=1, compress_type=zlib.Z_RLE)


def _write_map(anomaly_map: AnomalyMap, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        np.save(target, anomaly_map)
    else:
        target.write_bytes(encode_map(anomaly_map))


def _write_scores(verdicts: Iterable[Verdict], target: Path) -> None:
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "score", "threshold", "is_anomalous"])
        for verdict in verdicts:
            image = escape_name(verdict.image)
            writer.writerow([image, verdict.score, verdict.threshold, verdict.is_anomalous])
