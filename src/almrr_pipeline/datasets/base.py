"""What every data source offers, and what it is asked with.

A new data set is one file that fulfills `Source`, and one line in `sources/registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from almrr_pipeline.datasets.manifest import Counts, Item


@dataclass(frozen=True)
class RetryPolicy:
    """How long a server is waited for."""

    attempts: int = 5
    """Tries of one address in a row that bring nothing new; then the next address is asked."""
    backoff: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    timeout: float = 30.0
    """Seconds without an answer, or without a byte, after which a connection counts as dropped."""


@dataclass(frozen=True)
class FetchRequest:
    """Where to look, what to trust and where to work; the `data` section of params.yaml says most of it."""

    scratch: Path
    """Folder for partial downloads and for archives that several categories share; created when needed."""
    mirror: str | None = None
    """Folder, file:// or http(s):// base address that is asked before the public addresses."""
    local: Mapping[str, str] = field(default_factory=dict)
    """Source name or category id: an archive or a folder on disk that serves instead of any address."""
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Source name or category id: addresses tried in turn, in place of the built-in ones."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Source name or category id: expected checksum of the archive, in place of the built-in one."""
    accept_licenses: frozenset[str] = frozenset()
    """SPDX names of the licenses that the user accepts."""
    strict: bool = False
    """Refuse counts that differ from the published ones, instead of warning."""
    retry_policy: RetryPolicy = RetryPolicy()


class Source(Protocol):
    """A data set, or a family of them, that can be fetched category by category.

    `name` is the key of `data.source`, `data.addresses` and `data.sha256`; `categories` are ids such as
    `mvtec_carpet`; `license` is a sentence that names the terms and what to cite.
    """

    name: str
    categories: tuple[str, ...]
    license: str

    def check(self, category: str, request: FetchRequest) -> None:
        """Find out before any work begins what would stop `fetch`, such as terms that were not accepted.

        Raises:
            AlmrrError: says what is missing.
        """
        return

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill `target`, an existing empty folder that the caller renames when this returns, with the raw images.

        Raises:
            AlmrrError: nothing could be fetched, or what came is not the data set; says where and what to do.
        """
        ...

    def items(self, category: str, folder: Path) -> list[Item]:
        """Say which image of a filled `folder` is train or test, normal or defective, and where its mask lies.

        This is the data set's protocol; nothing is opened.

        Raises:
            AlmrrError: the folder has not the layout of the data set.
        """
        ...

    def expected(self, category: str) -> Counts | None:
        """Return the published numbers of images, or None where there are none."""
        ...
