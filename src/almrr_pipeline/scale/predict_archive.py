"""`almrr predict --engine ray`: verdicts of any number of images, in parts that are written once.

The archive is listed first, in parts. Ray Data hands the parts to actors that hold the model; an
actor reads its part's images, predicts them and writes one file of verdicts. So memory does not
grow with the archive, a part that was interrupted is done again as a whole, and a finished one
never.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import escape_text, hash_file
from almrr_pipeline.common.images import encode_map
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import show_counted
from almrr_pipeline.inference.inference_config import MODEL_FILES
from almrr_pipeline.inference.looks import describe_drift
from almrr_pipeline.inference.streams import submit_ahead
from almrr_pipeline.reporting.overlays import draw_overlay
from almrr_pipeline.reporting.predict_files import MapFormat
from almrr_pipeline.scale.archive import (
    LISTING,
    Folder,
    count_parts,
    list_archive,
    read_anywhere,
    read_part,
    write_listing,
)
from almrr_pipeline.scale.cluster import (
    Share,
    check_machines,
    check_share,
    connected,
    own_versions,
    passed_environment,
)

if TYPE_CHECKING:
    from almrr_pipeline.inference.predictor import Prediction

logger = logging.getLogger(__name__)

VERDICTS = "verdicts"
_RUN = "run.json"
_RESULTS = (VERDICTS, "overlays", "maps", LISTING, _RUN)
_COLUMNS = pa.schema(
    [
        ("image", pa.string()),
        ("score", pa.float64()),  # null where the image could not be read
        ("threshold", pa.float64()),
        ("is_anomalous", pa.bool_()),  # null without a score or a threshold
        ("reason", pa.string()),  # why the image could not be read; null where it could
        ("unlike", pa.string()),  # the calibration's images: "darker, less sharp"; null where not
    ]
)
_SECONDS_TO_WAIT = 20.0  # for a machine that has what an actor asks for


@dataclass(frozen=True)
class Job:
    """What is predicted, and what is written of it."""

    model: str  # folder, seen by all machines
    output: str  # path or address
    images: tuple[str, ...]  # paths or addresses of images, folders or lists
    recursive: bool = False
    overlays: bool = False
    maps: MapFormat = "none"
    only_anomalous: bool = False  # overlays and maps of anomalous images alone
    part_size: int = 512  # images
    predictor: dict[str, Any] = field(default_factory=dict)  # further arguments of Predictor


@dataclass(frozen=True)
class Totals:
    """Numbers of images, those of earlier runs that were gone on with included."""

    images: int
    unreadable: int
    anomalous: int
    drift: str | None = None  # how they are unlike the images of the calibration, if half are


def predict_archive(job: Job, *, cpus: float, overwrite: bool = False) -> Totals:
    """Predict all images of an archive on a Ray cluster; goes on with an interrupted run.

    Writes verdicts/part-N.parquet, and overlays/ and maps/ as asked. An image that cannot be read
    is a row with a reason.

    Args:
        job: what to do; of an interrupted run the same.
        cpus: cores of an actor; where the cluster has GPUs, each actor has one.
        overwrite: begin anew.

    Raises:
        AlmrrError: an input, the output or the cluster is not as it has to be.
    """
    output = Folder(job.output)
    _begin(job, output, overwrite=overwrite)
    parts, images = count_parts(output)
    finished = output.names(VERDICTS)
    missing = [part for part in range(parts) if _file_of(part) not in finished]
    logger.info("%d of %d parts are to be done.", len(missing), parts)
    if missing:
        with connected() as ray:
            gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
            share = Share(cpus, gpus)
            check_share(share, ray, wait=_SECONDS_TO_WAIT)
            local = [Path(one) for one in job.images if "://" not in one]
            check_machines(
                ray,
                Path(job.output) if output.is_local else None,
                packages=own_versions(),
                files=[Path(job.model) / name for name in MODEL_FILES] + local,
            )
            _run_parts(job, missing, share, ray, images=images)
    return _count(output, parts)


def _begin(job: Job, output: Folder, *, overwrite: bool) -> None:
    """Write the job and its listing into an empty folder, or find the same job there."""
    described = asdict(job) | {"weights": _hash_model(Path(job.model))}
    if overwrite:
        output.remove(_RESULTS)
    before = output.read(_RUN)
    if before is None:
        if others := output.names("") - {"."}:
            raise AlmrrError(
                f"The output folder {job.output} holds other files, such as {min(others)}; name an "
                "empty or a new one."
            )
        write_listing(list_archive(job.images, recursive=job.recursive), output, size=job.part_size)
        output.write(_RUN, json.dumps(described, indent=2).encode())
        return
    earlier = json.loads(before)
    differs = sorted(name for name in described if _plain(described[name]) != earlier.get(name))
    if differs:
        raise AlmrrError(
            f"The output folder {job.output} holds a run of another {', '.join(differs)}; name "
            "another folder, or replace its results with --overwrite."
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - as JSON gives it back
    return json.loads(json.dumps(value))


def _hash_model(folder: Path) -> str:
    hashes = "".join(hash_file(folder / name) for name in MODEL_FILES)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _file_of(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _run_parts(job: Job, parts: Sequence[int], share: Share, ray: Any, *, images: int) -> None:  # noqa: ANN401
    """Let actors take the parts one by one."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    room = resources["GPU"] // share.gpus if share.gpus else resources["CPU"] // share.cpus
    most = max(1, min(int(room), len(parts)))
    data = from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    rows = data.map_batches(
        PartPredictor,
        fn_constructor_args=(job, passed_environment()),
        batch_size=1,
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        compute=ActorPoolStrategy(min_size=1, max_size=most),
    ).iter_rows()
    done = max(0, images - len(parts) * job.part_size)
    with track(images, unit="images", description="predict", done=done) as advance:
        for row in rows:
            advance(row["images"])


