"""Nodes with names, and their copies for each category, or for each category and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kedro.pipeline import Node, Pipeline

SHARED = {"data_folder", "scratch_folder", "textures", "backbone_weights"}
"""Datasets that all categories read."""
OF_CATEGORY = {"manifest", "region_file", "baselines"}
"""Datasets that all seeds of a category read."""


def step(function: Callable[..., Any], inputs: str, outputs: str) -> Node:
    """A node with the name of its function; inputs and outputs are separated by spaces."""
    several = outputs.split() if " " in outputs else outputs or None
    return Node(function, inputs.split(), several, name=function.__name__)


def per_category(
    nodes: Sequence[Node],
    categories: Iterable[str],
    seeds: Iterable[int] | None = None,
    *,
    tags: str | None = None,
) -> Pipeline:
    """Copies of the nodes with the namespace CATEGORY, or CATEGORY.seed_N where seeds are given.

    `model` becomes `CATEGORY.seed_N.model`, `params:train` becomes `params:CATEGORY.seed_N.train`.
    Shared datasets keep their names; what the seeds of a category share is named after it.
    """
    steps = Pipeline(nodes)
    copies = []
    for category in categories:
        names = {name: name for name in steps.inputs() & SHARED}
        namespaces = [category]
        if seeds is not None:
            names |= {name: f"{category}.{name}" for name in steps.inputs() & OF_CATEGORY}
            namespaces = [f"{category}.seed_{seed}" for seed in seeds]
        copies += [Pipeline(steps, inputs=names, namespace=one, tags=tags) for one in namespaces]
    return sum(copies, start=Pipeline([]))
