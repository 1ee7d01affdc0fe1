"""Where the project's own MLflow database keeps files: in the project, also in a copy of it."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from almrr_pipeline.kedro_support.config_loader import DATABASE

ARTIFACTS = "mlartifacts"
"""Folder in the project, named as that of MLflow's server."""
_FOLDERS = re.compile(r"/(mlartifacts|mlruns)(/\d+)?$")
_PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Columns with absolute paths: MLflow knows no relative ones."""


def bring_home(project: Path, experiment: str) -> None:
    """Let a database that was copied with its project name the copy's files, not the original's.

    MLflow stores absolute paths: without this a copied project writes into the one it was copied
    from. Nothing is done where there is no database, or where its paths are not below a project.

    Raises:
        sqlite3.Error: the database is locked or damaged.
    """
    database = project / DATABASE
    if not database.is_file():
        return
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in tables:
            return
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        for (place,) in connection.execute(query, [experiment]).fetchall():
            former = _FOLDERS.sub("", place)
            home = project.as_uri() if place.startswith("file:") else project.as_posix()
            if former in (place, home):
                continue
            for table, column in ((t, c) for t in tables & _PLACES.keys() for c in _PLACES[t]):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (home, len(former) + 1, len(former) + 1, f"{former}/"),
                )
