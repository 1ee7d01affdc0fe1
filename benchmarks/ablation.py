r"""Variants of the settings, each trained with several seeds, compared on development data.

    python benchmarks/ablation.py --suite mt_defect --category mt_defect_tiles \
        --data ../shared/data --set model.latent=128 --variant base: \
        --variant "residual:model.residual_channels=8;model.prior=0.02" --seeds 0 1 --jobs 2

Decisions about the model are made here, so no image of the record half is opened: development
images are the test images of half of the specimens, chosen by a hash of the specimen's name
(`development_half`). A dataset without specimens is split by image. The command ends with a table,
a row per variant: image AUROC, pixel AUROC, pixel AP, AUPRO 0.3, those of each defect type, and the
image AUROC by other image scores; mean over the seeds, and their range in brackets. Each training
runs in a process of its own with one thread, `--jobs` at a time; synthetic sets are shared by the
variants that agree in all that they are made from. Fetched images and synthetic sets stay in the
output folder for the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import yaml

from almrr_pipeline.config import (
    EvaluateSettings,
    Parameters,
    merge_values,
    parse_parameters,
)
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.manifest import build_manifest, training_split
from almrr_pipeline.datasets.registry import dataset_for, fetch_category, fetch_textures
from almrr_pipeline.datasets.weights import fetch_backbone
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.inference.predictor import image_score
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet, synthesize
from almrr_pipeline.synthesis.writer import ImagePaths
from almrr_pipeline.training.checkpoints import Resuming
from almrr_pipeline.training.train import fit

CONF = Path(__file__).resolve().parents[1] / "conf"
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30")
NO_BOOTSTRAP = EvaluateSettings(aupro_limits=(0.3, 0.05), bootstrap=0)


def main() -> None:
    """Fetch, synthesize, train all variants, print the table."""
    arguments = parse_arguments()
    if arguments.worker:
        train_variant(json.loads(arguments.worker))
        return
    variants = dict(read_variant(each) for each in arguments.variant)
    settings = {
        name: compose(arguments.suite, [*arguments.set, *values], arguments.data)
        for name, values in variants.items()
    }
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for parameters in settings.values():
        manifest = fetch(arguments.category, parameters, output)
    jobs = []
    for name, parameters in settings.items():
        for seed in arguments.seeds:
            jobs.append(
                {
                    "variant": name,
                    "seed": seed,
                    "category": arguments.category,
                    "parameters": parameters.model_dump(mode="json"),
                    "synthetic_set": str(make_set(parameters, seed, manifest, output)),
                    "output": str(output),
                    "device": arguments.device,
                    "steps": parameters.train.steps,
                }
            )
    begun = time.monotonic()
    # Long trainings first, so that none of them is left alone at the end.
    jobs.sort(key=lambda job: -job["steps"])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(run_worker, jobs):
            print(f"{time.monotonic() - begun:6.0f} s  {line}", flush=True)
    print(tabulate(output, list(settings), arguments.seeds))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="sample")
    parser.add_argument("--category", default="sample_grass")
    parser.add_argument("--data", help="folder or base address that is asked first (data.mirror)")
    parser.add_argument("--set", action="append", default=[], help="name=value, for all variants")
    parser.add_argument("--variant", action="append", default=[], help="NAME:name=value;name=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("build/ablation"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.variant = arguments.variant or ["base:"]
    return arguments


def read_variant(text: str) -> tuple[str, list[str]]:
    """Split NAME:name=value;name=value."""
    name, _, values = text.partition(":")
    return name, [each for each in values.split(";") if each]


def compose(suite: str, values: Sequence[str], mirror: str | None) -> Parameters:
    """Merge conf/config.yaml, a suite and single values, as `dvc exp run -S` does."""
    merged = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    merged.pop("defaults")
    laid_over = yaml.safe_load((CONF / "suite" / f"{suite}.yaml").read_text(encoding="utf-8"))
    merged = merge_values(merged, laid_over)
    merged = merge_values(merged, {"data": {"mirror": mirror}})
    for each in values:
        name, _, value = each.partition("=")
        nested: Any = yaml.safe_load(value)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        merged = merge_values(merged, nested)
    return parse_parameters(merged)


def fetch(category: str, parameters: Parameters, output: Path) -> pd.DataFrame:
    """Images, textures and backbone in the output folder, and the manifest; each fetched once."""
    request = FetchRequest(output / "downloads", parameters.data)
    fetched = {
        category: lambda folder: fetch_category(category, target=folder, request=request),
        "textures": lambda folder: fetch_textures(
            parameters.data.textures, target=folder, request=request
        ),
        f"backbone_{parameters.backbone.name}": lambda folder: fetch_backbone(
            parameters.backbone, target=folder
        ),
    }
    for name, fill in fetched.items():
        if not (output / name).is_dir():
            (output / f"{name}.part").mkdir(parents=True)
            fill(output / f"{name}.part")
            (output / f"{name}.part").rename(output / name)
    listed = output / f"{category}.csv"
    if not listed.is_file():
        dataset = dataset_for(category)
        manifest = build_manifest(
            dataset.items(category, output / category),
            root=output,
            expected=dataset.expected(category),
            strict=False,
        )
        manifest.to_csv(listed, index=False)
    return pd.read_csv(listed, keep_default_na=False)


def make_set(parameters: Parameters, seed: int, manifest: pd.DataFrame, output: Path) -> Path:
    """The synthetic set of these parameters; made once for all variants that agree in them."""
    training, validation = training_split(manifest, fraction=parameters.data.validation_fraction)
    decisive = {
        "synthesis": parameters.synthesis.model_dump(mode="json"),
        "data": parameters.data.model_dump(mode="json"),
        "images": [training, validation],
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    folder = output / "sets" / key
    if not folder.is_dir():
        textures = [path for path in sorted((output / "textures").rglob("*")) if path.is_file()]
        images = ImagePaths(
            root=output,
            training=[output / name for name in training],
            validation=[output / name for name in validation],
            textures=[path for path in textures if path.suffix in {".png", ".jpg"}],
        )
        part = folder.with_suffix(".part")
        part.mkdir(parents=True)
        synthesize(
            images,
            parameters.synthesis,
            folder=part,
            image_size=parameters.data.image_size,
            tiling=parameters.data.tiling,
            seed=seed,
        )
        part.rename(folder)
    return folder


def run_worker(job: dict[str, Any]) -> str:
    """Train and evaluate in a process of its own; returns a line about it."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    label = f"{job['variant']}, seed {job['seed']}"
    if done.returncode:
        return f"{label}: failed\n{done.stderr[-3000:]}"
    return f"{label}: {done.stdout.strip().splitlines()[-1]}"


