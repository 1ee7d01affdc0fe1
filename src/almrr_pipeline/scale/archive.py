"""An archive of images, of any size: lists of paths in parts, on local disks or in buckets."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.files import escape_text
from almrr_pipeline.common.images import (
    IMAGE_SUFFIXES,
    Reading,
    decode_image,
    list_images,
    read_image,
    report_others,
)

LISTING = "images.parquet"
_LISTED = pa.schema([("image", pa.binary())])  # names need not be text


@contextmanager
def _reached(address: str) -> Iterator[None]:
    """Make a sentence of what a store raises: each has exceptions of its own."""
    try:
        yield
    except (AlmrrError, FileNotFoundError):
        raise
    except Exception as error:
        raise AlmrrError(
            f"{escape_text(address)} cannot be reached ({quote(error) or type(error).__name__}); "
            "check the address and the credentials; for s3:// install 'almrr-pipeline[s3]', for "
            "other stores what fsspec names."
        ) from error


class Folder:
    """A folder of results: a path, or an address that fsspec knows, such as s3://bucket/results."""

    def __init__(self, address: str) -> None:
        with _reached(address):
            self._fs, self._root = fsspec.url_to_fs(address)
        self.address = address
        self.is_local = "://" not in address

    def path(self, name: str) -> str:
        """The path of a file in it, for fsspec."""
        return f"{self._root}/{name}"

    def names(self, folder: str) -> set[str]:
        """Names in one of its folders; none where that does not exist."""
        try:
            with _reached(self.address):
                listed = self._fs.ls(self.path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        return {PurePosixPath(str(path)).name for path in listed} - {""}

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""
        try:
            with _reached(self.address):
                content: bytes = self._fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file all or nothing; a store of objects does so by itself."""
        target = self.path(name)
        if not self.is_local:
            with _reached(self.address):
                self._fs.pipe_file(target, content)
            return
        partial = Path(target).with_name(f".{Path(target).name}.{os.getpid()}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(target)

    def open(self, name: str) -> Any:  # noqa: ANN401 - a file of fsspec
        """Open a file for reading at any place."""
        return self._fs.open(self.path(name), "rb")

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders in it, if they exist."""
        for name in names:
            if self._fs.exists(self.path(name)):
                self._fs.rm(self.path(name), recursive=True)


def list_archive(inputs: Sequence[str], *, recursive: bool) -> Iterator[str]:
    """List the images of folders, of buckets, of lists (.parquet, column `image`), and single ones.

    Args:
        inputs: paths, or addresses that fsspec knows.
        recursive: look into sub-folders too.

    What folders hold else is logged at the end.

    Raises:
        AlmrrError: an input does not exist, or holds no image.
    """
    others: Counter[str] = Counter()
    for one in inputs:
        found = False
        for image in _list_one(one, others, recursive=recursive):
            found = True
            yield image
        if not found:
            advice = "" if recursive else "; look into its sub-folders with --recursive"
            raise AlmrrError(f"{escape_text(one)} holds no image{advice}.")
    report_others(others)


def _list_one(one: str, others: Counter[str], *, recursive: bool) -> Iterator[str]:
    with _reached(one):
        fs, path = fsspec.url_to_fs(one)
        exists, is_file = fs.exists(path), fs.isfile(path)
    if not exists:
        named = escape_text(one)
        raise AlmrrError(f"There is no image, list or folder at {named}; check the path.")
    if one.endswith(".parquet"):
        yield from _read_list(fs, path, one)
    elif is_file:
        yield one
    elif "://" in one:
        with _reached(one):
            listed = fs.find(path, maxdepth=None if recursive else 1)
        for image in listed:
            suffix = PurePosixPath(image).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                yield fs.unstrip_protocol(image)
            else:
                others[suffix] += 1
    else:
        yield from map(str, list_images(Path(one), recursive=recursive, others=others))


def _read_list(fs: Any, path: str, name: str) -> Iterator[str]:  # noqa: ANN401
    with fs.open(path, "rb") as file:
        try:
            table = pq.ParquetFile(file)
            for batch in table.iter_batches(columns=["image"]):
                column = batch.column("image")
                if column.null_count or column.type not in (pa.string(), pa.large_string()):
                    raise ValueError(f"{column.null_count} empty values, type {column.type}")
                yield from column.to_pylist()
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise AlmrrError(
                f"{name} is no list of images ({error}); expected Parquet with a column `image` of "
                "paths or addresses."
            ) from error


def write_listing(images: Iterable[str], target: Folder, *, size: int) -> int:
    """Write the images in parts of `size`, a row group each; returns how many parts there are."""
    remaining, parts = iter(images), 0
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, _LISTED) as writer:
        while part := list(islice(remaining, size)):
            names = [os.fsencode(image) for image in part]
            writer.write_table(pa.table({"image": names}, _LISTED), row_group_size=size)
            parts += 1
    target.write(LISTING, buffer.getvalue())
    return parts


def read_part(target: Folder, part: int) -> list[str]:
    """The images of a part."""
    with target.open(LISTING) as file:
        names = pq.ParquetFile(file).read_row_group(part).column("image").to_pylist()
    return [os.fsdecode(name) for name in names]


def count_parts(target: Folder) -> tuple[int, int]:
    """Parts and images of the listing."""
    with target.open(LISTING) as file:
        metadata = pq.ParquetFile(file).metadata
    return metadata.num_row_groups, metadata.num_rows


def read_anywhere(address: str, reading: Reading) -> ImageArray:
    """Read an image from a path or a bucket, as `read_image` does.

    Raises:
        AlmrrError: it is missing, or no image that can be read.
    """
    if "://" not in address:
        return read_image(Path(address), reading)
    fs, path = fsspec.url_to_fs(address)
    try:
        content = fs.cat_file(path)
    except OSError as error:
        raise AlmrrError(f"{address} cannot be read ({error.strerror or error}).") from error
    return decode_image(content, Path(address), reading)
