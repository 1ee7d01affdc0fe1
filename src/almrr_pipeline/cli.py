"""The `almrr` command: from a check of images to a model, its report, predictions and a server.

What is slow to import is imported inside the commands, so that `--help` answers at once, and torch
only after the paths have been checked.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import check_target_file, check_writable, escape_name

if TYPE_CHECKING:
    from almrr_pipeline.inference.predictor import Predictor
    from almrr_pipeline.reporting.predict_files import Summary

SCAN_BACKENDS = ("auto", "mamba_ssm", "triton", "numba", "torch")
"""Those of `config.ScanBackend`, which would bring pydantic; a test compares the two."""
EXPORT_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
RUNTIMES = ("torch", "onnxruntime", "openvino")
_LISTED_UNREADABLE = 20  # images named at the end; more are counted
_LARGEST_BATCH = 65536  # images; more than any memory holds

_folder = click.Path(path_type=Path)
_model_folder = click.argument("model_folder", type=_folder)
_images = click.argument("images", type=_folder, nargs=-1, required=True)


class _Number(click.FloatRange):
    """A range of numbers; click's own takes nan for a member of any range."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:  # noqa: ANN401 - click's own
        number: float = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return super().convert(value, param, ctx)


def _check_range(ctx: click.Context, param: click.Parameter, ends: Any) -> Any:  # noqa: ANN401
    if ends is not None and not ends[0] < ends[1]:
        raise click.BadParameter("black is smaller than white.", ctx, param)
    return ends


_value_range = click.option(
    "--value-range",
    type=(_Number(), _Number()),
    metavar="BLACK WHITE",
    callback=_check_range,
    help="Values that are black and white, in images of more than 8 bits.",
)
_recursive = click.option("-r", "--recursive", is_flag=True, help="Look into sub-folders too.")


def _predictor_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that are arguments of `Predictor` under the same names."""
    backends, at_least_one = click.Choice(SCAN_BACKENDS), click.IntRange(1, _LARGEST_BATCH)
    device = "auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps, ..."
    runtime = "What runs the network; the last two on the CPU, from a graph exported at first use."
    scan, batch = "Implementation of the selective scan.", "Images (or tiles) per forward pass."
    for option in (  # the last one is listed first
        click.option("--runtime", type=click.Choice(RUNTIMES), default="torch", help=runtime),
        click.option("--scan-backend", type=backends, default="auto", help=scan),
        click.option("--batch-size", type=at_least_one, default=8, help=batch),
        click.option("--device", default="auto", metavar="NAME", help=device),
        _value_range,
    ):
        command = option(command)
    return command


class _Group(click.Group):
    """Prints the message of an AlmrrError or OSError alone and exits with 1, as click does."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        try:
            return super().invoke(ctx)
        except AlmrrError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in {"", "almrr_pipeline"}:
                raise
            extra = {"pyarrow": "ray"}.get(missing, "pipeline")
            raise click.ClickException(
                f"{missing} is not installed, which this command needs; run: pip install "
                f"'almrr-pipeline[{extra}]'."
            ) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the output ended; click exits quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}.") from error
        except MemoryError as error:
            advice = "use a smaller --batch-size or smaller images"
            raise click.ClickException(f"There is not enough memory; {advice}.") from error


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(package_name="almrr-pipeline", prog_name="almrr")
@click.option("-v", "--verbose", is_flag=True, help="Log device, scan backend and each step.")
def almrr(verbose: bool) -> None:
    """Find and outline defects on textured surfaces with a trained model.

    `almrr check FOLDER` tells whether images of your own are ready to be trained on.

    \b
    A model is a folder with model.safetensors, config.json and inference.json,
    such as data/06_models/sample_brick/seed_0 after `dvc repro`. Begin with:

    \b
      almrr info data/06_models/sample_brick/seed_0
      almrr predict data/06_models/sample_brick/seed_0 photographs/ --output results

    `almrr COMMAND --help` explains a command.
    """  # noqa: D301 - click reads \b as: keep these lines as they are
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    logging.getLogger("almrr_pipeline.common.progress").setLevel(logging.INFO)