def train_variant(job: dict[str, Any]) -> None:
    """Train one variant with one seed, and write its metrics, and scores of several kinds."""
    output, seed = Path(job["output"]), job["seed"]
    parameters = parse_parameters(job["parameters"])
    torch.manual_seed(seed)
    backbone = output / f"backbone_{parameters.backbone.name}" / "backbone.safetensors"
    model = ALMRR(
        build_backbone(parameters.backbone, weights=backbone),
        parameters.model,
        image_size=parameters.data.image_size,
    )
    folder = output / "runs" / f"{job['variant']}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call, maybe of another category
    folder.mkdir(parents=True)
    manifest = pd.read_csv(output / f"{job['category']}.csv", keep_default_na=False)
    begun = time.monotonic()
    history = fit(
        model,
        SyntheticSet.load(Path(job["synthetic_set"])),
        parameters.train,
        resuming=Resuming(folder / "checkpoints", json.dumps(job["parameters"], sort_keys=True)),
        seed=seed,
        specimens=dict(zip(manifest["image"], manifest["specimen"], strict=True)),
    )
    seconds = time.monotonic() - begun
    if history is None:
        raise SystemExit("one process is expected, not a distributed training")
    history.to_csv(folder / "history.csv", index=False)
    rows = development_half(manifest)
    predictor = MapPredictor.build(
        model, parameters.inference, tiling=parameters.data.tiling, device=job["device"]
    )
    maps_folder = folder / "maps"
    maps_folder.mkdir()
    for scaled in predictor.maps([output / name for name in rows["image"]]):
        np.save(maps_folder / f"{scaled.index:06d}.npy", scaled.anomaly_map)
    results = {**measure(rows, maps_folder, output, parameters), "seconds": seconds}
    (folder / "metrics.json").write_text(json.dumps(results), encoding="utf-8")
    shown = ", ".join(f"{name} {results[name]:.3f}" for name in METRICS if results.get(name))
    print(f"{shown} ({seconds:.0f} s of training)")


