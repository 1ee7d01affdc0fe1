"""Whatever a file or a request holds: it is read, or refused in one sentence, in bounded memory.

A few cases of each here; `make fuzz` tries each property for ten minutes (FUZZ_SECONDS).
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import Reading, inspect_image, read_image
from almrr_pipeline.common.masks import MaskReading, inspect_mask
from almrr_pipeline.config import DataSettings, load_parameters
from almrr_pipeline.datasets.manifest import image_reading, read_manifest, training_split
from almrr_pipeline.datasets.unpack import Limits, unpack
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.checksums import MANIFEST_FILE, write_checksums
from almrr_pipeline.serving.requests import read_images

PROJECT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # of each property; 0: its few examples once
SLOW = 5.0  # seconds of the processor that no case of some kilobytes may take
LONGEST = 2000  # characters of a sentence
MANY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
Result = TypeVar("Result")
Property = TypeVar("Property", bound=Callable[..., None])


def some(examples: int) -> Callable[[Property], Property]:
    """So many examples, or a thousand in each round of `make fuzz`."""
    count = 1000 if SECONDS else examples
    return settings(
        max_examples=count, deadline=None, suppress_health_check=MANY, derandomize=not SECONDS
    )


def for_a_while(check: Callable[[], None]) -> None:
    """Run a property once, and again until the time of `make fuzz` is over."""
    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()


def memory(name: str) -> int:
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def judge(call: Callable[[], Result], *, megabytes: int) -> Result | None:
    """The result, or None if it is refused: in one sentence, and in so much memory."""
    is_linux = sys.platform == "linux"
    if is_linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
    begin, result = time.process_time(), None
    try:
        result = call()
    except AlmrrError as error:
        said = str(error)
        assert "\n" not in said, said
        assert said.endswith("."), said
        assert len(said) < LONGEST, said
    assert time.process_time() - begin < SLOW
    if is_linux:
        assert memory("VmHWM") - before < megabytes * 1e6
    return result


def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz")


# What is drawn

NUMBERS = [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x7f\xff\xff\xff", b"\0\0\0\0"]
EXTREME = [10**400, -1, 2**31, 2**63, 1e308, float("inf"), float("nan"), "", "\0", "a\nb", "\ud800"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(EXTREME)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | SCALARS, inner)
    ),
    max_leaves=4,
)
JSON_TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds with some bytes replaced, removed or inserted, or its end cut off."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, min(64, len(content))) | st.integers(0, len(content)))
        put = draw(st.sampled_from(NUMBERS) | st.binary(max_size=8))
        content[at : at + draw(st.just(len(put)) | st.integers(0, 8))] = put
    if draw(st.integers(0, 9)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@st.composite
def altered(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """A copy of nested values of which one is another, is not there, or has a new one beside it."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        outer, key, inner = None, None, tree
        while isinstance(inner, dict | list) and inner:
            keys = sorted(inner, key=str) if isinstance(inner, dict) else [*range(len(inner))]
            outer, key = inner, draw(st.sampled_from(keys))
            inner = outer[key]
            if draw(st.integers(0, 4)) == 0:
                break
        if outer is None:
            return draw(values)
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                outer[key] = draw(values)
            case "remove":
                del outer[key]
            case _ if isinstance(outer, dict):
                outer[draw(st.text(max_size=5))] = draw(values)
            case _:
                outer.append(draw(values))
    return tree


# params.yaml

