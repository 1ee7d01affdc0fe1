from __future__ import annotations

import logging
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from almrr_pipeline import cli
from almrr_pipeline.common import progress
from almrr_pipeline.config import ScanBackend
from almrr_pipeline.datasets.registry import dataset_for, known_categories
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.tta import FlipAveraged
from almrr_pipeline.model.almrr import ALMRR


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Ten small images, one in a sub-folder."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photo graphs"
    (folder / "deeper").mkdir(parents=True)
    for name in [*(f"{position}.png" for position in range(9)), "deeper/9.png"]:
        Image.fromarray(generator.integers(0, 256, size=(40, 60, 3), dtype=np.uint8)).save(
            folder / name
        )
    return folder


@pytest.fixture(autouse=True)
def _logging_is_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli.almrr, [str(argument) for argument in arguments], prog_name="almrr"
    )


# --- predict ---


def test_predict_writes_scores_and_overlays(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    result = _run(
        "predict", model_folder, photographs, "--output", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 9
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 9
    assert not (tmp_path / "out" / "maps").exists()


def test_predict_looks_into_sub_folders_and_writes_maps(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    arguments = (
        "predict",
        model_folder,
        photographs,
        "-o",
        tmp_path / "out",
        "-r",
        "--maps",
        "npy",
        "--no-overlays",
    )
    assert _run(*arguments, "--batch-size", 3, "--scan-backend", "torch").exit_code == 0
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"scores.csv", "maps"}
    assert (tmp_path / "out" / "maps" / "deeper" / "9.npy").is_file()


def test_the_summary_counts_and_states_the_guarantee(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    result = _run("predict", model_folder, photographs, "-o", tmp_path / "out")
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    anomalous = int(scores["is_anomalous"].sum())
    assert f"9 images: {anomalous} anomalous, {9 - anomalous} normal." in result.stdout
    assert "Threshold 0.5. A new image" in result.stdout
    assert "at most 5.00%" in result.stdout
    assert (
        Path(scores["image"][scores["score"].idxmax()]).name
        in result.stdout.partition("Highest score")[2]
    )


@pytest.mark.parametrize(("threshold", "anomalous"), [(0, 9), (1, 0)])
def test_a_chosen_threshold_decides_and_loses_the_guarantee(
    model_folder: Path, photographs: Path, tmp_path: Path, threshold: int, anomalous: int
) -> None:
    result = _run(
        "predict", model_folder, photographs, "-o", tmp_path / "out", "--threshold", threshold
    )
    assert f"9 images: {anomalous} anomalous" in result.stdout
    assert "without a guarantee" in result.stdout
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv")["threshold"]) == {threshold}


def test_without_threshold_nothing_is_judged(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(model_folder, tmp_path / "model")
    InferenceConfig(category="sample_brick", image_size=(128, 128)).save(bare)
    result = _run("predict", bare, photographs, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "9 images scored, none judged" in result.stdout


def test_progress_is_plain_lines_off_a_terminal(
    model_folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process without pytest
    result = _run("predict", model_folder, photographs, "-r", "-o", tmp_path / "out")
    lines = [line for line in result.stderr.splitlines() if "images" in line]
    expected = [f"INFO: predict: {done} images ({done}0 %)" for done in range(1, 11)]
    assert [line.partition(", ")[0] for line in lines] == expected


def _read_terminal(descriptor: int, *, until: bytes) -> bytes:
    """Read what a terminal shows: the kernel hands it over in pieces, some after the write."""
    shown = b""
    while until not in shown and select.select([descriptor], [], [], 10)[0]:
        shown += os.read(descriptor, 100_000)
    return shown


def test_progress_is_a_bar_on_a_terminal(
    model_folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    termios = pytest.importorskip("termios", reason="Windows has no such terminals")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 100))  # a new one has no width, and no bar fits into that
    arguments = [
        "predict",
        str(model_folder),
        str(photographs),
        "-o",
        str(tmp_path / "out"),
        "--no-overlays",
    ]
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        cli.almrr(arguments, standalone_mode=False)
        terminal.flush()
        shown = _read_terminal(ours, until=b"9/9")
    os.close(ours)
    assert b"###" in shown or "███".encode() in shown
    assert b"9/9" in shown


def test_unreadable_images_make_the_exit_code_1_and_the_rest_is_done(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    (photographs / "4.png").write_text("no image")
    result = _run("predict", model_folder, photographs, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 of 9 images could not be read" in result.stderr
    assert str(photographs / "4.png") in result.stderr
    assert "Traceback" not in result.output
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 8


def test_many_unreadable_images_are_counted(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    for position in range(30):
        (photographs / f"bad{position:02d}.png").touch()
    result = _run("predict", model_folder, photographs, "-o", tmp_path / "out", "--no-overlays")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: 30 of 39 images could not be read")
    assert last.count("bad") == 20
    assert last.endswith("and 10 more.")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["predict", "nowhere", "{photographs}", "-o", "{out}"], "nowhere does not exist"),
        (
            ["predict", "{photographs}", "{photographs}", "-o", "{out}"],
            "is no model folder: model.safetensors",
        ),
        (["predict", "{model}", "nowhere", "-o", "{out}"], "no image or folder at nowhere"),
        (["predict", "{model}", "{model}", "-o", "{out}"], "holds no image"),
        (["predict", "{model}", "{photographs}", "-o", "{model}"], "holds other files"),
        (
            ["predict", "{model}", "{photographs}", "-o", "{out}", "--device", "cuda:99"],
            "device 'cuda:99' cannot be used",
        ),
        (["info", "nowhere"], "nowhere does not exist"),
        (["export", "nowhere", "--format", "onnx"], "nowhere does not exist"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence_and_exit_code_1(
    model_folder: Path, photographs: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    places = {"model": model_folder, "photographs": photographs, "out": tmp_path / "out"}
    result = _run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "model"],
        ["predict", "model", "images"],
        ["predict", "model", "images", "-o", "out", "--batch-size", "0"],
        ["predict", "model", "images", "-o", "out", "--threshold", "-1"],
        ["predict", "model", "images", "-o", "out", "--maps", "tiff"],
        ["export", "model"],
        ["retrain"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert "Usage: almrr" in result.stderr


# --- calibrate ---


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(model_folder, tmp_path / "own model")


def test_calibrate_keeps_its_promise_on_the_images_themselves(
    own_model: Path, photographs: Path, tmp_path: Path
) -> None:
    result = _run("calibrate", own_model, photographs, "--false-alarm-rate", 0.2)
    assert result.exit_code == 0, result.output
    assert "averaged over the choice of the 9 normal validation images" in result.stdout
    _run("predict", own_model, photographs, "-o", tmp_path / "out")
    # Rank ceil(10 x 0.8) = 8 of 9: one of the nine is above.
    assert pd.read_csv(tmp_path / "out" / "scores.csv")["is_anomalous"].sum() == 1


def test_calibrate_changes_nothing_but_the_thresholds(own_model: Path, photographs: Path) -> None:
    before = InferenceConfig.load(own_model)
    _run("calibrate", own_model, photographs, "-r", "--batch-size", 3)
    after = InferenceConfig.load(own_model)
    assert after.model_copy(update={"thresholds": before.thresholds}) == before
    assert after.thresholds is not None
    assert (after.thresholds.image.normals, after.thresholds.image.rate) == (10, 0.05)


def test_calibrate_stops_at_an_unreadable_image(own_model: Path, photographs: Path) -> None:
    before = (own_model / "inference.json").read_bytes()
    (photographs / "4.png").write_text("no image")
    result = _run("calibrate", own_model, photographs)
    assert result.exit_code == 1
    assert "4.png cannot be read" in result.stderr
    assert (own_model / "inference.json").read_bytes() == before


# --- export, info, categories ---


def test_export_is_named_after_the_category_and_replaces_only_on_demand(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "sample_brick.pt2"
    target.write_text("precious")
    refused = _run("export", model_folder, "--format", "torch")
    assert refused.exit_code == 1
    assert "sample_brick.pt2 exists" in refused.stderr
    assert target.read_text() == "precious"
    result = _run("export", model_folder, "--format", "torch", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "Wrote sample_brick.pt2" in result.stdout
    assert "(batch, 3, 128, 128)" in result.stdout
    program = torch.export.load(target).module()
    images = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(program(images), ALMRR.load(model_folder)(images), atol=1e-4, rtol=0)


def test_export_follows_the_models_settings(model_folder: Path, tmp_path: Path) -> None:
    folder, target = tmp_path / "flips", tmp_path / "flips.pt2"
    shutil.copytree(model_folder, folder)
    InferenceConfig.load(folder).model_copy(update={"flips": True}).save(folder)
    result = _run("export", folder, "--format", "torch", "--output", target)
    assert result.exit_code == 0, result.output
    images = torch.rand(2, 3, 128, 128)
    expected = FlipAveraged(ALMRR.load(folder).eval())(images)
    torch.testing.assert_close(
        torch.export.load(target).module()(images), expected, atol=1e-4, rtol=0
    )


def test_info_describes_the_model(model_folder: Path) -> None:
    result = _run("info", model_folder)
    assert result.exit_code == 0
    assert "ALMRR model of sample_brick" in result.stdout
    assert "at most 5.00%" in result.stdout


def test_categories_lists_all_with_their_licenses() -> None:
    output = _run("categories").stdout
    lines = output.splitlines()
    assert sorted(line for line in lines if line and not line.startswith(" ")) == sorted(
        known_categories()
    )
    words = " ".join(output.split())
    for name in known_categories():
        assert " ".join(dataset_for(name).license.split()) in words.partition(name)[2]


# --- help ---


@pytest.mark.parametrize("command", ["predict", "calibrate", "export", "info"])
def test_help_teaches_by_examples(command: str) -> None:
    text = _run(command, "--help").stdout
    assert "Example" in text
    assert re.search(rf"^ +almrr {command} ", text, flags=re.MULTILINE)


def test_every_documented_command_line_is_valid(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    texts = [cli.almrr.help or "", *(command.help or "" for command in cli.almrr.commands.values())]
    texts.append((project / "docs" / "predict.md").read_text(encoding="utf-8"))
    for command in cli.almrr.commands.values():
        monkeypatch.setattr(command, "callback", lambda **_: None)
    lines = re.findall(r"^ +almrr (.+)$", "\n".join(texts), flags=re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        result = _run(*shlex.split(line))
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_scan_backends_are_those_of_the_parameters() -> None:
    assert get_args(ScanBackend) == cli.SCAN_BACKENDS


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from almrr_pipeline.cli import almrr; "
        "almrr(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'PIL', 'pydantic', 'mlflow', 'kedro'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "[]"
