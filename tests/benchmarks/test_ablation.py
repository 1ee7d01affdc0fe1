"""Variants of the settings are compared on development images alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from almrr_pipeline.config import load_parameters


@pytest.fixture
def ablation(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("ablation")


def test_a_composition_is_dvcs(ablation: ModuleType, project: Path) -> None:
    composed = ablation.compose("sample", [], None)
    assert composed == load_parameters(project / "params.yaml")
    changed = ablation.compose("sample", ["train.steps=7", "model.decoder=[8,16]"], "elsewhere")
    assert (changed.train.steps, changed.model.decoder) == (7, (8, 16))
    assert changed.data.mirror == "elsewhere"


def test_development_images_are_the_same_half_of_the_specimens_whatever_else_is_there(
    ablation: ModuleType,
) -> None:
    rows = [
        {"image": f"{number}.png", "specimen": f"tile {number // 4}", "split": split}
        for split in ("train", "test")
        for number in range(400)
    ]
    manifest = pd.DataFrame(rows)
    chosen = ablation.development_half(manifest)
    assert set(chosen["split"]) == {"test"}
    specimens = set(chosen["specimen"])
    assert 30 <= len(specimens) <= 70
    # All images of a specimen are on one side.
    assert len(chosen) == 4 * len(specimens)
    fewer = manifest[manifest["specimen"] != "tile 5"]
    assert set(ablation.development_half(fewer)["specimen"]) == specimens - {"tile 5"}


def test_without_specimens_the_images_are_split(ablation: ModuleType) -> None:
    rows = [{"image": f"{n}.png", "specimen": "", "split": "test"} for n in range(200)]
    assert 60 <= len(ablation.development_half(pd.DataFrame(rows))) <= 140


def test_variants_are_trained_and_tabulated(
    ablation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first training in a process of its own, the others here: imports take longer."""
    options = ["ablation.py", "--category", "sample_gravel", "--seeds", "0", "1"]
    values = ["train.steps=2", "synthesis.samples=16", "inference.flips=false"]
    values += ["data.image_size=[128,128]", "model.latent=16", "model.dim=16", "model.depth=1"]
    values += ["model.decoder=[8,8]", "model.refinement_width=4", "train.batch_size=4"]
    options += [option for value in values for option in ("--set", value)]
    options += ["--device", "cpu", "--output", str(tmp_path)]
    options += ["--variant", "base:", "--variant", "fine:model.fine_channels=2;train.steps=1"]
    monkeypatch.setattr(sys, "argv", options)
    in_process = ablation.run_worker
    lines: list[str] = []

    def run(job: dict[str, Any]) -> str:
        if lines:
            ablation.train_variant(job)
        lines.append("" if lines else in_process(job))
        return lines[-1]

    monkeypatch.setattr(ablation, "run_worker", run)
    ablation.main()
    assert "base, seed 0: image_auroc" in lines[0]
    printed = capsys.readouterr().out
    head, _, *rows = printed[printed.index("| variant") :].splitlines()
    assert "image_auroc" in head
    assert "pixel_ap" in head
    assert "image_auroc by top 3 %" in head
    assert [row.split("|")[1].strip() for row in rows] == ["base", "fine"]
    runs = sorted((tmp_path / "runs").glob("*/metrics.json"))
    assert [run.parent.name for run in runs] == ["base-0", "base-1", "fine-0", "fine-1"]
    values = [json.loads(run.read_text())["pixel_ap"] for run in runs]
    assert len(set(values)) == 4
    # The two seeds' sets are shared by the variants; the mean stands before the range.
    assert len(list((tmp_path / "sets").iterdir())) == 2
    cell = rows[0].split("|")[1 + head.split("|")[1:].index(" pixel_ap ")]
    low, high = sorted(values[:2])
    assert cell.strip() == f"{sum(values[:2]) / 2:.3f} [{low:.3f}, {high:.3f}]"