PARAMS = (PROJECT / "params.yaml").read_text(encoding="utf-8")
LAUGHS = "\n".join(
    ["suite: &l0 [x]"] + [f"n{n}: &l{n} [{','.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
)
"""Aliases of aliases: 9^8 values in a few bytes."""
YAMLS = (
    damaged([PARAMS.encode()])
    | altered(yaml.safe_load(PARAMS), TREES).map(
        lambda tree: yaml.safe_dump(tree, allow_unicode=False).encode()
    )
    | st.binary(max_size=60)
)


@some(8)
@given(YAMLS)
@example(b"a: [")
@example(b"\xff")
@example(b"- suite")
@example(b"a: " + b"[" * 3000)
@example(b"? [1]\n: 2")
@example(b"a: &a {<<: *a}")
@example(b"a: !!timestamp 2001-99-99")
@example(b"a: &a [" + b"*a," * 3 + b"]")
@example(b"a: " + b"9" * 5000)
@example(PARAMS.encode() + b"\noverrides: {sample_brick: 3}")
@example(LAUGHS.encode())
def parameters(content: bytes) -> None:
    with folder() as name:
        path = Path(name, "params.yaml")
        path.write_bytes(content)
        if read := judge(lambda: load_parameters(path), megabytes=64):
            read.redacted()
            read.anchored(path.parent)
            for category in read.categories:
                judge(lambda category=category: read.for_category(category), megabytes=64)


# A model folder


def try_model(source: Path, file: str, content: bytes, *, checked: bool) -> None:
    """Load a copy of a model folder with another file, whose checksum may be that of the file."""
    with folder() as name:
        copy = shutil.copytree(source, Path(name, "model"))
        (copy / file).write_bytes(content)
        if checked and file != MANIFEST_FILE:
            write_checksums(copy, file)
        elif file != MANIFEST_FILE:
            (copy / MANIFEST_FILE).unlink()

        def load() -> None:
            InferenceConfig.load(copy)
            ALMRR.load(copy, scan_backend="torch")

        judge(load, megabytes=256)


def model_files(source: Path, file: str) -> st.SearchStrategy[bytes]:
    content = (source / file).read_bytes()
    if not file.endswith(".json"):
        return damaged([content])
    trees = altered(json.loads(content), JSON_TREES)
    return damaged([content]) | trees.map(lambda tree: json.dumps(tree).encode())


# Images and masks


def seed_images() -> list[bytes]:
    """Small images in each format and kind that is read."""
    color = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    rgb, deep = Image.fromarray(color), color[..., 0].astype(np.uint16) * 200
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, kind, {}) for kind in ("png", "jpeg", "bmp", "gif", "tiff", "webp", "jpeg2000", "tga")
    ]
    kinds += [(rgb.convert(mode), "png", {}) for mode in ("1", "L", "LA", "P", "RGBA")]
    kinds += [(Image.fromarray(deep), kind, {}) for kind in ("png", "tiff", "jpeg2000")]
    for compression in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
        kind = rgb.convert("1") if compression == "group4" else rgb
        kinds.append((kind, "tiff", {"compression": compression}))
    kinds += [(rgb.convert(mode), "ppm", {}) for mode in ("1", "L", "RGB")]
    kinds.append((rgb.convert("CMYK"), "jpeg", {}))
    kinds.append((rgb, "gif", {"save_all": True, "append_images": [rgb.rotate(90)]}))
    kinds.append((rgb, "jpeg", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"}))
    files = []
    for image, kind, options in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())
    for values, more in (
        (color.astype(np.float32), {"photometric": "rgb", "compression": "zlib"}),
        (deep, {"tile": (16, 16)}),
        (color.astype(np.uint16).transpose(2, 0, 1), {"planarconfig": "separate"}),
        (deep, {"imagej": True}),
        (deep.astype(np.float16), {}),
    ):
        stream = io.BytesIO()
        tifffile.imwrite(stream, values, **more)
        files.append(stream.getvalue())
    return files


def seal_png(content: bytes) -> bytes:
    """The same with the checksums of all chunks true, so that damage inside of them is read."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return content
    sealed, at = bytearray(content), 8
    while at + 12 <= len(sealed):
        end = at + 8 + int.from_bytes(sealed[at : at + 4], "big")
        if end + 4 > len(sealed):
            break
        sealed[end : end + 4] = zlib.crc32(sealed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(sealed)


FEW_PIXELS = 0.25  # megapixels


@some(120)
@given(damaged(seed_images()).map(seal_png) | st.binary(max_size=80))
def images(content: bytes) -> None:
    with folder() as name:
        path = Path(name, "image")
        path.write_bytes(content)
        reading = Reading(max_megapixels=FEW_PIXELS)
        pixels = judge(lambda: read_image(path, reading), megabytes=64)
        facts = judge(lambda: inspect_image(path, reading), megabytes=64)
        masks = MaskReading(max_megapixels=FEW_PIXELS)
        mask = judge(lambda: inspect_mask(path, reading=masks), megabytes=64)
        if pixels is not None:
            assert pixels.dtype == np.uint8
            assert pixels.size <= 3e6 * FEW_PIXELS
            assert facts is not None
            assert facts.size == pixels.shape[:2]
        if mask is not None:
            assert facts is None or mask.mask.shape == facts.size


# Archives


def seed_archives() -> list[bytes]:
    files = {"wood/train/a é.png": b"first" * 30, "wood/test/0.png": b"", "readme.txt": b"hello"}
    archives = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as packed:
            for file, content in files.items():
                packed.writestr(file, content)
        archives.append(stream.getvalue())
    for kind in ("", "gz", "bz2", "xz"):
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode=f"w:{kind}", format=form) as tar:  # type: ignore[call-overload]
                for file, content in {**files, "x" * 120: b"long"}.items():
                    info = tarfile.TarInfo(file)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            archives.append(stream.getvalue())
    return archives


def seal_tar(content: bytes) -> bytes:
    """The same with the checksums of all headers true."""
    sealed = bytearray(content)
    for at in range(0, len(sealed) - 511, 512):
        if sealed[at + 257 : at + 262] == b"ustar":
            sealed[at + 148 : at + 156] = b" " * 8
            sealed[at + 148 : at + 156] = b"%06o\0 " % sum(sealed[at : at + 512])
    return bytes(sealed)


@some(60)
@given(damaged(seed_archives()).map(seal_tar) | st.binary(max_size=80))
def archives(content: bytes) -> None:
    with folder() as name:
        archive, target = Path(name, "archive"), Path(name, "work", "target")
        archive.write_bytes(content)
        limits = Limits(files=20, size=1 << 20, allowance=1 << 20)
        judge(lambda: unpack(archive, target, limits=limits), megabytes=64)
        assert {each.name for each in Path(name).iterdir()} <= {"archive", "work"}
        assert {path.name for path in target.parent.glob("*")} <= {"target"}
        unpacked = [path for path in target.rglob("*") if not path.is_dir()]
        assert not any(path.is_symlink() for path in unpacked)
        assert sum(path.stat().st_size for path in unpacked) <= 1 << 20


# Request bodies

PNG = seed_images()[0]
FORM = b"\r\n".join(
    [
        b"--x",
        b'Content-Disposition: form-data; name="a"; filename="a.png"',
        b"Content-Type: image/png",
        b"",
        PNG,
        b"--x--",
        b"",
    ]
)
REQUEST = {"images": [base64.b64encode(PNG).decode()]}
BODIES = st.one_of(
    st.tuples(damaged([FORM]), st.just("multipart/form-data; boundary=x")),
    st.tuples(damaged([FORM]), st.text(max_size=20).map("multipart/form-data;boundary={}".format)),
    st.tuples(
        altered(REQUEST, JSON_TREES).map(lambda tree: json.dumps(tree).encode())
        | damaged([json.dumps(REQUEST).encode()]),
        st.just("application/json"),
    ),
    st.tuples(damaged([PNG]), st.sampled_from(["", "image/png", "text/plain"]) | st.text()),
)


@some(60)
@given(BODIES)
@example((b"[" * 100_000, "application/json"))
@example((json.dumps({"images": REQUEST["images"] * 9}).encode(), "application/json"))
def requests(request: tuple[bytes, str]) -> None:
    body, kind = request
    reading = Reading(max_megapixels=FEW_PIXELS)
    judge(lambda: read_images(body, kind, reading, most=8, megapixels=1.0), megabytes=64)


# The manifest

COLUMNS = (
    "image,mask,split,label,defect_type,specimen,width,height,sha256,mode,dtype,low,high,white"
)
ROWS = [
    f"01_raw/x/{split}/{name}.png,,{split},{label},good,,12,9,{digit * 64},{values}"
    for split, name, label, digit, values in (
        ("train", "a", "normal", "1", "L,uint8,0.0,255.0,"),
        ("train", "b", "normal", "2", "I;16,uint16,0.0,4000.0,4095.0"),
        ("test", "c", "normal", "3", "L,uint8,0.0,255.0,"),
        ("test", "d", "defective", "4", "L,uint8,0.0,255.0,"),
    )
]
MANIFEST = "\n".join([COLUMNS, *ROWS, ""])


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A manifest with some cells of its own."""
    cells = [line.split(",") for line in MANIFEST.splitlines()]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(cells))
        words = st.sampled_from(["../../etc/passwd", "/etc/passwd", "nan", "-1", "1e999", "", '"'])
        row[draw(st.integers(0, len(row) - 1))] = draw(words | SCALARS.map(str))
    return "\n".join(map(",".join, cells)).encode("utf-8", "surrogatepass")


