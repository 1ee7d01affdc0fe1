"""The benchmark of prediction from files: its ways run, and its ratios are those of its rates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_our_ways_run_from_files_to_results(project: Path) -> None:
    command = [sys.executable, "benchmarks/prediction.py", "--quick", "--rivals"]
    printed = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed[0] == "## From 4 JPEG files of 700 x 700 to maps, cpu"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed[4:]]
    assert {row[0] for row in rows} == {
        "ours, torch",
        "ours, torch, flips",
        "ours, torch, files written as `almrr predict --no-overlays` does",
        "ours, torch, files written as `almrr predict` does",
    }
    for _, precision, images, rate, *ratios in rows:
        assert (precision, images, ratios) == ("float32", "4", ["-", "-"])
        assert float(rate.split()[0]) > 0


def test_ours_is_divided_by_the_fastest_rival_and_by_the_fastest_in_float32(
    load_benchmark: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_benchmark("prediction")

    def way(name: str, rates: list[float], **options: object) -> object:
        return module.Way(name, len, rates=rates, images=8, **options)

    module.print_table(
        [
            way("slow", [1.0, 2.0, 9.0]),
            way("half precision", [5.0, 4.0, 3.0], precision="bfloat16"),
            way("ours", [20.0, 8.0, 10.0], is_ours=True),
            way("float", [2.5, 2.5, 2.5]),
        ]
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0] == ["| ours", "float32", "8", "10.00 (9.00-15.00)", "2.50", "4.00 |"]
    assert [row[0] for row in rows[1:]] == ["| half precision", "| float", "| slow"]


def test_images_are_made_as_asked(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = load_benchmark("prediction")
    paths = module.write_images(tmp_path / "images", 4, 96)
    images = [module.Image.open(path) for path in paths]
    assert {(image.format, image.size, image.mode) for image in images} == {
        ("JPEG", (96, 96), "RGB")
    }
    assert len({path.read_bytes() for path in paths}) == 4
