"""Imports as in an environment that has the named distributions and their needs alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def hide_others(requirements: Iterable[str]) -> None:
    """From here on, importing anything of another distribution fails as if it were not there."""
    wanted = [Requirement(line) for line in requirements]
    needed, seen = {"almrr-pipeline"}, set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        needed.add(name)
        try:
            lines = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, lines):
            if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(one)
    sys.meta_path = [_Without(finder, needed) for finder in sys.meta_path]


class _Without:
    """A finder that does not find what other distributions than the needed ones provide."""

    _provided_by = metadata.packages_distributions()

    def __init__(self, finder: Any, needed: set[str]) -> None:
        self._finder, self._needed = finder, needed

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        owners = {canonicalize_name(owner) for owner in self._provided_by.get(name, [])}
        if not owners or owners & self._needed:
            return self._finder.find_spec(name, path, target)
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)