@almrr.command(short_help="What a folder of images would be used as, and what is wrong with it.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--html", type=_folder, metavar="FILE", help="Also write a page with thumbnails.")
@click.option(
    "--normal-name",
    "normal_names",
    multiple=True,
    metavar="NAME",
    help="Name of a folder of normal images, as data.normal_names; may be repeated.",
)
@click.option(
    "--image-size",
    type=click.IntRange(128, 4096),
    default=256,
    help="Side of the network's input, in pixels.",
)
@_value_range
@click.option(
    "--mask-value",
    "mask_values",
    type=click.IntRange(0),
    multiple=True,
    metavar="VALUE",
    help="Value of the masks that is anomalous, as data.mask_values; may be repeated.",
)
@click.option(
    "--mask-threshold",
    type=_Number(0.0),
    metavar="VALUE",
    help="Values of the masks above it are anomalous, as data.mask_threshold.",
)
@click.option(
    "--max-megapixels",
    type=_Number(0.0, min_open=True),
    default=500.0,
    help="Largest image that is read, as data.max_megapixels.",
)
@click.option(
    "--region",
    metavar="FILE",
    help="What of the images counts, as data.region: an image, white there, or JSON of polygons.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 at warnings too.")
def check(
    folder: Path,
    html: Path | None,
    normal_names: tuple[str, ...],
    image_size: int,
    region: str | None,
    strict: bool,
    **options: Any,  # noqa: ANN401 - those of DataSettings under the same names
) -> None:
    """Check FOLDER, images of your own, before they are trained on.

    Tells what each file would be used as or why it is not used, and finds what would give wrong
    numbers: masks that mean something else, images in two splits, defects too small for the input.

    \b
    Examples:
      almrr check photographs/
      almrr check photographs/ --html check.html --normal-name gut
      almrr check photographs/ --mask-value 100 --mask-value 200 --value-range 0 4095

    \b
    Exit codes: 0 nothing stands in the way, or warnings alone;
                1 training would fail or give wrong numbers;
                2 the command line was wrong.
    """  # noqa: D301
    if html is not None:
        check_target_file(html)

    from almrr_pipeline.config import parse_data
    from almrr_pipeline.datasets.doctor import examine

    if image_size % 16:
        raise click.BadParameter("a multiple of 16 is needed.", param_hint="'--image-size'")
    names, size = [*normal_names] or None, (image_size, image_size)
    options |= {"normal_names": names, "image_size": size, "region": region}
    diagnosis = examine(folder, parse_data(options))
    for line in diagnosis.lines():
        click.echo(line)
    for finding in diagnosis.findings:
        click.echo(f"{finding.level}: {finding.text}.")
    if html is not None:
        from almrr_pipeline.reporting.doctor_page import render_diagnosis

        html.write_text(render_diagnosis(diagnosis), encoding="utf-8")
        click.echo(f"Wrote {escape_name(html)}")
    if diagnosis.has_errors or (strict and diagnosis.findings):
        sys.exit(1)


@almrr.command(short_help="A model for images of your own, with its report.")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "-S",
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="A value of this category alone, such as train.steps=500; may be repeated.",
)
@click.option(
    "--budget",
    metavar="NAME",
    help="Sizes and steps: laptop (for a new name), workstation, paper, as_suite.",
)
@click.option("--change", is_flag=True, help="Train a known name again with other settings.")
def train(
    name: str,
    folder: Path | None,
    assignments: tuple[str, ...],
    budget: str | None,
    change: bool,
) -> None:
    """Train on FOLDER, images of your own, as the category folder_NAME; then test and report.

    The folder is checked first, as by `almrr check`. Its settings go to params.yaml and to the
    suite `own` in conf/, next to the categories that are there; DVC then runs what is missing.
    After a failure or an interruption params.yaml and conf/ are as before, and the same command
    goes on where it stopped. A NAME that is known needs no FOLDER.

    \b
    Examples:
      almrr train parts photographs/parts
      almrr train parts photographs/parts -S data.tiling.enabled=true -S train.steps=2000
      almrr train parts
    """  # noqa: D301
    from almrr_pipeline.own_data.runs import train_surface

    _echo(train_surface(_project(), name, folder, assignments, budget=budget, change=change))


@almrr.command(short_help="Metrics and errors of a trained category on its test images.")
@click.argument("name")
def test(name: str) -> None:
    """Evaluate the category NAME, or folder_NAME, and print its figures.

    \b
    Example:
      almrr test parts
    """  # noqa: D301
    from almrr_pipeline.own_data.runs import evaluate_surface

    _echo(evaluate_surface(_project(), name))


@almrr.command(short_help="The page with the results of all categories.")
def report() -> None:
    """Write data/08_reporting/report.html, if it is not up to date."""
    from almrr_pipeline.own_data.runs import make_report

    _echo(make_report(_project()))


