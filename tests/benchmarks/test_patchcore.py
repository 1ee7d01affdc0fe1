"""The light PatchCore that ALMRR is measured against: a whole run on drawn images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image


@pytest.fixture
def patchcore(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("baselines/patchcore")


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """NanoTWICE's layout: striped normal images, and test images with a bright square."""
    generator = np.random.default_rng(0)
    for name in ("Normal", "Anomalous/images", "Anomalous/gt"):
        (tmp_path / "nanotwice" / name).mkdir(parents=True)
    for index in range(6):
        image = (
            np.indices((96, 96))[1] // 4 % 2 * 60 + generator.integers(60, 90, (96, 96))
        ).astype(np.uint8)
        if index < 3:
            Image.fromarray(image).save(tmp_path / "nanotwice/Normal" / f"{index}.tif")
            continue
        mask = np.zeros((96, 96), np.uint8)
        mask[30:60, 20:60] = 255
        Image.fromarray(np.where(mask > 0, 255, image).astype(np.uint8)).save(
            tmp_path / "nanotwice/Anomalous/images" / f"{index}.tif"
        )
        Image.fromarray(mask).save(tmp_path / "nanotwice/Anomalous/gt" / f"{index}_gt.png")
    return tmp_path


def test_a_run_finds_a_drawn_defect(patchcore: ModuleType, drawn: Path) -> None:
    torch.manual_seed(0)
    weights = drawn / "weights.pth"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), weights)
    arguments = argparse.Namespace(
        data=drawn,
        category="nanotwice",
        weights=weights,
        backbone="resnet10t",
        stride_in_1x1=False,
        size=96,
        pool=400,
        core=50,
        bootstrap=20,
        seed=0,
        device="cpu",
        json=None,
    )
    figures = patchcore.run(arguments)
    assert figures["pixel_auroc"] > 0.8
    assert figures["undefined"]["image_auroc"] == "no normal test image"
    assert figures["train_images"] == 3
