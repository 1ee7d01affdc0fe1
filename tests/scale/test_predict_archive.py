"""`almrr predict --engine ray` over many images, on disks and in buckets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from almrr_pipeline.cli import almrr
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.scale.archive import Folder, list_archive, read_part, write_listing
from almrr_pipeline.scale.predict_archive import (
    Job,
    PartPredictor,
    Totals,
    _begin,
    predict_archive,
)

if TYPE_CHECKING:
    from almrr_pipeline.inference.predictor import Predictor

pytestmark = pytest.mark.xdist_group("ray")
IMAGES, PART, KINDS = 600, 50, 4
BROKEN = tuple(range(5, IMAGES, 21))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small images made from four, and some that are broken."""
    folder = tmp_path_factory.mktemp("archive") / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for place in range(KINDS):
        pixels = generator.integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place:05d}.png")
    for place in range(KINDS, IMAGES):
        os.link(folder / f"{place % KINDS:05d}.png", folder / f"{place:05d}.png")
    for place in BROKEN:
        (folder / f"{place:05d}.png").unlink()
        (folder / f"{place:05d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    from almrr_pipeline.inference.predictor import Predictor

    return Predictor(model_folder, device="cpu", scan_backend="torch")


def job_of(model: Path, images: Path | str, output: Path | str, **options: Any) -> Job:
    options = {"part_size": PART, "predictor": {"device": "cpu", "scan_backend": "torch"}} | options
    return Job(model=str(model), images=(str(images),), output=str(output), **options)


def read_verdicts(output: Path | str) -> pd.DataFrame:
    return pd.read_parquet(f"{output}/verdicts").sort_values("image", ignore_index=True)


def _kill_one_actor_after_the_first_part(output: Path, killed: list[int]) -> None:
    import psutil

    end = time.monotonic() + 120
    while time.monotonic() < end and not list(output.glob("verdicts/*.parquet")):
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline", "pid"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or [])[:80]:
            os.kill(process.info["pid"], signal.SIGKILL)
            killed.append(process.info["pid"])
            return


def test_each_image_has_one_verdict_though_an_actor_dies(
    ray: Any, model_folder: Path, images: Path, predictor: Predictor, tmp_path: Path
) -> None:
    output, killed = tmp_path / "results", []
    killer = threading.Thread(
        target=_kill_one_actor_after_the_first_part, args=(output, killed), daemon=True
    )
    killer.start()
    totals = predict_archive(job_of(model_folder, images, output), cpus=1)
    killer.join()
    assert killed
    verdicts = read_verdicts(output)
    paths = sorted(images.iterdir())
    assert list(verdicts["image"]) == [str(path) for path in paths]
    kinds = list(predictor(paths[:KINDS]))
    expected = [kinds[place % KINDS] for place in range(IMAGES) if place not in BROKEN]
    missing = verdicts["score"].isna()
    assert list(np.flatnonzero(missing)) == list(BROKEN)
    assert all(str(paths[place]) in verdicts["reason"][place] for place in BROKEN)
    np.testing.assert_allclose(verdicts["score"][~missing], [p.score for p in expected], rtol=1e-4)
    assert list(verdicts["is_anomalous"][~missing]) == [p.is_anomalous for p in expected]
    anomalous = sum(p.is_anomalous is True for p in expected)
    assert totals == Totals(images=IMAGES, unreadable=len(BROKEN), anomalous=anomalous)
    _a_second_run_does_missing_parts_alone(model_folder, images, output)


def _a_second_run_does_missing_parts_alone(model: Path, images: Path, output: Path) -> None:
    files = sorted((output / "verdicts").iterdir())
    assert len(files) == IMAGES // PART
    before = read_verdicts(output)
    files[2].unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    predict_archive(job_of(model, images, output), cpus=1)
    pd.testing.assert_frame_equal(read_verdicts(output), before)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    with pytest.raises(AlmrrError, match="holds a run of another maps, part_size"):
        predict_archive(job_of(model, images, output, part_size=8, maps="png"), cpus=1)


def test_drift_is_warned_of_when_all_parts_are_done(model_folder: Path, tmp_path: Path) -> None:
    from almrr_pipeline.inference.inference_config import InferenceConfig
    from almrr_pipeline.inference.looks import UsualLook

    model = shutil.copytree(model_folder, tmp_path / "model")
    config = InferenceConfig.load(model)
    usual = UsualLook(brightness=(200, 205), contrast=(0, 90), sharpness=(0, 90))
    thresholds = config.thresholds.model_copy(update={"usual": usual})
    config.model_copy(update={"thresholds": thresholds}).save(model)
    (tmp_path / "images").mkdir()
    for place, gray in enumerate((40, 50, 202, 203)):
        Image.new("L", (64, 48), gray).save(tmp_path / f"images/{place}.png")
    (tmp_path / "images" / os.fsdecode(b"4\xff.png")).write_bytes(b"no image")
    options = dict.fromkeys(("value_range", "image_threshold", "pixel_threshold"))
    options |= {"device": "cpu", "scan_backend": "torch", "batch_size": 8, "runtime": "torch"}
    output = tmp_path / "results"
    job = job_of(model, tmp_path / "images", output, part_size=512, predictor=options)
    _begin(job, Folder(job.output), overwrite=False)
    PartPredictor(job, {}).predict(0)  # as an actor does
    command = f"predict {model} {tmp_path / 'images'} -o {output} --engine ray --no-overlays"
    done = CliRunner().invoke(almrr, f"{command} --device cpu --scan-backend torch".split())
    assert done.exit_code == 0, done.output
    assert "WARNING: Of 4 images 2 are darker than the normal images" in done.stderr
    verdicts = read_verdicts(output)
    assert verdicts["unlike"].fillna("").to_list() == ["darker", "darker", "", "", ""]
    assert verdicts["image"].to_list()[4].endswith("4\\xff.png")
    assert "4\\xff.png cannot be read as an image" in verdicts["reason"].to_list()[4]


def test_an_output_folder_with_other_files_is_refused(
    model_folder: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(AlmrrError, match=r"other files, such as thesis\.tex"):
        predict_archive(job_of(model_folder, images, tmp_path), cpus=1)


def test_a_list_of_paths_is_an_archive(images: Path, tmp_path: Path) -> None:
    listed = [str(path) for path in sorted(images.iterdir())[:5]]
    pd.DataFrame({"image": listed}).to_parquet(tmp_path / "list.parquet")
    assert list(list_archive([str(tmp_path / "list.parquet")], recursive=False)) == listed
    pd.DataFrame({"path": listed}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(AlmrrError, match="no list of images"):
        list(list_archive([str(tmp_path / "other.parquet")], recursive=False))
    for wrong in ([1, 2], ["a.png", None], [b"a.png"]):
        pd.DataFrame({"image": wrong}).to_parquet(tmp_path / "other.parquet")
        with pytest.raises(AlmrrError, match="no list of images"):
            list(list_archive([str(tmp_path / "other.parquet")], recursive=False))


@pytest.mark.parametrize("address", ["nonsense://x/y", "http://127.0.0.1:9/x", "ftp://x:y/z"])
def test_a_store_that_cannot_be_reached_is_one_sentence(address: str) -> None:
    with pytest.raises(AlmrrError, match=r"cannot be reached|There is no image"):
        list(list_archive([address], recursive=False))
    with pytest.raises(AlmrrError, match="cannot be reached"):
        Folder(address).write("a", b"")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_an_archive_holds_else_is_counted_by_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    for name in ("a.jfif", "b.heic", "c.txt"):
        (tmp_path / name).touch()
    (found,) = list_archive([scheme + str(tmp_path)], recursive=False)
    assert found.endswith("a.jfif")
    assert "2 files do not have the suffix of an image" in caplog.text
    assert "1 .heic, 1 .txt" in caplog.text


def test_parts_hold_every_image_once_and_in_order(tmp_path: Path) -> None:
    folder, names = Folder(str(tmp_path)), [f"{number}.png" for number in range(25)]
    assert write_listing(names, folder, size=10) == 3
    assert [read_part(folder, part) for part in range(3)] == [names[:10], names[10:20], names[20:]]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a local server that speaks S3."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("line-3")
    yield "s3://line-3"
    server.stop()


def test_from_a_bucket_and_to_a_bucket_with_a_model_that_dvc_pulled_from_it(
    ray: Any, model_folder: Path, images: Path, predictor: Predictor, bucket: str, tmp_path: Path
) -> None:
    import fsspec

    pulled = _push_and_pull(model_folder, bucket, tmp_path)

    storage = fsspec.filesystem("s3")
    chosen = sorted(images.iterdir())[:6]
    for path in chosen:
        storage.put_file(str(path), f"{bucket}/photographs/{path.name}")
    source, target = f"{bucket}/photographs", f"{bucket}/results"
    command = f"predict {pulled} {source} --output {target} --engine ray --actor-cpus 1"
    done = CliRunner().invoke(almrr, [*command.split(), "--scan-backend", "torch"])
    assert done.exit_code == 0, done.output
    assert "6 images" in done.output
    assert "1 could not be read" in done.output
    verdicts = read_verdicts(f"{bucket}/results")
    assert list(verdicts["image"]) == [f"{bucket}/photographs/{path.name}" for path in chosen]
    readable = [path for place, path in enumerate(chosen) if place not in BROKEN]
    scores = [found.score for found in predictor.stream(readable)]
    np.testing.assert_allclose(verdicts["score"].dropna(), scores, rtol=1e-4)
    overlays = storage.find(f"{bucket}/results/overlays")
    assert len(overlays) == len(readable)
    assert storage.cat_file(overlays[0]).startswith(b"\x89PNG")


def _push_and_pull(model: Path, bucket: str, folder: Path) -> Path:
    """Push a model into DVC's remote in the bucket, lose it and DVC's cache, and pull it."""
    pulled = folder / "model"
    shutil.copytree(model, pulled)

    def dvc(*words: str) -> None:
        command = [sys.executable, "-m", "dvc", *words, "-q"]
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True)

    dvc("init", "--no-scm")
    dvc("add", pulled.name)
    dvc("remote", "add", "--default", "team", f"{bucket}/almrr")
    dvc("push")
    shutil.rmtree(pulled)
    shutil.rmtree(folder / ".dvc/cache")
    dvc("pull")
    return pulled
