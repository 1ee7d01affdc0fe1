"""Kedro's configuration, with params.yaml as the one source of values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from almrr_pipeline.config import Parameters, parse_parameters
from almrr_pipeline.common.errors import AlmrrError


class ParamsYamlLoader(OmegaConfigLoader):
    """params.yaml < conf/base/parameters.yml < conf/ENV/parameters.yml < `--params`, checked as a whole.

    Beside the sections stands one entry per category with its overrides merged in, so that a pipeline with the
    category as its namespace is given its own `params:CATEGORY.train` and the like.
    """

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the configuration of a kind; `parameters` begins with params.yaml."""
        if key != "parameters" or key in self.data:
            return super().__getitem__(key)
        parameters = parse_parameters(self._merged_parameters())
        values = parameters.model_dump(mode="json")
        for category in parameters.categories:
            values[category] = {**parameters.for_category(category).model_dump(mode="json"), "category": category}
        return values

    @property
    def parameters(self) -> Parameters:
        """The checked parameters, typed."""
        return parse_parameters(self._merged_parameters())

    def _merged_parameters(self) -> dict[str, Any]:
        path = Path(self.conf_source).resolve().parent / "params.yaml"
        if not path.is_file():
            raise AlmrrError(f"There is no {path}; compose one with `dvc exp run -S suite=sample` or restore it.")
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.create(super().__getitem__("parameters")))
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
        return values


def tracking_uri(project: Path) -> str:
    """MLflow's address: the environment's MLFLOW_TRACKING_URI, else a database at an absolute path in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(project / 'mlflow.db').as_posix()}"
