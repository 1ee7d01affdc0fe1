"""A copy of the project for tests that run it as its users do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def copy_project(project: Path, folder: Path) -> None:
    """Copy all files of a checkout but ignored ones, uncommitted changes included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=project, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (project / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / name, folder / name)
