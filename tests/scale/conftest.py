"""A Ray cluster of three small machines, which are processes of this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three machines: the head, which has no cores to give, and two of one core each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's own 15 starves workers beside other tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    from ray.cluster_utils import Cluster

    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {**SMALL, "num_cpus": 0, "include_dashboard": False, "_system_config": health}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        started.add_node(**SMALL)
    yield started
    started.shutdown()


@pytest.fixture
def ray(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to them."""
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """What `Cluster.add_node` takes for one more machine."""
    return SMALL
