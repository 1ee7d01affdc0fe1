"""docs/data.md is true: its example runs, its tables are complete, its commands work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.obtain import ArchivedDataset
from almrr_pipeline.datasets.registry import DATASETS, dataset_for, known_categories
from almrr_pipeline.datasets.textures import Dtd

QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def text(project: Path) -> str:
    return (project / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_every_category_and_dataset_is_named(text: str) -> None:
    for name in [*known_categories(), *DATASETS, Dtd.name]:
        assert f"`{name}`" in text


def test_the_counts_are_those_that_are_checked(text: str) -> None:
    rows = [
        row
        for row in text.splitlines()
        if row.startswith(("| `mvtec_ad`", "| `mt_defect`", "| `nanotwice`"))
    ]
    for row in rows:
        _, _, categories, counts, *_ = row.split("|")
        names, numbers = (
            re.findall(r"`((?:mvtec|mt|nano)\w+)`", categories),
            re.findall(r"\d+/\d+/\d+", counts),
        )
        for name, number in zip(
            [name for name in names if name in known_categories()], numbers, strict=True
        ):
            expected = dataset_for(name).expected(name)
            assert expected is not None
            assert number == f"{expected.train}/{expected.test_normal}/{expected.test_defective}"


def test_the_addresses_and_checksums_are_those_that_are_asked(text: str) -> None:
    datasets = [dataset for dataset in DATASETS.values() if isinstance(dataset, ArchivedDataset)]
    lists = [dataset.archives(category) for dataset in datasets for category in dataset.categories]
    archives = {archive for each in [*lists, Dtd().archives(Dtd.name)] for archive in each}
    assert len(archives) == 15 + 4
    for archive in archives:
        if not archive.key.startswith("mvtec_") or archive.key == "mvtec_ad":
            assert f"`{archive.file_name}`" in text
            assert all(address in text for address in archive.addresses)
            assert archive.sha256 is None or archive.sha256 in text


def test_every_row_of_bad_input_is_a_test_and_every_test_is_a_row(text: str, project: Path) -> None:
    rows = set(re.findall(r"\| `(test_\w+)` \|", text))
    tests = re.findall(
        r"^def (test_\w+)",
        (project / "tests/datasets/test_bad_input.py").read_text("utf-8"),
        re.MULTILINE,
    )

    assert rows == set(tests) - {"test_the_archive_without_a_fault_is_taken"}


def test_the_settings_shown_are_understood(text: str) -> None:
    shown = [yaml.safe_load(block) for block in blocks(text, "yaml")]

    assert len(shown) == 3
    for settings in shown:
        DataSettings.model_validate(settings["data"])


def test_the_worked_example_fetches_and_lists_its_images(
    text: str,
    server: Any,
    draw: Any,
    pack: Callable[..., bytes],
    workplace: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespace: dict[str, Any] = {"__name__": "almrr_pipeline.datasets.acme_tiles"}
    exec(compile(blocks(text, "python")[0], "docs/data.md", "exec"), namespace)
    monkeypatch.setitem(DATASETS, "acme_tiles", namespace["AcmeTiles"]())
    for number in range(6):
        draw.image(tmp_path / "tiles" / "train" / f"{number}.png")
    for number in range(5):
        draw.image(tmp_path / "tiles" / "test" / f"{number}.png")
    for number in range(3):
        draw.mask(tmp_path / "tiles" / "test" / f"{number}_GT.png")
    address = server.serve("tiles.zip", pack(tmp_path / "tiles", "zip", inside="acme"))

    manifest = workplace.fetch(
        "acme_tiles", workplace.request(addresses={"acme_tiles": [address]}, strict=True)
    )

    assert manifest.groupby(["split", "defect_type"]).size().to_dict() == {
        ("test", "good"): 2,
        ("test", "scratch"): 3,
        ("train", "good"): 6,
    }


def run(command: str, folder: Path) -> str:
    """Run a command of the page; `dvc` is the one of this Python."""
    words = shlex.split(command)
    words = [sys.executable, "-m", *words] if words[0] == "dvc" else words
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC repository with one tracked file."""
    folder = tmp_path_factory.mktemp("pristine")
    for command in (
        "git init -q",
        "git config user.name a",
        "git config user.email a@b",
        "dvc init -q",
    ):
        run(command, folder)
    (folder / "image.bin").write_bytes(bytes(range(256)) * 40)
    run("dvc add -q image.bin", folder)
    return folder


@pytest.fixture
def repository(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "team" / "first"))


def test_a_local_remote_serves_a_second_clone(text: str, repository: Path) -> None:
    push, pull = blocks(text, "shell")
    for command in push.splitlines():
        run(command, repository)
    run("git add .", repository)
    run("git commit -q -m data", repository)
    second = repository.with_name("second")
    run(f"git clone -q {shlex.quote(str(repository))} {shlex.quote(str(second))}", repository)
    shutil.rmtree(repository / ".dvc" / "cache")

    for command in pull.splitlines():
        run(command, second)

    assert (second / "image.bin").read_bytes() == bytes(range(256)) * 40


def test_the_other_remotes_are_taken_by_dvc(text: str, repository: Path) -> None:
    commands = re.findall(r"\| `(dvc remote add [^`]+)` \|", text)

    assert len(commands) == 4
    for command in commands:
        run(command.replace("add --default", "add --force --default"), repository)
        assert f"url = {command.split()[-1]}\n" in (repository / ".dvc" / "config").read_text()
