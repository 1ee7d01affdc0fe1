from __future__ import annotations

import json
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

DOCS = ("data.md", "predict.md")


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


def test_export_is_named_after_the_category_and_follows_the_models_settings(
    flips_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "sample_brick.pt2"
    target.write_text("precious")
    refused = _run("export", flips_model_folder, "--format", "torch")
    assert refused.exit_code == 1
    assert "sample_brick.pt2 exists" in refused.stderr
    assert target.read_text() == "precious"
    result = _run("export", flips_model_folder, "--format", "torch", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "Wrote sample_brick.pt2" in result.stdout
    assert "(batch, 3, 128, 128)" in result.stdout
    images = torch.rand(2, 3, 128, 128)
    expected = FlipAveraged(ALMRR.load(flips_model_folder).eval())(images)
    given = torch.export.load(target).module()(images)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("command", ["check", "predict", "calibrate", "export", "info"])
def test_help_teaches_by_examples(command: str) -> None:
    text = _run(command, "--help").stdout
    assert "Example" in text
    assert re.search(rf"^ +almrr {command} ", text, flags=re.MULTILINE)


def test_every_documented_command_line_is_valid(
    monkeypatch: pytest.MonkeyPatch, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "photographs").mkdir()
    monkeypatch.chdir(tmp_path)
    texts = [cli.almrr.help or "", *(command.help or "" for command in cli.almrr.commands.values())]
    texts += [(project / "docs" / name).read_text(encoding="utf-8") for name in DOCS]
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


# --- bad input ---


def _without_root(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `almrr` with the rights of an ordinary user: root may write everywhere."""
    command = [sys.executable, "-m", "almrr_pipeline.cli", *map(str, arguments)]
    if os.name == "posix" and os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("command", ["calibrate", "export", "predict", "check"])
def test_a_read_only_target_is_named_before_the_work(
    own_model: Path, photographs: Path, tmp_path: Path, command: str
) -> None:
    locked = own_model if command == "calibrate" else tmp_path / "locked"
    locked.mkdir(exist_ok=True)
    (own_model / "model.safetensors").write_bytes(b"damaged")  # would be found by any work
    locked.chmod(0o555)
    arguments = {
        "calibrate": (own_model, photographs),
        "export": (own_model, "--format", "torch", "-o", locked / "x.pt2"),
        "predict": (own_model, photographs, "-o", locked / "out"),
        "check": (photographs, "--html", locked / "x.html"),
    }
    done = _without_root(command, *arguments[command])
    assert done.returncode == 1
    assert re.match(rf"Error: {re.escape(str(locked))}.* cannot be written", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_text_are_escaped_and_keep_their_results(
    model_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    for old, new in (("0.png", b"f\xfcr.png"), ("1.png", b"\xff\xfe.png")):
        (photographs / old).rename(photographs / os.fsdecode(new))
    (photographs / os.fsdecode(b"bad\xe9.png")).write_bytes(b"x")
    result = _run("predict", model_folder, photographs, "-o", tmp_path / "out")
    assert result.exit_code == 1  # one could not be read
    assert r"bad\xe9.png" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    names = [Path(name).name for name in pd.read_csv(tmp_path / "out/scores.csv")["image"]]
    assert {r"f\xfcr.png", r"\xff\xfe.png", "2.png"} <= set(names)
    assert len(list((tmp_path / "out/overlays").iterdir())) == len(names) == 9


_BAD_NUMBERS = ("nan", "inf", "-inf", "-1", "1.5", "1e400", "x", "")


@pytest.mark.parametrize("number", _BAD_NUMBERS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "model", "images", "-o", "out", "--threshold"),
        ("predict", "model", "images", "-o", "out", "--pixel-threshold"),
        ("predict", "model", "images", "-o", "out", "--batch-size"),
        ("calibrate", "model", "images", "--false-alarm-rate"),
        ("calibrate", "model", "images", "--batch-size"),
        ("check", ".", "--image-size"),
        ("predict", "model", "images", "-o", "out", "--actor-cpus"),
        ("check", ".", "--mask-value"),
        ("check", ".", "--max-megapixels"),
        ("predict", "model", "images", "-o", "out", "--value-range", "0"),
        ("calibrate", "model", "images", "--value-range", "2"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_number_that_is_none_or_out_of_range_is_exit_code_2(
    arguments: tuple[str, ...], number: str
) -> None:
    if number == "1.5" and arguments[-1] in ("--max-megapixels", "0", "--actor-cpus"):
        number = "-0.5"  # 1.5 is none of their bad numbers
    result = _run(*arguments, number)
    assert result.exit_code == 2
    assert next(word for word in reversed(arguments) if word.startswith("-")) in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        (("thresholds", "image", "value"), float("nan")),
        (("thresholds", "image", "value"), -0.1),
        (("thresholds", "pixel", "value"), float("inf")),
        (("thresholds", "pixel", "rate"), 7),
        (("thresholds", "image", "normals"), -3),
        (("thresholds", "image", "guaranteed_rate"), float("nan")),
        (("smoothing",), 10**9),
        (("smoothing",), 0),
        (("image_size",), [float("nan"), 128]),
        (("tiling", "scale"), float("nan")),
        (("tiling", "overlap"), float("inf")),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["info", "predict", "calibrate", "export"])
def test_a_wrong_number_in_inference_json_is_one_sentence(
    own_model: Path, photographs: Path, tmp_path: Path, command: str, keys, number: float
) -> None:
    content = json.loads((own_model / "inference.json").read_text())
    *outer, last = keys
    place = content
    for key in outer:
        place = place[key]
    place[last] = number
    (own_model / "inference.json").write_text(json.dumps(content))
    more = {
        "info": (),
        "predict": (photographs, "-o", tmp_path / "out"),
        "calibrate": (photographs,),
        "export": ("--format", "torch", "-o", tmp_path / "x.pt2"),
    }
    result = _run(command, own_model, *more[command])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert str(own_model / "inference.json") in result.stderr
    assert last in result.stderr
    assert len(result.stderr.splitlines()) == 1


def _bad_places(tmp_path: Path) -> dict[str, Path]:
    """What may stand where a model, images or an output is expected."""
    tmp_path.joinpath("empty").mkdir()
    tmp_path.joinpath("file").write_bytes(b"x")
    tmp_path.joinpath("loop").symlink_to("loop")
    tmp_path.joinpath("broken").mkdir()
    for name in ("model.safetensors", "config.json", "inference.json"):
        tmp_path.joinpath("broken", name).write_bytes(b"\xff\x00{")
    tmp_path.joinpath("folders").mkdir()
    for name in ("model.safetensors", "config.json", "inference.json", "a.png"):
        tmp_path.joinpath("folders", name).mkdir()
    long = tmp_path / ("x" * 300)
    names = ("empty", "file", "loop", "broken", "folders", "absent")
    return {**{name: tmp_path / name for name in names}, "long": long, "device": Path("/dev/null")}


_PLACES = ("empty", "file", "loop", "broken", "folders", "absent", "long", "device")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links and devices")
@pytest.mark.parametrize("place", _PLACES)
def test_no_command_ends_in_a_traceback(
    model_folder: Path, photographs: Path, tmp_path: Path, place: str
) -> None:
    bad = _bad_places(tmp_path)[place]
    below = tmp_path / "file" / "out"
    calls = [
        ("info", bad),
        ("predict", bad, photographs, "-o", tmp_path / "o1"),
        ("predict", model_folder, bad, "-o", tmp_path / "o2"),
        ("predict", model_folder, photographs / "absent.png", "-o", bad),
        ("predict", model_folder, photographs, "-o", below),
        ("calibrate", bad, photographs),
        ("calibrate", model_folder, bad),
        ("export", bad, "--format", "torch"),
        ("export", model_folder, "--format", "torch", "-o", below),
        ("export", model_folder, "--format", "torch", "-o", bad / "x" / "y.pt2"),
        ("serve", bad, "--port", 0),
        ("check", bad),
        ("check", photographs, "--html", bad / "x" / "y.html"),
    ]
    for arguments in calls:
        result = _run(*arguments)
        assert result.exit_code in (1, 2), arguments
        assert result.exception is None or isinstance(result.exception, SystemExit), arguments
        assert "Error: " in result.stderr or "error: " in result.stdout, arguments
        assert "Traceback" not in result.output, arguments


# --- check ---


def test_check_prints_what_is_used_and_exits_with_1_at_errors(
    photographs: Path, tmp_path: Path
) -> None:
    root = tmp_path / "parts"
    shutil.copytree(photographs, root / "train" / "good")
    page = tmp_path / "page.html"
    sound = _run("check", root, "--html", page)
    assert sound.exit_code == 0, sound.output
    assert re.search(r"train +good +10 images", sound.stdout)
    assert "warning: the test has no normal image" in sound.stdout
    assert page.read_text(encoding="utf-8").count("<figure>") == 6
    assert _run("check", root, "--strict").exit_code == 1
    shutil.copytree(photographs, root / "test" / "good")
    spoiled = _run("check", root)
    assert spoiled.exit_code == 1
    assert "the same image is in test and train" in spoiled.stdout
    assert _run("check", tmp_path / "nowhere").exit_code == 2


@pytest.fixture
def deep_folder(tmp_path: Path) -> Path:
    """Images of 12 bits in 16, and a mask of the classes 100 and 200."""
    root, generator = tmp_path / "deep", np.random.default_rng(0)
    for place in ("train/good/0.png", "test/good/1.png", "test/hole/2.png"):
        (root / place).parent.mkdir(parents=True)
        values = generator.integers(0, 4096, (128, 128)).astype(np.uint16)
        Image.fromarray(values).save(root / place)
    mask = np.zeros((128, 128), np.uint8)
    mask[:32, :32], mask[64:96, :64] = 100, 200  # 1/16 and 1/8 of the image
    (root / "masks/hole").mkdir(parents=True)
    Image.fromarray(mask).save(root / "masks/hole/2.png")
    return root


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 1, "values from 100 to 100 would be dropped"),
        (("--mask-value", 100), 0, "1 masks: 1 regions, 6.25% to 6.25% of an image"),
        (("--mask-value", 100, "--mask-value", 200), 0, "2 regions, 18.75% to 18.75%"),
        (("--mask-threshold", 150), 0, "1 regions, 12.50% to 12.50%"),
        (("--mask-threshold", 50, "--value-range", 0, 4000), 0, "0 is black, 4000 is white"),
        (("--mask-threshold", 50), 0, "uint16: 0 is black, 4095 is white"),
        (("--mask-threshold", 50, "--max-megapixels", 0.016), 1, "more than 0.016 megapixels"),
        (("--mask-threshold", 50, "--max-megapixels", 0.017), 0, "2 regions, 18.75%"),
    ],
)
def test_the_options_of_check_are_those_of_the_settings(
    deep_folder: Path, options: tuple[object, ...], code: int, said: str
) -> None:
    result = _run("check", deep_folder, *options)
    assert said in result.stdout
    assert result.exit_code == code, result.output


def test_predict_and_calibrate_take_a_range_of_values(
    own_model: Path, deep_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gray = np.asarray(Image.open(deep_folder / "train/good/0.png")) * (255 / 4095)
    Image.fromarray(np.rint(gray).astype(np.uint8)).save(tmp_path / "gray.png")

    def predict(folder: str, *options: object) -> Result:
        images = (deep_folder / "train/good/0.png", tmp_path / "gray.png")
        target = ("-o", tmp_path / folder, "--no-overlays")
        return _run("predict", own_model, *images, *target, *options)

    uncertain = predict("without")
    assert uncertain.exit_code == 1
    assert "cannot be told from one image; state them" in caplog.text
    stated = predict("with", "--value-range", 0, 4095)
    assert stated.exit_code == 0, stated.output
    assert "0 is black and 4095 white, by --value-range" in stated.stdout
    scores = pd.read_csv(tmp_path / "with/scores.csv")["score"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)

    stored = _run("calibrate", own_model, deep_folder / "train/good", "--value-range", 0, 4095)
    assert stored.exit_code == 0, stored.output
    assert InferenceConfig.load(own_model).reading.value_ranges == {"any": (0, 4095)}
    assert predict("stored").exit_code == 0