@almrr.command(short_help="Overlays, scores and verdicts for images.")
@_model_folder
@_images
@click.option("-o", "--output", type=_folder, required=True, help="Folder for the results.")
@_recursive
@click.option(
    "--maps",
    type=click.Choice(["npy", "png", "none"]),
    default="none",
    help="Also write the anomaly maps: npy is float32 in [0, 1], png is 16-bit gray.",
)
@click.option("--no-overlays", is_flag=True, help="No overlays: scores.csv comes much sooner.")
@click.option(
    "--threshold",
    type=_Number(0.0, 1.0),
    metavar="SCORE",
    help="Call an image anomalous above this score, in place of the model's threshold.",
)
@click.option(
    "--pixel-threshold",
    type=_Number(0.0, 1.0),
    metavar="VALUE",
    help="Outline where the map is above this value, in place of the model's threshold.",
)
@_predictor_options
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: verdicts in Parquet, on the cluster at RAY_ADDRESS or all cores of this machine.",
)
@click.option("--only-anomalous", is_flag=True, help="ray: overlays and maps of anomalous images.")
@click.option(
    "--actor-cpus",
    type=_Number(0.1, 1024),
    default=2.0,
    help="ray: cores of each process that holds the model; GPUs are one each.",
)
def predict(
    model_folder: Path,
    images: tuple[Path, ...],
    output: Path,
    recursive: bool,
    maps: Literal["npy", "png", "none"],
    no_overlays: bool,
    threshold: float | None,
    pixel_threshold: float | None,
    overwrite: bool,
    engine: Literal["local", "ray"],
    only_anomalous: bool,
    actor_cpus: float,
    **options: Any,  # noqa: ANN401 - those of _predictor_options
) -> None:
    """Predict IMAGES (images, or folders of images) with the model in MODEL_FOLDER.

    \b
    The output folder receives
      scores.csv   image, score, threshold, is_anomalous (score > threshold)
      overlays/    each image with its heat, its outlined defects and the verdict
      maps/        the anomaly maps, with --maps

    \b
    Examples:
      almrr predict data/06_models/sample_brick/seed_0 photographs/ -o results
      almrr predict model/ a.png b.jpg -o results --maps png
      almrr predict model/ line_3/ -o results -r --device cuda --batch-size 32
      almrr predict model/ photographs/ -o results --threshold 0.35 --overwrite

    An image that cannot be read is reported, the others are predicted all the same, and the exit
    code is 1. Results appear in the output folder only when all are complete.

    With --engine ray IMAGES and the output may be in a bucket (s3://...), IMAGES may be a list
    (Parquet, column image), and the output is verdicts/part-N.parquet. An interrupted run goes on
    where it was; an image that cannot be read is a row with the reason.

    \b
    Exit codes: 0 every image was predicted, anomalous or not;
                1 something was wrong, or an image could not be read;
                2 the command line was wrong.
    """  # noqa: D301
    from almrr_pipeline.inference.inference_config import InferenceConfig
    from almrr_pipeline.reporting.predict_files import check_output, find_images, predict_files

    config = InferenceConfig.load(model_folder)
    options |= {"image_threshold": threshold, "pixel_threshold": pixel_threshold}
    if engine == "ray":
        from almrr_pipeline.evaluation.thresholds import describe_alarms
        from almrr_pipeline.scale.predict_archive import Job, predict_archive

        job = Job(
            model=str(model_folder.absolute()),
            output=_address(output),
            images=tuple(map(_address, images)),
            recursive=recursive,
            overlays=not no_overlays,
            maps=maps,
            only_anomalous=only_anomalous,
            predictor=options,
        )
        totals = predict_archive(job, cpus=actor_cpus, overwrite=overwrite)
        click.echo(
            f"{totals.images} images: {totals.anomalous} anomalous, {totals.unreadable} could not "
            f"be read.\nVerdicts: {job.output}/verdicts"
        )
        _warn(totals.drift)
        if threshold is None:
            read = totals.images - totals.unreadable
            _echo(describe_alarms(config.image_threshold, totals.anomalous, read))
        return
    if only_anomalous:
        raise click.UsageError("--only-anomalous is for --engine ray.")
    paths = find_images(images, recursive=recursive)
    check_output(output, paths, overwrite=overwrite)

    from almrr_pipeline.inference.predictor import Predictor

    predictor = Predictor(model_folder, **options)
    summary = predict_files(
        predictor, paths, output, overlays=not no_overlays, maps=maps, overwrite=overwrite
    )
    _print_summary(summary, predictor, output, chosen=threshold is not None)
    if options["value_range"]:
        click.echo(_state_range(options["value_range"]))
    _warn(summary.describe_drift())
    _report_unreadable(summary)


