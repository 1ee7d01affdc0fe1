from __future__ import annotations

import pytest
from kedro.pipeline import Node, Pipeline

from almrr_pipeline.pipeline_registry import build_pipelines
from almrr_pipeline.pipelines.per_category import per_category

CATEGORIES, SEEDS = ["sample_brick", "sample_grass"], [0, 7]
MOST_INPUTS = 8
STAGES = ("fetch", "synthesize", "train", "baseline", "evaluate", "report")


def _step(manifest: object, textures: object, train: object) -> object:
    return manifest, textures, train


@pytest.fixture
def steps() -> list[Node]:
    return [Node(_step, ["manifest", "textures", "params:train"], "model", name="fit_model")]


@pytest.fixture
def pipelines() -> dict[str, Pipeline]:
    return build_pipelines(CATEGORIES, SEEDS)


def test_a_category_is_a_namespace(steps: list[Node]) -> None:
    pipeline = per_category(steps, CATEGORIES)
    assert [node.name for node in pipeline.nodes] == [f"{name}.fit_model" for name in CATEGORIES]
    assert pipeline.outputs() == {f"{name}.model" for name in CATEGORIES}
    assert "sample_brick.manifest" in pipeline.inputs()
    assert "params:sample_brick.train" in pipeline.inputs()


def test_a_seed_is_a_namespace_in_that_of_its_category(steps: list[Node]) -> None:
    pipeline = per_category(steps, CATEGORIES, SEEDS)
    assert {node.namespace for node in pipeline.nodes} == {
        "sample_brick.seed_0", "sample_brick.seed_7", "sample_grass.seed_0", "sample_grass.seed_7",
    }  # fmt: skip
    assert "params:sample_grass.seed_7.train" in pipeline.inputs()
    assert "sample_grass.seed_7.model" in pipeline.outputs()


def test_seeds_share_the_manifest_and_categories_share_the_textures(steps: list[Node]) -> None:
    inputs = per_category(steps, CATEGORIES, SEEDS).inputs()
    assert {name for name in inputs if not name.startswith("params:")} == {
        "textures", "sample_brick.manifest", "sample_grass.manifest",
    }  # fmt: skip


def test_the_namespace_of_a_category_runs_all_its_seeds(pipelines: dict[str, Pipeline]) -> None:
    chosen = pipelines["train"].only_nodes_with_namespaces(["sample_brick"])
    assert {node.namespace for node in chosen.nodes} == {
        "sample_brick.seed_0",
        "sample_brick.seed_7",
    }


def test_every_node_has_a_name_of_its_own(pipelines: dict[str, Pipeline]) -> None:
    for pipeline in pipelines.values():
        for node in pipeline.nodes:
            assert node.short_name.isidentifier(), f"{node} has no name"
            assert "_" in node.short_name


def test_no_node_takes_more_inputs_than_a_reader_can_follow(pipelines: dict[str, Pipeline]) -> None:
    for pipeline in pipelines.values():
        for node in pipeline.nodes:
            inputs = [name for name in node.inputs if not name.endswith(".category_report")]
            assert len(inputs) <= MOST_INPUTS, node.name


def test_all_stages_join_into_one_pipeline(pipelines: dict[str, Pipeline]) -> None:
    stages = [pipelines[name] for name in STAGES]
    joined = sum(stages, start=Pipeline([]))
    free = {name for name in joined.inputs() if not name.startswith("params:")}
    assert free == {"data_folder", "scratch_folder", "parameters"}
