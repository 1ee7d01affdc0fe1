"""Drawn datasets in the official layouts, their archives, and a server with faults to switch on."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.base import FetchRequest, RetryPolicy
from almrr_pipeline.datasets.manifest import build_manifest
from almrr_pipeline.datasets.registry import dataset_for, fetch_category

SIZE = (16, 20)
IMPATIENT = RetryPolicy(attempts=3, backoff=0.0, timeout=5.0)


@dataclass
class Answer:
    """How the server treats one file."""

    content: bytes
    etag: str | None = '"first"'
    ranges: bool = True
    """Whether Range and If-Range are understood."""
    if_range: bool = True
    """Whether If-Range is heeded; some servers send a part of another version."""
    says_length: bool = True
    statuses: list[int] = field(default_factory=list)
    """Sent instead, one a request, before the file is."""
    drops: list[int] = field(default_factory=list)
    """After so many bytes the connection is cut, one a request; then no more."""
    always_drops: int | None = None
    redirect: str | None = None
    silence: float = 0.0
    """Seconds without an answer."""
    headers: dict[str, str] = field(default_factory=dict)


class FaultyServer:
    """An HTTP server on this machine; `serve` a file with the faults that it shall have."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range header of every request."""
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def serve(self, name: str, content: bytes = b"", **faults: object) -> str:
        self.answers[f"/{name}"] = Answer(content, **faults)  # type: ignore[arg-type]
        return f"{self.base}/{name}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler_of(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            server.requests.append((path, self.headers.get("Range")))
            answer = server.answers.get(path)
            if answer is None:
                self.send_error(404)
            elif answer.statuses:
                self.send_error(answer.statuses.pop(0))
            elif answer.redirect:
                self.send_response(302)
                self.send_header("Location", answer.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                server.released.wait(answer.silence)
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            start = self._start_of(answer)
            body = answer.content[start or 0 :]
            self.send_response(200 if start is None else 206)
            if start is not None:
                total = len(answer.content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if answer.etag:
                self.send_header("ETag", answer.etag)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body))) if answer.says_length else None
            self.send_header("Connection", "close")
            self.end_headers()
            cut = answer.drops.pop(0) if answer.drops else answer.always_drops
            self.wfile.write(body if cut is None else body[:cut])
            self.close_connection = True

        def _start_of(self, answer: Answer) -> int | None:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            if not (wanted and answer.ranges) or (
                answer.if_range and condition not in {None, answer.etag}
            ):
                return None
            return int(wanted[1])

    return Handler


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    yield server
    server.close()


class Draw:
    """Draws datasets of images that all differ, in the layouts in which they are published."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def image(self, path: Path, size: tuple[int, int] = SIZE) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self._random.integers(0, 256, size, dtype=np.uint8)).save(path)
        return path

    def mask(self, path: Path, size: tuple[int, int] = SIZE, *, empty: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.zeros(size, dtype=np.uint8)
        values[2:6, 3:9] = 0 if empty else 255
        Image.fromarray(values).save(path)
        return path

    def mvtec(
        self, folder: Path, *, train: int = 4, good: int = 2, defects: dict[str, int] | None = None
    ) -> Path:
        """Draw a category: train/good, test/good, test/DEFECT and ground_truth/DEFECT."""
        for number in range(train):
            self.image(folder / "train" / "good" / f"{number:03}.png")
        for number in range(good):
            self.image(folder / "test" / "good" / f"{number:03}.png")
        for defect, count in (defects or {"cut": 2, "hole": 1}).items():
            for number in range(count):
                self.image(folder / "test" / defect / f"{number:03}.png")
                self.mask(folder / "ground_truth" / defect / f"{number:03}_mask.png")
        (folder / "license.txt").write_text("CC BY-NC-SA 4.0")
        return folder

    def mt_defect(
        self, folder: Path, *, free: int = 5, defects: dict[str, int] | None = None
    ) -> Path:
        """Draw MT_KIND/Imgs with a .jpg image and a .png mask each."""
        for kind, count in {"Free": free, **(defects or {"Blowhole": 2, "Crack": 1})}.items():
            for number in range(count):
                name = f"exp{number % 6}_num_{self._random.integers(10**9)}"
                self.image(folder / f"MT_{kind}" / "Imgs" / f"{name}.jpg")
                self.mask(folder / f"MT_{kind}" / "Imgs" / f"{name}.png", empty=kind == "Free")
        return folder

    def nanotwice(self, folder: Path, *, normal: int = 5, anomalous: int = 40) -> Path:
        for number in range(normal):
            self.image(folder / "Normal" / f"ITIA1{number:03}.tif")
        for number in range(normal, normal + anomalous):
            self.image(folder / "Anomalous" / "images" / f"ITIA1{number:03}.tif")
            self.mask(folder / "Anomalous" / "gt" / f"ITIA1{number:03}_gt.png")
        return folder

    def dtd(
        self, folder: Path, *, classes: Sequence[str] = ("banded", "dotted"), each: int = 2
    ) -> Path:
        for name in classes:
            for number in range(each):
                self.image(folder / "images" / name / f"{name}_{number:04}.jpg")
        (folder / "labels").mkdir(parents=True)
        (folder / "labels" / "train1.txt").write_text("banded/banded_0000.jpg")
        return folder


@pytest.fixture
def draw() -> Draw:
    return Draw()


def _pack(folder: Path, kind: str, *, inside: str = "") -> bytes:
    """Pack a folder's content, below a folder `inside`, as zip, tar, tar.gz, tar.bz2 or tar.xz."""
    stream = io.BytesIO()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [f"{inside}/{path.relative_to(folder).as_posix()}".lstrip("/") for path in files]
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, name in zip(files, names, strict=True):
                archive.write(path, name)
    else:
        mode = "w:" + kind.removeprefix("tar").removeprefix(".")
        with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
            for path, name in zip(files, names, strict=True):
                archive.add(path, name)
    return stream.getvalue()


@pytest.fixture
def pack() -> Callable[..., bytes]:
    return _pack


@dataclass(frozen=True)
class Workplace:
    """A data folder to fetch into, and what a fetch has left there."""

    root: Path

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def target(self, category: str) -> Path:
        return self.root / "data" / "01_raw" / category

    def request(self, **changes: object) -> FetchRequest:
        values = {"accept_licenses": ["CC-BY-NC-SA-4.0"], **changes}
        return FetchRequest(self.scratch, DataSettings.model_validate(values), IMPATIENT)

    def fetch(self, category: str, request: FetchRequest) -> pd.DataFrame:
        """Fetch a category as the pipeline does, all or nothing, and list its images."""
        dataset = dataset_for(category, request.settings)
        target = self.target(category)
        target.mkdir(parents=True)
        try:
            fetch_category(category, target=target, request=request)
        except BaseException:
            shutil.rmtree(target)
            raise
        return build_manifest(
            dataset.items(category, target),
            root=self.root / "data",
            expected=dataset.expected(category),
            strict=request.settings.strict,
        )

    def leftovers(self) -> list[str]:
        """All files under the data folder and the scratch folder."""
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file()
        )


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "work place é")


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that cannot be written; root, who may write anywhere, is nobody meanwhile."""
    if os.name == "nt":
        pytest.skip("Windows has no read-only folders in this sense")
    base = Path(tempfile.mkdtemp(prefix="almrr-read-only-"))
    folder = base / "folder"
    folder.mkdir()
    base.chmod(0o755)
    folder.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield folder
    if was_root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(base)