@almrr.command(short_help="What is stale by dvc.yaml, several stages at once.")
@click.argument("targets", nargs=-1)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 1024),
    help="Stages at once with --engine processes; by default by cores, memory and GPUs.",
)
@click.option(
    "--engine",
    type=click.Choice(["processes", "ray"]),
    default="processes",
    help="processes of this machine, or tasks of the Ray cluster at RAY_ADDRESS.",
)
@click.option("-f", "--force", is_flag=True, help="Run stages that are up to date too.")
def repro(
    targets: tuple[str, ...],
    jobs: int | None,
    engine: Literal["processes", "ray"],
    force: bool,
) -> None:
    """Run what is stale, as `dvc repro` does, with several categories side by side.

    TARGETS are stages such as train@sample_brick-0; without any, all. Outputs, dvc.lock and caches
    are those of `dvc repro`. Lines that the stages log are shown, all that they printed is in
    .almrr/logs. A stage that fails leaves the others going.

    \b
    Examples:
      almrr repro --jobs 2
      almrr repro train@sample_brick-0 --force
      RAY_ADDRESS=head:6379 almrr repro --engine ray

    \b
    Exit codes: 0 everything is up to date;
                1 a stage failed, and is named with the reason;
                2 the command line was wrong.
    """  # noqa: D301
    from almrr_pipeline.kedro_support.repro import reproduce_project

    reproduce_project(targets, jobs=jobs, engine=engine, force=force, report=click.echo)


@almrr.command(short_help="New thresholds from normal images of your own.")
@_model_folder
@_images
@click.option(
    "--false-alarm-rate",
    type=_Number(0.0, 1.0, min_open=True, max_open=True),
    default=0.05,
    help="Largest fraction of normal images that may be called anomalous.",
)
@_recursive
@_predictor_options
def calibrate(
    model_folder: Path,
    images: tuple[Path, ...],
    false_alarm_rate: float,
    recursive: bool,
    **options: Any,  # noqa: ANN401 - those of _predictor_options
) -> None:
    """Choose new thresholds for the model in MODEL_FOLDER, from IMAGES of normal surfaces.

    The images must be free of defects, must not have been trained on, and should come from the
    process that will be watched: the thresholds guarantee a false-alarm rate for images like these.
    At least 1/rate - 1 are needed, 19 for 0.05; copies of an image count once. The thresholds
    in inference.json are replaced, and --value-range is stored with them. Where DVC owns
    the folder, copy it first.

    \b
    Example:
      almrr calibrate models/brick_line_3/ normal/line_3/ --false-alarm-rate 0.01
    """  # noqa: D301
    from almrr_pipeline.inference.inference_config import InferenceConfig
    from almrr_pipeline.reporting.predict_files import find_images

    config = InferenceConfig.load(model_folder)
    check_writable(model_folder)
    paths = find_images(images, recursive=recursive)

    from almrr_pipeline.inference.calibration import calibrate as choose
    from almrr_pipeline.inference.predictor import Predictor

    predictor = Predictor(model_folder, **options)
    maps, smoothing = predictor.map_predictor, config.smoothing
    thresholds = choose(maps, paths, smoothing=smoothing, false_alarm_rate=false_alarm_rate)
    predictor.config.model_copy(update={"thresholds": thresholds}).save(model_folder)
    if options["value_range"]:
        click.echo(_state_range(options["value_range"]) + " It is stored with the model.")
    for name, threshold in (("Image", thresholds.image), ("Pixel", thresholds.pixel)):
        click.echo(f"{name} threshold {threshold.value:.6g}. {threshold.guarantee}")


