"""The list of a category's pictures: which is trained on, which is tested, and where its ground truth lies.

Making the list opens every picture once, so that a broken one is found before hours of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Item:
    """One picture and its part in the protocol; nothing has been opened yet."""

    image: Path
    mask: Path | None
    """Ground truth; None for normal pictures, and for defective ones of a data set without masks."""
    split: Literal["train", "test"]
    label: Literal["normal", "defective"]
    defect: str
    """Kind of defect; `good` for normal pictures."""


@dataclass(frozen=True)
class Counts:
    """How many pictures a data set is published with."""

    train: int
    test_normal: int
    test_defective: int
