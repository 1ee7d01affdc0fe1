"""Names of folders that tell what the images in them are, compared without case and separators."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRAIN = frozenset({"train", "training"})
FLAT_TRAIN = frozenset({"normal"})
VALIDATION = frozenset({"validation", "val", "valid"})
TEST = frozenset({"test", "testing"})
MASKS = frozenset({"groundtruth", "masks", "mask", "gt"})
_NORMAL = _words(
    "good normal normals ok okay pass passed nominal defectfree nodefect nodefects anomalyfree "
    "noanomaly nondefective"
)
_DEFECTIVE = _words(
    "bad ng nok defect defects defective anomaly anomalies anomalous abnormal fail failed reject "
    "rejected broken"
)
_MAYBE_NORMAL = _words(
    "io gut gutteil gutteile fehlerfrei bon bueno buono clean free healthy intact fine flawless "
    "accept accepted reference golden negative neg 0"
)
"""Normal in many data sets and a defect type in others, so that the user is asked."""
_NEGATIONS = frozenset({"no", "not", "non", "un"})


def normalize(name: str) -> str:
    """Return a name composed (NFC): macOS stores letters and their accents apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def key(name: str) -> str:
    """Return a name composed, without case, spaces, hyphens, underscores and dots."""
    return re.sub(r"[\s._-]", "", normalize(name).casefold())


def judge(name: str, normal_names: Sequence[str] | None) -> Literal["normal", "defect", "unsure"]:
    """Tell whether a folder of the test set holds normal images or a defect type.

    `normal_names`, `data.normal_names`, decides alone where it is given.
    """
    if normal_names is not None:
        return "normal" if key(name) in {key(each) for each in normal_names} else "defect"
    words = {key(word) for word in re.split(r"[\W_]+", normalize(name)) if word}
    if key(name) in _NORMAL:
        return "normal"
    if key(name) in _MAYBE_NORMAL or (words & _NORMAL and not words & _NEGATIONS):
        return "unsure"
    return "defect"


def means_defects(name: str) -> bool:
    """Whether a folder's name is one that is usual for defective images."""
    return key(name) in _DEFECTIVE


def looks_like_masks(name: str) -> bool:
    """Whether a folder may hold masks, whatever it is called."""
    hints = ("mask", "truth", "label", "annotation", "segment")
    return key(name) in MASKS or any(hint in key(name) for hint in hints)