@almrr.command(short_help="Files that run without this package: ONNX, OpenVINO, torch.export.")
@_model_folder
@click.option(
    "--format",
    "file_format",
    type=click.Choice(list(EXPORT_SUFFIXES)),
    required=True,
    help="onnx for onnxruntime and others, openvino for OpenVINO, torch for torch.export.load.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; CATEGORY.onnx, .xml or .pt2 in the current folder if not given.",
)
@click.option(
    "--complete",
    is_flag=True,
    help="Image of any size in; map, score and verdict out, as almrr predict. Not for torch.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def export(
    model_folder: Path, file_format: str, output: Path | None, complete: bool, overwrite: bool
) -> None:
    """Export the model in MODEL_FOLDER, fused, to a file that runs without this package.

    OpenVINO's .xml has its weights in a .bin next to it.

    \b
    The exported model takes float32 RGB in [0, 1] of shape (batch, 3, rows, columns),
    any batch, rows and columns as in `almrr info`, and returns anomaly maps of shape
    (batch, rows, columns). inference.json in MODEL_FOLDER holds the thresholds.
    With --complete it takes one image, uint8 RGB of shape (H, W, 3), any H and W, and
    returns map (H, W), score and, where the model has a threshold, is_anomalous.

    \b
    Examples:
      almrr export data/06_models/sample_brick/seed_0 --format onnx
      almrr export data/06_models/sample_brick/seed_0 --format torch --output brick.pt2
    """  # noqa: D301
    from almrr_pipeline.inference.inference_config import InferenceConfig

    if complete and file_format == "torch":
        raise click.UsageError("--complete is for the formats onnx and openvino.")
    config = InferenceConfig.load(model_folder)
    target = output or Path(Path(config.category).name + EXPORT_SUFFIXES[file_format])
    if target.exists() and not overwrite:
        raise AlmrrError(f"{target} exists; name another file, or replace it with --overwrite.")
    check_target_file(target)

    from almrr_pipeline.inference.export import export_onnx, export_openvino, export_torch
    from almrr_pipeline.model.almrr import ALMRR

    model, whole = ALMRR.load(model_folder), config if complete else None
    if file_format == "torch":
        export_torch(model, target, flips=config.flips)
    else:
        write = {"onnx": export_onnx, "openvino": export_openvino}[file_format]
        write(model, target, flips=config.flips, complete=whole)
    rows, columns = config.image_size
    files = {target, target.with_suffix(".bin")} if file_format == "openvino" else {target}
    size = sum(file.stat().st_size for file in files) / 2**20
    taken = "(H, W, 3), uint8" if complete else f"(batch, 3, {rows}, {columns})"
    click.echo(f"Wrote {target}: {size:.1f} MiB, input {taken}.")


@almrr.command(short_help="An HTTP server for a model.")
@_model_folder
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 for any free one.")
@click.option(
    "--max-mb",
    type=_Number(0.0, min_open=True),
    default=32.0,
    help="Largest request, in megabytes.",
)
@click.option(
    "--max-megapixels",
    type=_Number(0.0, min_open=True),
    default=50.0,
    help="Largest image; a smaller limit of the model's own counts.",
)
@click.option(
    "--timeout",
    type=_Number(0.0, min_open=True),
    default=30.0,
    help="Seconds until an answer, or 503.",
)
@_predictor_options
def serve(
    model_folder: Path,
    host: str,
    port: int,
    max_mb: float,
    max_megapixels: float,
    timeout: float,
    **options: Any,  # noqa: ANN401 - those of _predictor_options
) -> None:
    """Answer HTTP requests with the model in MODEL_FOLDER; `Ready` when it is warm.

    \b
    POST /predict  JSON {"images": [base64 or data URI, ...]}, multipart/form-data with files, or an
                   image file as the body; ?overlay=1 and ?map=1 add images to the answer
    GET /health    200 when it answers
    GET /model     version, threshold, guarantee
    GET /metrics   counters for Prometheus

    \b
    Examples:
      almrr serve data/06_models/sample_brick/seed_0
      curl -F image=@photograph.png http://127.0.0.1:8000/predict
    """  # noqa: D301
    from almrr_pipeline.inference.inference_config import InferenceConfig

    InferenceConfig.load(model_folder)

    from almrr_pipeline.inference.predictor import Predictor
    from almrr_pipeline.serving.server import Limits, Service
    from almrr_pipeline.serving.server import serve as listen

    limits = Limits(megabytes=max_mb, megapixels=max_megapixels, seconds=timeout)
    service = Service(model_folder, Predictor(model_folder, **options), limits)
    listen(service, host=host, port=port, on_ready=lambda url: click.echo(f"Ready: {url}"))


@almrr.command(short_help="A model's network, thresholds and their guarantee.")
@_model_folder
def info(model_folder: Path) -> None:
    """Describe the model in MODEL_FOLDER: network, input, thresholds, guarantee, parameters.

    \b
    Example:
      almrr info data/06_models/sample_brick/seed_0
    """  # noqa: D301
    from almrr_pipeline.inference.describe import describe_model

    click.echo(describe_model(model_folder))


