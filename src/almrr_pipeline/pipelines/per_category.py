"""Copies of a pipeline's nodes for each category, or for each category and seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kedro.pipeline import Node, Pipeline

SHARED = frozenset({"data_folder", "scratch_folder", "textures", "backbone_weights"})
"""Datasets that all categories read."""
OF_CATEGORY = frozenset({"manifest"})
"""Datasets that all seeds of a category read."""


def per_category(
    nodes: Sequence[Node],
    categories: Iterable[str],
    seeds: Iterable[int] | None = None,
    *,
    tags: str | None = None,
) -> Pipeline:
    """Namespaced copies of the nodes: CATEGORY, or CATEGORY.seed_N where seeds are given.

    Names of datasets and parameters receive the namespace as prefix: `model` becomes `CATEGORY.seed_N.model`,
    `params:train` becomes `params:CATEGORY.seed_N.train`. Shared datasets keep their names, and those
    that the seeds of a category share have the category as prefix.
    """
    steps = Pipeline(nodes)
    copies = []
    for category in categories:
        names = {name: name for name in steps.inputs() & SHARED}
        if seeds is None:
            copies.append(Pipeline(steps, inputs=names, namespace=category, tags=tags))
            continue
        names |= {name: f"{category}.{name}" for name in steps.inputs() & OF_CATEGORY}
        copies += [
            Pipeline(steps, inputs=names, namespace=f"{category}.seed_{seed}", tags=tags)
            for seed in seeds
        ]
    return sum(copies, start=Pipeline([]))
