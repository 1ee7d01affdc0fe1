"""The command for a machine with a GPU runs through on a CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image

SIDE = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few images in the folders of the real datasets, and a backbone's weights."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)

    def draw(path: Path, *, image_format: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format=image_format)

    def mark(path: Path, *, defective: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[40:70, 50:90] = 255 * defective
        Image.fromarray(mask).save(path)

    for number in range(6):
        draw(folder / f"mt_defect/MT_Free/Imgs/free_{number}.jpg")
        mark(folder / f"mt_defect/MT_Free/Imgs/free_{number}.png", defective=False)
        draw(folder / f"nanotwice/Normal/normal_{number}.tif")
        draw(folder / f"dtd/images/banded/banded_{number}.jpg")
    for number in range(2):
        draw(folder / f"mt_defect/MT_Crack/Imgs/crack_{number}.jpg")
        mark(folder / f"mt_defect/MT_Crack/Imgs/crack_{number}.png", defective=True)
        draw(folder / f"nanotwice/Anomalous/images/ano_{number}.tif")
        mark(folder / f"nanotwice/Anomalous/gt/ano_{number}_gt.png", defective=True)
    (folder / "weights").mkdir()
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save(weights, folder / "weights/test_resnet.pth")
    return folder


def run(project: Path, output: Path, *options: str) -> dict:
    """Run the script; returns its results."""
    command = [sys.executable, project / "benchmarks/gpu.py", "--device", "cpu", "--tiny"]
    command += ["--output", output, "--commit", "abc", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))["sections"]


def test_every_way_is_measured(load_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = load_benchmark("gpu")
    arguments = module.parse(["--device", "cpu", "--tiny"])
    record = module.Record(tmp_path / "found.json", deadline=time.monotonic() + 600)
    for measure in (module.measure_scan, module.measure_steps, module.measure_inference):
        measure(arguments, record)
    module.measure_graphs(arguments, record)
    assert record.errors == []
    assert record.tables["deterministic over not"][0]["ratio"] > 0
    assert record.tables["captured step"][0]["eager_ms"] > 0
    assert {row["dtype"] for row in record.tables["scan"]} == {"float32", "bfloat16"}
    ways = {row["way"] for row in record.tables["training step"]}
    assert ways == {"ours", "authors'", "authors', our scan"}
    ways = {row["way"] for row in record.tables["inference"]}
    assert ways == {"ours, fused", "ours", "authors'", "authors', our scan", "bare backbone"}
    assert json.loads(record.path.read_text(encoding="utf-8"))["tables"].keys() == set(
        record.tables
    )


def test_both_datasets_are_trained_on_and_evaluated(
    project: Path, tmp_path: Path, data: Path
) -> None:
    options = ("--only", "train", "--data", str(data), "--set", "mt_defect:train.steps=3")
    trained = run(project, tmp_path, *options)["train"]
    assert (trained["status"], trained["errors"]) == ("done", [])
    rows = {row["dataset"]: row for row in trained["tables"]["training"]}
    assert (rows["mt_defect"]["steps"], rows["nanotwice"]["steps"]) == (3, 4)
    for row in trained["tables"]["metrics"]:
        assert 0 <= row["pixel_auroc"] <= 1
        maps = np.load(tmp_path / f"{row['dataset']}_maps.npz")
        assert len(maps.files) == 2
        assert all(maps[name].dtype == np.float16 for name in maps.files)
        with zipfile.ZipFile(tmp_path / f"{row['dataset']}.zip") as archive:
            names = set(archive.namelist())
        assert {"metrics.json", "scores.csv", "history.csv", "examples.csv"} <= names
        assert any(name.endswith(".webp") for name in names)
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_section_that_fails_costs_the_others_nothing(project: Path, tmp_path: Path) -> None:
    sections = run(project, tmp_path, "--only", "train,environment", "--data", str(tmp_path))
    assert sections["train"]["status"] == "exit 1"
    assert "there is no weights/*.pth" in sections["train"]["errors"][0]
    assert (sections["environment"]["status"], sections["environment"]["errors"]) == ("done", [])
    units = {row["unit"] for row in sections["environment"]["tables"]["ceilings"]}
    assert units == {"B/s", "FLOP/s"}
    tables = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "### ceilings" in tables
    assert "Commit abc" in tables


def test_a_section_that_takes_too_long_is_ended(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_benchmark("gpu")
    monkeypatch.setattr(module, "GRACE", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny"])
    with (tmp_path / "log.txt").open("w") as log:
        assert module.start_section("step", 1.0, tmp_path, log)["status"] == "skipped"
        monkeypatch.setattr(module, "LEAST", 0.0)
        assert module.start_section("step", 0.3, tmp_path, log)["status"] == "killed"


def test_a_training_that_is_asked_to_end_goes_on_to_its_evaluation(
    load_benchmark: Callable[[str], ModuleType],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with load_benchmark("gpu_training").stopped_after(60.0):
        signal.raise_signal(signal.SIGTERM)  # as the timer does, and `fit` once more at its end
    assert signal.getsignal(signal.SIGTERM) == before
