"""Interface of a dataset, and the request that datasets are fetched with.

A new dataset is one file that implements `Dataset`, and one line in `datasets/registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.manifest import Counts, Item


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a server is waited for."""

    attempts: int = 5
    """Tries of one address in a row that bring no new bytes; then the next address is tried."""
    backoff: float = 1.0  # seconds before the second try; doubled before each further one
    timeout: float = 30.0
    """Seconds without an answer, or without a byte, after which a connection counts as broken."""


@dataclass(frozen=True)
class FetchRequest:
    """Where to work, where to look and what to trust."""

    scratch: Path
    """Folder for partial downloads and for archives shared by categories; created when needed."""
    settings: DataSettings = field(default_factory=DataSettings)
    """Of these the mirror, paths, addresses, sha256, accept_licenses and strict."""
    retry_policy: RetryPolicy = RetryPolicy()


class Dataset(Protocol):
    """A dataset, or a family of them, that can be fetched category by category."""

    name: str  # its key in `data.paths`, `data.addresses` and `data.sha256`
    counts: Mapping[str, Counts] = {}
    """Published numbers of images by category id, such as `mvtec_carpet`."""
    license: str  # a sentence that names the terms and what to cite

    @property
    def categories(self) -> tuple[str, ...]:
        """The ids of all categories that are known beforehand."""
        return tuple(self.counts)

    def expected(self, category: str) -> Counts | None:
        """Return the published numbers of images, or None where there are none."""
        return self.counts.get(category)

    def check(self, category: str, request: FetchRequest) -> None:
        """Raise AlmrrError if something known beforehand would stop `fetch`, such as a license."""
        return

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill the empty folder `target` with the raw images; AlmrrError if none are found."""
        ...

    def items(self, category: str, folder: Path) -> list[Item]:
        """List the images of a filled `folder`, unopened; AlmrrError if its layout is another."""
        ...
