"""Interface of a dataset, and the request that datasets are fetched with.

A new dataset is one file that implements `Dataset`, and one line in `datasets/registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from almrr_pipeline.datasets.manifest import Counts, Item


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a server is waited for."""

    attempts: int = 5
    """Tries of one address in a row that bring no new bytes; then the next address is tried."""
    backoff: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    timeout: float = 30.0
    """Seconds without an answer, or without a byte, after which a connection counts as broken."""


@dataclass(frozen=True)
class FetchRequest:
    """Where to look, what to trust and where to work; mostly the `data` section of params.yaml.

    The keys of `paths`, `addresses` and `sha256` are names of datasets or category ids.
    """

    scratch: Path
    """Folder for partial downloads and for archives shared by categories; created when needed."""
    mirror: str | None = None
    """Folder, file:// or http(s):// base address that is tried before the public addresses."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Archives or folders on the user's disk, used instead of any address."""
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Addresses tried in turn, in place of the built-in ones."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Expected checksums of the archives, in place of the built-in ones."""
    accept_licenses: frozenset[str] = frozenset()
    """SPDX names of the licenses that the user accepts."""
    strict: bool = False
    """Refuse counts that differ from the published ones, instead of warning."""
    retry_policy: RetryPolicy = RetryPolicy()


class Dataset(Protocol):
    """A dataset, or a family of them, that can be fetched category by category.

    `name` is its key in `data.paths`, `data.addresses` and `data.sha256`; `categories` are ids such
    as `mvtec_carpet`; `license` is a sentence that names the terms and what to cite.
    """

    name: str
    categories: tuple[str, ...]
    license: str

    def check(self, category: str, request: FetchRequest) -> None:
        """Check beforehand what would stop `fetch`, such as a license that is not accepted.

        Raises:
            AlmrrError: names what is missing.
        """
        return

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill the existing empty folder `target` with the raw images.

        Raises:
            AlmrrError: nothing could be fetched, or the files are not those of the dataset.
        """
        ...

    def items(self, category: str, folder: Path) -> list[Item]:
        """List the images of a filled `folder` with split, label and mask; opens no image.

        This is the dataset's protocol.

        Raises:
            AlmrrError: the folder does not have the layout of the dataset.
        """
        ...

    def expected(self, category: str) -> Counts | None:
        """Return the published numbers of images, or None where there are none."""
        ...
