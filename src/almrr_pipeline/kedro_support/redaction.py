"""Parameters as they may be shown to others: without passwords, and without where things lie on this machine."""

from __future__ import annotations

from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from almrr_pipeline.config import Parameters


def shown_parameters(parameters: Parameters) -> dict[str, Any]:
    """Return the parameters as plain values, fit for a report or an experiment's log.

    Addresses lose user name, password and query, which may be secret; of a path the last name stays.
    """
    values = parameters.model_dump(mode="json")
    data, backbone, predict = values["data"], values["backbone"], values["predict"]
    data["mirror"] = _shown_place(data["mirror"])
    data["source"] = {name: _shown_place(place) for name, place in data["source"].items()}
    data["addresses"] = {name: [_shown_place(place) for place in places] for name, places in data["addresses"].items()}
    backbone["weights"] = _shown_place(backbone["weights"])
    predict["images"] = _shown_place(predict["images"])
    return values


def _shown_place(place: str | None) -> str | None:
    if place is None:
        return None
    if "://" not in place or place.startswith("file://"):
        return PureWindowsPath(place).name  # knows both kinds of slashes
    parts = urlsplit(place)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