def _count(output: Folder, parts: int) -> Totals:
    images = unreadable = anomalous = 0
    unlike: Counter[str] = Counter()
    for part in range(parts):
        with output.open(f"{VERDICTS}/{_file_of(part)}") as file:
            table = pq.read_table(file, columns=["score", "is_anomalous", "unlike"])
        images += len(table)
        unreadable += table["score"].null_count
        anomalous += pc.sum(table["is_anomalous"]).as_py() or 0
        for ways in table["unlike"].drop_null().to_pylist():
            unlike.update(ways.split(", "))
    drift = describe_drift(images - unreadable, unlike)
    return Totals(images, unreadable, anomalous, drift)


class PartPredictor:
    """An actor that holds the model, and predicts parts of the archive."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        from almrr_pipeline.inference.predictor import Predictor  # brings torch

        self._job, self._output = job, Folder(job.output)
        self._predictor = Predictor(job.model, **job.predictor)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[int]]:
        """Predict parts; gives the numbers of their images."""
        return {"images": [self.predict(int(part)) for part in batch["part"]]}

    def predict(self, part: int) -> int:
        """Predict a part, and write its verdicts when all else of it is written."""
        images = read_part(self._output, part)
        rows: list[dict[str, Any]] = [{"image": escape_text(image)} for image in images]
        readable: list[int] = []
        pixels = self._read(images, rows, readable)
        for prediction in self._predictor.stream(pixels):
            place = readable[prediction.index]
            rows[place] |= {
                "score": prediction.score,
                "threshold": self._predictor.image_threshold,
                "is_anomalous": prediction.is_anomalous,
                "unlike": ", ".join(prediction.unlike) or None,
            }
            if prediction.is_anomalous or not self._job.only_anomalous:
                self._draw(images[place], prediction)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _COLUMNS), buffer)
        self._output.write(f"{VERDICTS}/{_file_of(part)}", buffer.getvalue())
        return len(images)

    def _read(
        self, images: Sequence[str], rows: list[dict[str, Any]], readable: list[int]
    ) -> Iterator[ImageArray]:
        """Decode images ahead in threads; note which can be read, and why others cannot."""
        reading = self._predictor.config.reading
        tiled = self._predictor.config.tiling.enabled
        ahead = 2 if tiled else 2 * self._predictor.map_predictor.batch_size

        def read(place: int) -> ImageArray:
            return read_anywhere(images[place], reading)

        decoded: Iterator[tuple[int, Future[ImageArray]]]
        decoded = submit_ahead(read, range(len(images)), ahead=ahead)
        for place, future in decoded:
            error = future.exception()
            if isinstance(error, AlmrrError):
                rows[place]["reason"] = escape_text(str(error))
                continue
            readable.append(place)
            yield future.result()

    def _draw(self, image: str, prediction: Prediction) -> None:
        name = PurePosixPath(image.partition("://")[2] or image)
        target = name.relative_to("/") if name.is_absolute() else name
        if self._job.overlays:
            overlay = draw_overlay(
                show_counted(
                    read_anywhere(image, self._predictor.config.reading),
                    self._predictor.config.region,
                ),
                prediction.anomaly_map,
                threshold=self._predictor.pixel_threshold,
                score=prediction.score,
                is_anomalous=prediction.is_anomalous,
            )
            buffer = io.BytesIO()
            Image.fromarray(overlay).save(buffer, "png")
            self._output.write(f"overlays/{target}.png", buffer.getvalue())
        if self._job.maps == "png":
            self._output.write(f"maps/{target}.png", encode_map(prediction.anomaly_map))
        elif self._job.maps == "npy":
            buffer = io.BytesIO()
            np.save(buffer, prediction.anomaly_map)
            self._output.write(f"maps/{target}.npy", buffer.getvalue())
