"""Kedro's configuration, with params.yaml as the one place of values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.framework.project import pipelines
from omegaconf import OmegaConf

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import Parameters, parse_parameters, read_values

DATABASE = "mlflow.db"
"""Of MLflow, in the project."""


class ParamsYamlLoader(OmegaConfigLoader):
    """params.yaml < conf/base/parameters.yml < conf/ENV/parameters.yml < `--params`, all checked.

    Next to the sections there is an entry per category with its overrides merged in, and in it an
    entry per seed, which adds `category` and `seed`: the namespace CATEGORY has its
    `params:CATEGORY.data`, the namespace CATEGORY.seed_N its `params:CATEGORY.seed_N.train`.
    """

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return one kind of configuration; `parameters` starts from params.yaml."""
        if key != "parameters" or key in self.data:
            return super().__getitem__(key)
        parameters = self.parameters
        values = parameters.model_dump(mode="json")
        for category in parameters.categories:
            of_category = parameters.for_category(category).model_dump(mode="json")
            of_category["category"] = category
            seeds = {f"seed_{seed}": {**of_category, "seed": seed} for seed in parameters.seeds}
            values[category] = of_category | seeds
        return values

    @property
    def parameters(self) -> Parameters:
        """The checked parameters, typed; relative paths are those below the project's root."""
        path = Path(self.conf_source).resolve().parent / "params.yaml"
        if not path.is_file():
            advice = "compose one with `dvc exp run -S suite=sample` or restore it"
            raise AlmrrError(f"There is no {path}; {advice}.")
        layers = OmegaConf.create(super().__getitem__("parameters"))
        read_values(path)  # a sentence for what OmegaConf cannot read
        merged = OmegaConf.merge(OmegaConf.load(path), layers)
        values: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
        return parse_parameters(values).anchored(path.parent)


def project_root() -> Path:
    """The project around the working directory, else the one of this package's checkout."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").is_file() and (folder / "conf" / "base").is_dir():
            return folder
    return Path(__file__).resolve().parents[3]


def requested_pipelines() -> list[str] | None:
    """The names that `kedro run` was given; None if it was given none, or another command runs."""
    requested: list[str] | None = getattr(pipelines, "_requested_pipelines", None)
    return requested


def tracking_uri(project: Path) -> str:
    """MLflow's address: MLFLOW_TRACKING_URI, else the project's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_database(project)


def own_database(project: Path) -> str:
    """The address of the database that a project has for MLflow, absolute."""
    return f"sqlite:///{(project / DATABASE).as_posix()}"
