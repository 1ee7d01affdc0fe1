"""Real trainings for benchmarks/gpu.py: from images in folders to metrics, maps and overlays.

The stages are those of the pipelines, called without Kedro: fetch, synthesize, train, calibrate,
evaluate. Each dataset takes the settings of its suite. The number of steps is chosen so that the
training ends in time: from the time of a step in a short training before, unless `train.steps` of
the suite is reached earlier. A training that takes longer nevertheless is stopped, and what it has
learned is evaluated. Synthetic sets are made, and metrics computed, in processes beside.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ablation import compose, fetch, make_set
from gpu import Record, free_memory
from PIL import Image

from almrr_pipeline.common.images import read_image
from almrr_pipeline.config import Parameters
from almrr_pipeline.datasets.manifest import training_split
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth, tabulate_scores
from almrr_pipeline.inference.calibration import calibrate
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.inference.predictor import image_score
from almrr_pipeline.inference.tta import average_flips
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.reporting.examples import Result, draw_examples, pack_examples
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.checkpoints import Resuming
from almrr_pipeline.training.train import TrainingInterrupted, fit

CATEGORIES = {"mt_defect": "mt_defect_tiles", "nanotwice": "nanotwice"}
"""Of MT-defect the split by specimen, in which no tile is trained on and tested."""
RESERVE = 45.0
"""Seconds that a dataset needs besides `fit`: fusing, calibration, maps, metrics."""
PROBE_STEPS, PROBE_WINDOW = 100, 20
"""Length of the training that measures the time of a step, and of its windows."""
MARGIN = 0.96
"""Of the time left that the chosen number of steps fills."""
MAPS_BYTES = 14e6
"""Of a dataset's maps, as float16 before compression."""
TINY = (
    "data.image_size=[128,128]", "synthesis.samples=8", "model.latent=16", "model.dim=16",
    "model.depth=1", "model.state=4", "model.decoder=[8,8]", "model.refinement_width=4",
    "train.steps=4", "train.batch_size=2", "train.log_every=1", "evaluate.bootstrap=10",
    "backbone.name=test_resnet", "backbone.stride_in_1x1=false", "train.accelerator=cpu",
)  # fmt: skip
SHOWN = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")


@dataclass
class Training:
    """A dataset with its settings, and the folder where everything about it is."""

    name: str
    parameters: Parameters
    folder: Path

    @property
    def category(self) -> str:
        """The id of its category."""
        return CATEGORIES[self.name]


def train_all(arguments: argparse.Namespace, record: Record) -> None:
    """Train on one dataset after the other, as they are ready; others are prepared or evaluated."""
    logging_to_stdout()
    names = arguments.datasets.split(",")
    minutes = {k: float(v) for k, _, v in (one.partition("=") for one in arguments.minutes)}
    trainings = [plan(name, arguments) for name in names]
    evaluations: dict[str, Future[dict[str, Any]]] = {}
    processes = 1 if arguments.tiny else len(names) + 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        prepared = {pool.submit(prepare, one, arguments.seed): one for one in trainings}
        for place, ready in enumerate(as_completed(prepared, timeout=max(1.0, record.left()))):
            one = prepared[ready]
            with record.attempt(f"training on {one.name}"):
                manifest, synthetic_set, seconds = ready.result()
                record.put(**{f"{one.name}: seconds to fetch and to synthesize": seconds})
                remaining = len(names) - place
                left = record.left() - RESERVE * remaining
                share = min(left, 60 * minutes.get(one.name, left / remaining / 60))
                model = train_one(one, synthetic_set, share, arguments, record)
                predict(one, model, manifest, arguments, record)
                evaluations[one.name] = pool.submit(
                    evaluate_one, one, manifest, arguments.seed, arguments.output
                )
            free_memory()
        for name, evaluation in evaluations.items():
            with record.attempt(f"evaluation of {name}"):
                report(name, evaluation.result(timeout=max(1.0, record.left())), record)


