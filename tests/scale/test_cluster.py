"""What is wrong with a cluster is said in one sentence."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ScaleSettings, load_parameters
from almrr_pipeline.kedro_support.engines import ray_engine
from almrr_pipeline.scale.cluster import (
    Share,
    check_machines,
    check_share,
    connected,
    own_versions,
    prepare,
    share_of,
)

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")
SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import then fails as if there were none
    with pytest.raises(AlmrrError, match=r"pip install 'almrr-pipeline\[ray\]'"), connected():
        pass


def test_an_address_where_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(AlmrrError, match=f"no Ray cluster at RAY_ADDRESS {address}"), connected():
        pass


def test_more_gpus_than_any_machine_has(ray: Any) -> None:
    with pytest.raises(AlmrrError, match=r"asks for 1 CPUs and 2 GPUs, and after 0\.1 s no"):
        check_share(Share(1, 2), ray, wait=0.1)
    check_share(Share(1, 0), ray, wait=0)


def test_a_gpu_is_asked_for_only_where_there_are_some(ray: Any) -> None:
    assert share_of(ScaleSettings(), ray) == Share(1, 0)
    assert share_of(ScaleSettings(gpus=2), ray) == Share(1, 2)


def test_machines_that_are_alike_pass(ray: Any, tmp_path: Path) -> None:
    check_machines(ray, tmp_path, packages=own_versions())
    assert list(tmp_path.iterdir()) == []


def test_another_version_of_a_package(cluster: Cluster, ray: Any, tmp_path: Path) -> None:
    information = tmp_path / "timm-0.0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    node = cluster.add_node(**SMALL, env_vars={"PYTHONPATH": path})
    try:
        with pytest.raises(AlmrrError, match=r"has timm 0\.0\.1, this machine"):
            check_machines(ray, None, packages=own_versions())
    finally:
        cluster.remove_node(node)


@pytest.fixture
def own_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder by a name that only this process knows."""
    (tmp_path / "disk").mkdir()
    opened = os.open(tmp_path, os.O_RDONLY)
    yield Path(f"/proc/self/fd/{opened}/disk")
    os.close(opened)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_other_machines_do_not_see(ray: Any, own_disk: Path) -> None:
    with pytest.raises(AlmrrError, match=f"does not see {own_disk} of this machine"):
        check_machines(ray, own_disk, packages={})


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_data_or_scratch_on_a_disk_that_other_machines_do_not_see(
    ray: Any, own_disk: Path, tmp_path: Path
) -> None:
    for name in ("data", ".almrr"):
        folder = tmp_path / "project" / name
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(own_disk)
        with pytest.raises(AlmrrError, match=f"does not see {folder} of this machine"):
            prepare(ray, folder.parent, ScaleSettings())
        folder.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_only_a_fetch_needs_photographs_that_other_machines_do_not_see(
    ray: Any, own_disk: Path, project: Path, tmp_path: Path
) -> None:
    paths = {"folder_a": str(own_disk), "folder_b": "https://localhost/b.zip"}
    parameters = load_parameters(project / "params.yaml")
    data = parameters.data.model_copy(update={"paths": paths})
    with ray_engine(tmp_path, parameters.model_copy(update={"data": data})) as run_commands:
        with pytest.raises(AlmrrError, match=f"does not see {own_disk} of this machine"):
            run_commands("fetch@folder_a", ["true"])
        run_commands("train@folder_a-0", ["true"]).result()
