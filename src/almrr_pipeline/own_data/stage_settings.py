"""Stage `settings`: what each category alone depends on, as files.

data.paths and overrides have entries of all categories. A stage that depended on the whole section
would run again, and lose its outputs before, whenever any other category is added or changed; it
depends on the files that this stage of DVC writes instead. A wrong path or an unknown name ends
this stage, before another one has removed anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import move_folder_into_place, staging_folder
from almrr_pipeline.config import Parameters, load_parameters
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.registry import check_request, dataset_for
from almrr_pipeline.datasets.textures import Dtd
from almrr_pipeline.datasets.weights import check_backbone

FOLDER = Path("data/02_intermediate/settings")
SHARED = "shared"
"""In place of a category, for what all of them share."""
SCRATCH = ".almrr"
READ_AT_FETCHING = frozenset({"normal_names", "mask_values", "mask_threshold"})
"""Of a category's own `data`, what decides how its folder is read."""


def write_settings(project: Path) -> None:
    """Check params.yaml, and write source.json and overrides.json for each category.

    Raises:
        AlmrrError: a value is wrong, a category is unknown, or a path does not exist.
    """
    written = load_parameters(project / "params.yaml")
    scratch = project / SCRATCH
    parameters = written.anchored(project)
    check_request(parameters.categories, request=FetchRequest(scratch, parameters.data))
    check_backbone(parameters.backbone)
    with staging_folder(scratch) as folder:
        _write(folder / SHARED, "source", _source(written, [Dtd.name]))
        for category in written.categories:
            merged = parameters.for_category(category)  # may raise: an override out of its range
            if isinstance(region := merged.data.region, str) and not Path(region).is_file():
                raise AlmrrError(f"data.region: there is no image at {region}; check the path.")
            own = written.overrides.get(category, {})
            names = (category, dataset_for(category, written.data).name)
            of_data = own.get("data", {})
            reading = {key: of_data.get(key) for key in sorted(READ_AT_FETCHING)}
            # No key for others: their files stay as they were.
            reading |= {key: of_data[key] for key in ("value_range", "region") if key in of_data}
            _write(folder / category, "source", {**_source(written, names), "data": reading})
            _write(folder / category, "overrides", own)
    move_folder_into_place(folder, project / FOLDER)


def _source(parameters: Parameters, names: Iterable[str]) -> dict[str, Any]:
    """Paths, addresses and checksums under the given keys, as they are in params.yaml."""
    data = parameters.data
    sections: dict[str, dict[str, Any]] = {
        "paths": data.paths,
        "addresses": data.addresses,
        "sha256": data.sha256,
    }
    return {
        title: {name: section[name] for name in names if name in section}
        for title, section in sections.items()
    }


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        write_settings(Path.cwd())
    except AlmrrError as error:
        sys.exit(f"Error: {error}")