def logging_to_stdout() -> None:
    """Show the package's own log."""
    import logging
    import sys

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="  %(name)s: %(message)s")
    logging.getLogger("numba").setLevel(logging.WARNING)


def plan(name: str, arguments: argparse.Namespace) -> Training:
    """The settings: the suite's, those of this machine, and those of the command line."""
    weights = next(iter(sorted((arguments.data / "weights").glob("*.pth"))))
    processes = max(1, (os.cpu_count() or 1) // 2)  # two synthetic sets are made side by side
    values = [
        f"backbone.weights={weights}",
        "backbone.stride_in_1x1=true",
        "train.checkpoint_every=1000000",
        "train.devices=1",
        f"synthesis.workers={processes}",
        *(TINY if arguments.tiny else ()),
        *(one.partition(":")[2] for one in arguments.set if one.partition(":")[0] == name),
    ]
    folder = arguments.scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    return Training(name, compose(name, values, str(arguments.data)), folder)


def prepare(training: Training, seed: int) -> tuple[pd.DataFrame, Path, float]:
    """Fetch from the folders and make the synthetic set; returns manifest, set and seconds."""
    begun = time.monotonic()
    manifest = fetch(training.category, training.parameters, training.folder)
    synthetic_set = make_set(training.parameters, seed, manifest, training.folder)
    return manifest, synthetic_set, round(time.monotonic() - begun, 1)


def build(training: Training, seed: int) -> ALMRR:
    """An untrained model."""
    parameters = training.parameters
    weights = training.folder / f"backbone_{parameters.backbone.name}" / "backbone.safetensors"
    frozen = build_backbone(parameters.backbone, weights=weights)
    torch.manual_seed(seed)
    return ALMRR(frozen, parameters.model, image_size=parameters.data.image_size)


def train_one(
    training: Training, folder: Path, seconds: float, arguments: argparse.Namespace, record: Record
) -> ALMRR:
    """Train for about so many seconds, the probe included; writes history.csv."""
    begun = time.monotonic()
    synthetic_set = SyntheticSet.load(folder)
    model, settings = build(training, arguments.seed), training.parameters.train
    step, overhead = probe(copy.deepcopy(model), synthetic_set, training, arguments.seed)
    left = seconds - (time.monotonic() - begun)
    possible = int(MARGIN * (left - overhead) / step)
    steps = max(2, min(settings.steps, possible))
    settings = settings.model_copy(update={"steps": steps})
    rows: list[dict[str, float]] = []
    started, ended, done = time.monotonic(), "completed", steps
    with stopped_after(left + 5):
        try:
            fit(
                model,
                synthetic_set,
                settings,
                resuming=Resuming(training.folder / "checkpoints", "benchmark"),
                seed=arguments.seed,
                on_metrics=lambda at, values: rows.append({"step": at, **values}),
            )
        except TrainingInterrupted as stop:
            ended = str(stop)
            done = int("".join(filter(str.isdigit, ended)))
    took = time.monotonic() - started
    pd.DataFrame(rows).to_csv(training.folder / "history.csv", index=False)
    last = rows[-1] if rows else {}
    record.row(
        "training", dataset=training.name, steps=steps, done=done, batch=settings.batch_size,
        precision=settings.precision, deterministic=settings.deterministic,
        samples=len(synthetic_set),
        epochs=done * settings.batch_size / len(synthetic_set), ms_a_step=1e3 * took / max(1, done),
        probed_ms=1e3 * step, probed_overhead_s=overhead, seconds=took,
        images_per_second=done * settings.batch_size / took,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        loss=last.get("loss"), reconstruction=last.get("reconstruction"),
        refinement=last.get("refinement"), ended=ended,
    )  # fmt: skip
    record.put(**{f"{training.name}: parameters": training.parameters.redacted()})
    return model


def probe(
    model: ALMRR, synthetic_set: SyntheticSet, training: Training, seed: int
) -> tuple[float, float]:
    """Seconds of a step, and of what a training costs besides, by a short one."""
    steps, window = PROBE_STEPS, PROBE_WINDOW
    if training.parameters.train.steps < PROBE_STEPS:
        steps, window = 4, 1
    changes = {"steps": steps, "log_every": window, "selection": "last"}
    settings = training.parameters.train.model_copy(update=changes)
    ends: list[float] = []
    begun = time.monotonic()
    fit(
        model, synthetic_set, settings, resuming=Resuming(training.folder / "probe", "probe"),
        seed=seed, on_metrics=lambda _, values: ends.append(time.monotonic()),
    )  # fmt: skip
    total = time.monotonic() - begun
    # The first window has what is done once: algorithms are chosen, kernels compiled.
    steady = (ends[-1] - ends[0]) / (window * (len(ends) - 1)) if len(ends) > 2 else 0.0
    step = steady if 0 < steady <= total / steps else total / steps
    return step, max(0.0, total - steps * step)


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Ask the training to end by SIGTERM when the time is over; it then keeps its weights."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # once `fit` is over
    timer = threading.Timer(max(1.0, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGTERM, before)


def predict(
    training: Training,
    model: ALMRR,
    manifest: pd.DataFrame,
    arguments: argparse.Namespace,
    record: Record,
) -> None:
    """Calibrate, save the model, and write the maps of the test images."""
    parameters, root = training.parameters, training.folder
    data, inference = parameters.data, parameters.inference
    begun = time.monotonic()
    predictor = build_predictor(training, model, arguments.device, record)
    fused = time.monotonic()
    _, validation = training_split(manifest, fraction=data.validation_fraction)
    thresholds = calibrate(
        predictor,
        [root / name for name in validation],
        smoothing=inference.smoothing,
        false_alarm_rate=inference.false_alarm_rate,
    )
    calibrated = time.monotonic()
    for name in ("model", "maps"):
        (root / name).mkdir()
    model.save(root / "model")
    InferenceConfig(
        category=training.category,
        image_size=data.image_size,
        tiling=data.tiling,
        smoothing=inference.smoothing,
        flips=inference.flips,
        thresholds=thresholds,
    ).save(root / "model")
    images = [root / name for name in manifest.loc[manifest["split"] == "test", "image"]]
    started = time.monotonic()
    for scaled in predictor.maps(images):
        np.save(root / "maps" / f"{scaled.index:06d}.npy", scaled.anomaly_map)
    took = time.monotonic() - started
    record.row(
        "prediction", dataset=training.name, images=len(images), flips=inference.flips,
        tiling=data.tiling.enabled, batch=inference.batch_size, seconds=took,
        images_per_second=len(images) / took, fuse_s=fused - begun, calibrate_s=calibrated - fused,
        validation_images=len(validation),
    )  # fmt: skip


def build_predictor(training: Training, model: ALMRR, device: str, record: Record) -> MapPredictor:
    """The predictor; should fusing fail, with the model as it is, so that no training is lost."""
    inference, tiling = training.parameters.inference, training.parameters.data.tiling
    with record.attempt(f"fusing the model of {training.name}"):
        return MapPredictor.build(model, inference, tiling=tiling, device=device)
    network = average_flips(copy.deepcopy(model).eval(), inference.flips).to(device)
    size, target = model.image_size, torch.device(device)
    return MapPredictor(network, size, tiling, inference.batch_size, target)


def evaluate_one(
    training: Training, manifest: pd.DataFrame, seed: int, output: Path
) -> dict[str, Any]:
    """Metrics of a dataset; writes NAME.zip and NAME_maps.npz into the output folder."""
    parameters, root, begun = training.parameters, training.folder, time.monotonic()
    rows = manifest[manifest["split"] == "test"].reset_index(drop=True)
    stored = InferenceConfig.load(root / "model").thresholds
    if stored is None:
        raise ValueError(f"the model of {training.name} has no thresholds; calibrate it first")
    maps = AnomalyMaps.load(root / "maps")
    truth = GroundTruth([root / name if name else None for name in rows["mask"]], maps)
    smoothing, pixel = parameters.inference.smoothing, stored.pixel.value
    scored = [image_score(anomaly_map, smoothing) for anomaly_map in maps]
    scores = tabulate_scores(rows, maps, truth, scores=scored, threshold=stored.image.value)
    evaluation = evaluate(
        maps,
        truth,
        scores["score"],
        scores["label"] == "defective",
        list(scores["defect_type"]),
        parameters.evaluate,
        thresholds=(stored.image, stored.pixel),
        seed=seed,
    )
    metrics = {**evaluation.metrics, "seconds": round(time.monotonic() - begun, 1)}
    places = {image: place for place, image in enumerate(rows["image"])}

    def load(image: str) -> Result:
        return read_image(root / image), truth[places[image]], maps[places[image]]

    count = parameters.report.examples
    files = dict(pack_examples(draw_examples(scores, count=count, load=load, threshold=pixel)))
    files["metrics.json"] = json.dumps(metrics, indent=1, default=str).encode()
    files["scores.csv"] = scores.to_csv(index=False).encode()
    files["history.csv"] = (root / "history.csv").read_bytes()
    files["inference.json"] = (root / "model" / "inference.json").read_bytes()
    files["parameters.json"] = json.dumps(parameters.redacted(), indent=1).encode()
    files |= {f"{name}.csv": thin(curve) for name, curve in evaluation.curves.items()}
    with zipfile.ZipFile(output / f"{training.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    write_maps(output / f"{training.name}_maps.npz", maps, list(rows["image"]))
    return metrics


def thin(curve: pd.DataFrame, most: int = 2000) -> bytes:
    """A curve of at most so many points, as CSV."""
    places = (
        np.unique(np.linspace(0, len(curve) - 1, most).round().astype(int)) if len(curve) else []
    )
    return curve.iloc[places].to_csv(index=False).encode()


def write_maps(path: Path, maps: AnomalyMaps, names: Sequence[str]) -> None:
    """Maps as float16, shrunk by a common factor until they take no more than `MAPS_BYTES`."""
    cells = sum(int(np.prod(maps.size(place))) for place in range(len(maps)))
    factor = max(1, int(np.ceil(np.sqrt(2 * cells / MAPS_BYTES))))
    arrays: dict[str, Any] = {}
    for place, name in enumerate(names):
        size = tuple(max(1, side // factor) for side in maps.size(place))
        small = Image.fromarray(maps[place]).resize(size[::-1], Image.Resampling.BOX)
        arrays[name.replace("/", "__")] = np.asarray(small, dtype=np.float16)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    path.write_bytes(packed.getvalue())


def report(name: str, metrics: Mapping[str, Any], record: Record) -> None:
    """Rows of the metrics, over all images and by defect type."""
    thresholds, counts = metrics["thresholds"], metrics["counts"]
    chosen = {key: metrics.get(key) for key in SHOWN}
    rates = {
        f"{at} {rate}": thresholds[at][rate]["rate"]
        for at in ("image", "pixel")
        for rate in ("false_alarms", "detections")
        if rate in thresholds[at]
    }
    outlined = thresholds["pixel"].get("normal_pixels_outlined")
    record.row("metrics", dataset=name, normal=counts["normal_images"],
               defective=counts["defective_images"], **chosen, **rates,
               normal_pixels_outlined=outlined, seconds=metrics["seconds"])  # fmt: skip
    for defect_type, of_type in metrics["defect_types"].items():
        record.row("defect types", dataset=name, defect_type=defect_type,
                   images=of_type["counts"]["defective_images"],
                   **{key: of_type.get(key) for key in SHOWN},
                   found=(of_type["detections"] or {}).get("rate"))  # fmt: skip
    record.put(**{f"{name}: metrics": metrics})
