"""The settings of a category of the user's own: in params.yaml, and in the suite `own` in conf/.

params.yaml is what runs. The suite lets the next `dvc exp run`, which composes params.yaml anew,
find the same categories; conf/config.yaml names it as the default from then on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.config import Parameters, load_parameters, merge_values, parse_parameters
from almrr_pipeline.datasets.folder import PREFIX

SUITE = "own"
PARAMS_FILE, CONFIG_FILE = Path("params.yaml"), Path("conf/config.yaml")
SUITE_FILE = Path(f"conf/suite/{SUITE}.yaml")
FILES = (PARAMS_FILE, CONFIG_FILE, SUITE_FILE)
"""All that `add_surface` writes."""
_DEFAULT_SUITE = re.compile(r"^(\s*- suite:\s*)(\S+)", flags=re.MULTILINE)
_HEADER = """\
# @package _global_
# Images of your own, written by `almrr train`, on top of the suite that was there before.
"""


@dataclass(frozen=True)
class Surface:
    """A folder of images, its name, and the values that are its own."""

    name: str  # without folder_
    path: str  # of the folder; relative to the project where it is inside
    overrides: Mapping[str, Any] = field(default_factory=dict)  # by section, as params.yaml's

    @property
    def category(self) -> str:
        """The category's id."""
        return PREFIX + self.name


def category_of(name: str) -> str:
    """Return folder_NAME, for NAME with or without the prefix; AlmrrError if it is no name."""
    plain = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w-]{1,60}", plain):
        raise AlmrrError(f"{quote(repr(name))} is no name; take up to 60 letters, digits, _ and -.")
    return PREFIX + plain


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Nested values from texts such as `train.steps=500`; AlmrrError for others."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        names = key.strip().lstrip("+").split(".")
        if not equals or len(names) < 2 or not all(names):
            raise AlmrrError(f"{text!r} is no value of a section; write one as train.steps=500.")
        try:
            nested: Any = yaml.safe_load(value)
            json.dumps(nested, default=str)  # ValueError where a value holds itself
        except Exception:  # PyYAML raises nearly anything, such as ValueError for a date
            raise AlmrrError(f"{text!r}: what follows the = is not YAML.") from None
        for name in reversed(names):
            nested = {name: nested}
        values = merge_values(values, nested)
    return values


def find_surface(project: Path, category: str) -> Surface | None:
    """The surface as params.yaml has it; None if it has none of that name."""
    parameters = load_parameters(project / PARAMS_FILE)
    path = parameters.data.paths.get(category)
    if path is None or category not in parameters.categories:
        return None
    return Surface(category.removeprefix(PREFIX), path, parameters.overrides.get(category, {}))


def list_changes(before: Surface, after: Surface) -> list[str]:
    """What differs between two settings of a surface, as `name: before -> after`."""
    old = {"folder": before.path, **_flatten(before.overrides)}
    new = {"folder": after.path, **_flatten(after.overrides)}
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}" for name in names]


def add_surface(
    project: Path, surface: Surface, *, backbone: Mapping[str, Any] | None = None
) -> Parameters:
    """Write a surface to params.yaml and conf/, next to all categories that have data.

    A category of params.yaml of which nothing was ever made, such as the sample of a fresh clone,
    is left out: it would be trained too. A known surface gets its new values. `backbone` are values
    of that section, which all categories share.

    Raises:
        AlmrrError: the values are wrong, another suite was composed since surfaces were added, or
            the backbone is another than that of the categories that are there; nothing is written
            then.
    """
    values = yaml.safe_load((project / PARAMS_FILE).read_text(encoding="utf-8"))
    known = load_parameters(project / PARAMS_FILE)
    base = _find_base(project, known.suite)
    kept = [name for name in known.categories if name != surface.category]
    kept = [name for name in kept if name.startswith(PREFIX) or has_data(project, name)]
    if backbone is not None and backbone["name"] != values["backbone"]["name"]:
        if kept:
            raise AlmrrError(
                f"This budget takes the backbone {backbone['name']}; {', '.join(kept)} has "
                f"{values['backbone']['name']}, and all categories share one. Choose one with it."
            )
        values["backbone"] |= backbone
    values["suite"] = SUITE
    values["categories"] = [*kept, surface.category]
    if surface.category in known.categories:  # in its place
        values["categories"] = [
            name for name in known.categories if name in kept or name == surface.category
        ]
    values["data"]["paths"][surface.category] = surface.path
    if surface.overrides:
        values["overrides"][surface.category] = dict(surface.overrides)
    parameters = parse_parameters(values)
    parameters.for_category(surface.category)
    own = [name for name in values["categories"] if name.startswith(PREFIX)]
    suite = {
        "defaults": [base, "_self_"],
        "suite": SUITE,
        "categories": values["categories"],
        "backbone": {name: values["backbone"][name] for name in ("name", "weights")},
        "data": {"paths": {name: values["data"]["paths"][name] for name in own}},
        "overrides": {n: values["overrides"][n] for n in own if n in values["overrides"]},
    }
    config = (project / CONFIG_FILE).read_text(encoding="utf-8")
    (project / SUITE_FILE).write_text(_HEADER + _dump(suite), encoding="utf-8")
    (project / CONFIG_FILE).write_text(
        _DEFAULT_SUITE.sub(rf"\g<1>{SUITE}", config, count=1), encoding="utf-8"
    )
    (project / PARAMS_FILE).write_text(_dump(values), encoding="utf-8")
    return parameters


def has_data(project: Path, category: str) -> bool:
    """Whether anything was made of a category."""
    return any(any(folder.rglob("*")) for folder in (project / "data").glob(f"0*/{category}"))


def relative_path(project: Path, folder: Path) -> str:
    """A folder as params.yaml names it: relative to the project if it is inside, else absolute."""
    absolute = folder.resolve()
    root = project.resolve()
    inside = absolute.is_relative_to(root)
    return (absolute.relative_to(root) if inside else absolute).as_posix()


def _find_base(project: Path, suite: str) -> str:
    """The suite below `own`: what params.yaml was composed from before."""
    path = project / SUITE_FILE
    if not path.exists():
        return suite
    if suite != SUITE:
        raise AlmrrError(
            f"params.yaml holds the suite {suite}, your own images are in the suite {SUITE}; "
            f"go back with: dvc exp run -S suite={SUITE}."
        )
    base: str = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"][0]
    return base


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _dump(values: Mapping[str, Any]) -> str:
    """YAML as DVC's composition writes it."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text