@almrr.command(short_help="Deliver to MLflow what it has not received yet.")
def sync() -> None:
    """Deliver what runs have logged while MLflow's server was away or its database locked.

    Such runs end as they would have; what they log waits in .almrr/tracking of the project. The
    next tracked run delivers it as well.

    \b
    Example:
      almrr sync
    """  # noqa: D301
    from almrr_pipeline.kedro_support.config_loader import project_root
    from almrr_pipeline.kedro_support.sync import deliver_waiting

    click.echo(deliver_waiting(project_root()))


@almrr.command(short_help="All categories that can be fetched, with their licenses.")
def categories() -> None:
    """List the categories that this package can fetch, and the license of each.

    Any of them can be listed under `categories` in params.yaml; images of your own are folder_NAME.
    """
    from almrr_pipeline.datasets.registry import dataset_for, known_categories

    by_license: dict[str, list[str]] = {}
    for name in known_categories():
        by_license.setdefault(dataset_for(name).license, []).append(name)
    for terms, names in by_license.items():
        text = click.wrap_text(terms, 100, initial_indent="    ", subsequent_indent="    ")
        click.echo("\n".join([*names, text, ""]))


def main() -> None:
    """Run the command line; the entry point of the console script."""
    # Threads of OpenMP that wait sleep, before torch starts them: while they spin they take the
    # cores from the threads that decode images, and from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    almrr(prog_name="almrr")


def _project() -> Path:
    """The project around the working directory; ModuleNotFoundError without DVC, which runs it."""
    import_module("dvc")
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").is_file() and (folder / "conf" / "config.yaml").is_file():
            return folder
    raise AlmrrError("There is no params.yaml here; run this in the folder of the project.")


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _print_summary(summary: Summary, predictor: Predictor, output: Path, *, chosen: bool) -> None:
    from almrr_pipeline.evaluation.thresholds import describe_alarms

    count, threshold = len(summary.verdicts), predictor.image_threshold
    stored = predictor.config.image_threshold
    if threshold is None:
        reason = stored.undefined if stored else "the model was never calibrated"
        missing = f"there is no threshold ({reason}). Give one by --threshold."
        click.echo(f"{count} images scored, none judged: {missing}")
    else:
        anomalous = sum(verdict.is_anomalous is True for verdict in summary.verdicts)
        click.echo(f"{count} images: {anomalous} anomalous, {count - anomalous} normal.")
        chosen_here = "Chosen by --threshold, without a guarantee."
        guarantee = stored.guarantee if stored and not chosen else chosen_here
        click.echo(f"Threshold {threshold:.6g}. {guarantee}")
        if not chosen:
            _echo(describe_alarms(stored, anomalous, count))
    highest = max(summary.verdicts, key=lambda verdict: verdict.score)
    click.echo(f"Highest score {highest.score:.6g}: {escape_name(highest.image)}")
    click.echo(f"Results: {escape_name(output)}")


def _warn(text: str | None) -> None:
    if text:
        click.echo(f"WARNING: {text}", err=True)


def _state_range(ends: tuple[float, float]) -> str:
    return (
        f"Images of more than 8 bits: {ends[0]:g} is black and {ends[1]:g} white, by "
        "--value-range, in place of the model's range."
    )


def _address(path: Path) -> str:
    """An absolute path, or the address that click took for a path (s3:/bucket for s3://bucket)."""
    scheme, colon, rest = path.as_posix().partition(":/")
    if colon and len(scheme) > 1 and scheme.isalnum():
        return f"{scheme}://{rest.lstrip('/')}"
    return str(path.absolute())


def _report_unreadable(summary: Summary) -> None:
    """Name the images that could not be read and exit with 1, if there are any."""
    if count := len(summary.unreadable):
        named = ", ".join(
            escape_name(image) for image in [*summary.unreadable][:_LISTED_UNREADABLE]
        )
        more = f" and {count - _LISTED_UNREADABLE} more" if count > _LISTED_UNREADABLE else ""
        total = count + len(summary.verdicts)
        raise AlmrrError(f"{count} of {total} images could not be read: {named}{more}.")


def __getattr__(name: str) -> click.Command:
    """`cli` and `run`, which Kedro looks for in this module; late, as they import all of Kedro."""
    if name not in {"cli", "run"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from almrr_pipeline.kedro_support import command

    found: click.Command = getattr(command, name)
    return found


if __name__ == "__main__":
    main()