@some(60)
@given(damaged([MANIFEST.encode()]) | tables() | st.binary(max_size=60))
@example(MANIFEST.encode())
@example(MANIFEST.replace(",white", ",another").encode())
def manifests(content: bytes) -> None:
    with folder() as name:
        path = Path(name, "manifest.csv")
        path.write_bytes(content)
        table = judge(lambda: read_manifest(path), megabytes=64)
        if table is not None:
            root = Path(name)
            training, validation = training_split(table, fraction=0.1)
            assert not set(training) & set(validation)
            for file in [*table["image"], *table["mask"]]:
                assert Path(os.path.normpath(root / file)).is_relative_to(root)
            judge(lambda: image_reading(table, DataSettings()), megabytes=64)


@pytest.mark.parametrize(
    "check",
    [parameters, images, archives, requests, manifests],
    ids=lambda check: check.__name__,
)
def test_what_anybody_may_send_is_read_or_refused(check: Callable[[], None]) -> None:
    for_a_while(check)


@pytest.mark.parametrize(
    "file", ["config.json", "inference.json", "model.safetensors", "model.sha256"]
)
def test_what_a_model_folder_holds_is_read_or_refused(model_folder: Path, file: str) -> None:
    @some(12)
    @given(model_files(model_folder, file), st.booleans())
    def models(content: bytes, checked: bool) -> None:
        try_model(model_folder, file, content, checked=checked)

    for_a_while(models)
