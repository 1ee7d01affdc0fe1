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
    "accept accepted reference golden negative neg 0 良品 正常 合格 合格品 goed норма"
)
"""Normal in many data sets and a defect type in others, so that the user is asked."""
_NEGATIONS = frozenset({"no", "not", "non", "un"})


def normalize(name: str) -> str:
    """Return a name composed (NFC): macOS stores letters and their accents apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def key(name: str) -> str:
    """Return a name composed, without case, width, spaces, hyphens, underscores and dots."""
    return re.sub(r"[\s._-]", "", unicodedata.normalize("NFKC", name).casefold())


def _words_of(name: str) -> set[str]:
    """Words of a name, without digits: of `NG_2`, `GoodParts` and `not ok` too."""
    plain = unicodedata.normalize("NFKC", name)
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", plain) + re.split(r"[\W\d_]+", plain)
    return {key(word) for word in words}


def judge(name: str, normal_names: Sequence[str] | None) -> Literal["normal", "defect", "unsure"]:
    """Tell whether a folder of the test set holds normal images or a defect type.

    `normal_names`, `data.normal_names`, decides alone where it is given.
    """
    if normal_names is not None:
        return "normal" if key(name) in {key(each) for each in normal_names} else "defect"
    words = _words_of(name)
    if key(name) in _NORMAL:
        return "normal"
    if key(name) in _MAYBE_NORMAL or (words & _NORMAL and not words & _NEGATIONS):
        return "unsure"
    return "defect"


def means_defects(name: str) -> bool:
    """Whether a folder's name is one that is usual for defective images."""
    words = _words_of(name)
    return (
        bool(words & _DEFECTIVE) and not words & {*_NEGATIONS, "free"} and key(name) not in _NORMAL
    )


def looks_like_masks(name: str) -> bool:
    """Whether a folder may hold masks, whatever it is called."""
    hints = ("mask", "truth", "label", "annotation", "segment")
    words = MASKS | {"seg", "segs", "anno"}
    return not words.isdisjoint({key(name), *_words_of(name)}) or any(h in key(name) for h in hints)