def development_half(manifest: pd.DataFrame) -> pd.DataFrame:
    """The test images of about half of the specimens; without specimens, half of the images."""
    test = manifest[manifest["split"] == "test"]
    names = test["specimen"].where(test["specimen"] != "", test["image"])
    digests = [hashlib.sha256(f"development {name}".encode()).digest()[0] for name in names]
    return test[np.array(digests) < 128].reset_index(drop=True)


def measure(
    rows: pd.DataFrame, maps_folder: Path, root: Path, parameters: Parameters
) -> dict[str, float]:
    """Metrics of the development images, and the image AUROC of each kind of image score."""
    maps = AnomalyMaps.load(maps_folder)
    truth = GroundTruth([root / name if name else None for name in rows["mask"]], maps)
    scores = [image_score(each, parameters.inference.smoothing) for each in maps]
    defective = rows["label"] == "defective"
    metrics = evaluate(
        maps,
        truth,
        pd.Series(scores),
        defective,
        list(rows["defect_type"]),
        NO_BOOTSTRAP,
        thresholds=(None, None),
        seed=0,
    ).metrics
    results = {name: metrics.get(name) for name in METRICS}
    for name, one in metrics.get("defect_types", {}).items():
        results[f"image_auroc {name}"] = one.get("image_auroc")
        results[f"pixel_ap {name}"] = one.get("pixel_ap")
    for name, values in score_kinds(maps).items():
        results[f"image_auroc by {name}"] = rank(values, np.asarray(defective))
    return {name: value for name, value in results.items() if value is not None}


def score_kinds(maps: AnomalyMaps) -> dict[str, npt.NDArray[np.float64]]:
    """Image scores besides the maximum: means of the largest values, and the mean of all."""
    fractions = {"top 0.1 %": 0.001, "top 1 %": 0.01, "top 3 %": 0.03, "top 10 %": 0.1, "mean": 1.0}
    kinds: dict[str, list[float]] = {name: [] for name in fractions}
    for each in maps:
        ordered = np.sort(each, axis=None)[::-1].astype(np.float64)
        for name, fraction in fractions.items():
            kinds[name].append(float(ordered[: max(1, int(fraction * ordered.size))].mean()))
    return {name: np.array(values) for name, values in kinds.items()}


def rank(scores: npt.NDArray[np.float64], defective: npt.NDArray[np.bool_]) -> float | None:
    """Image AUROC, None where only one class is present."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(defective, scores)) if 0 < defective.sum() < len(scores) else None


def tabulate(output: Path, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """A Markdown table, a row per variant: means over the seeds, and their range in brackets."""
    rows = {}
    for name in variants:
        files = [output / "runs" / f"{name}-{seed}" / "metrics.json" for seed in seeds]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        runs = pd.DataFrame(found)
        if len(runs):
            rows[name] = {
                column: f"{runs[column].mean():.3f} [{runs[column].min():.3f}, "
                f"{runs[column].max():.3f}]"
                for column in runs
            }
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    heads = ["variant", *map(str, table.columns)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {name} | {' | '.join(map(str, row))} |" for name, row in table.iterrows()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
