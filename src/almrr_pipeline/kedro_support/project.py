"""Where the project is: the folder with params.yaml, conf/ and data/."""

from __future__ import annotations

from pathlib import Path


def project_root() -> Path:
    """The project that the working directory lies in, else the one this package was checked out with."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").is_file() and (folder / "conf" / "base").is_dir():
            return folder
    return Path(__file__).resolve().parents[2]
