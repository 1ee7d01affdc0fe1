"""ALMRR: find and outline defects on textured surfaces after training on defect-free images alone.

    from almrr_pipeline import Predictor

The names below are imported when they are first used: without them, this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from almrr_pipeline.inference.predictor import Prediction, Predictor
    from almrr_pipeline.model.almrr import ALMRR

    __version__: str

__all__ = ["ALMRR", "Prediction", "Predictor", "__version__"]

_MODULES = {
    "ALMRR": "almrr_pipeline.model.almrr",
    "Prediction": "almrr_pipeline.inference.predictor",
    "Predictor": "almrr_pipeline.inference.predictor",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use (PEP 562)."""
    if name == "__version__":
        return metadata.version("almrr-pipeline")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
