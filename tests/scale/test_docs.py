"""docs/scale.md and the files that it points to."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model

from almrr_pipeline.cli import almrr
from almrr_pipeline.config import ScaleSettings


def test_every_command_is_one_that_almrr_takes(project: Path) -> None:
    text = (project / "docs/scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    almrr (.+)$", text, flags=re.MULTILINE)
    commands += re.findall(r"`almrr ([^`]+)`", text)
    assert len(commands) > 5
    for command in commands:
        name, *arguments = shlex.split(command)
        wanted = [] if "IMAGES" in command or name != "predict" else ["model", "images"]
        if "--output" in arguments:
            wanted = []
        arguments += [*wanted, "--output", "results"] if wanted else []
        almrr.commands[name].make_context(name, arguments)  # raises a UsageError otherwise


def test_the_settings_shown_are_the_defaults(project: Path) -> None:
    text = (project / "docs/scale.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert yaml.safe_load(block)["scale"] == ScaleSettings().model_dump()


def test_the_job_for_slurm_passes_shellcheck_and_asks_for_whole_nodes(project: Path) -> None:
    script = project / "docs/scale/slurm.sh"
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run(
        [shellcheck, "--shell=bash", "--severity=style", "--exclude=SC1091", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    text = script.read_text()
    head = text.partition("\nset ")[0]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, flags=re.MULTILINE))
    assert len(options) == text.count(
        "#SBATCH"
    )  # none after the first command, where it is ignored
    assert options["ntasks-per-node"] == "1"  # one `ray start` a node
    assert "almrr repro --engine ray" in text


def _section(name: str, needed: dict[str, Any], optional: dict[str, Any]) -> Any:
    fields = {key: (kind, ...) for key, kind in needed.items()}
    fields |= {key: (kind | None, None) for key, kind in optional.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)


NAME = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
AMOUNTS = dict[str, Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMG]i)?$")]]
RESOURCES = _section("Resources", {}, {"requests": AMOUNTS, "limits": AMOUNTS})
MOUNT = _section("Mount", {"name": NAME, "mountPath": str}, {"readOnly": bool})
CONTAINER = _section(
    "Container",
    {"name": NAME, "image": str, "resources": RESOURCES, "volumeMounts": list[MOUNT]},
    {"env": list[dict[str, str]]},
)
CLAIM = _section("Claim", {"claimName": NAME}, {})
VOLUME = _section("Volume", {"name": NAME, "persistentVolumeClaim": CLAIM}, {})
POD = _section("Pod", {"containers": list[CONTAINER], "volumes": list[VOLUME]}, {})
TEMPLATE = _section("Template", {"spec": POD}, {"metadata": dict[str, Any]})
GROUP = {"rayStartParams": dict[str, str], "template": TEMPLATE}
HEAD = _section("Head", GROUP, {"serviceType": str, "enableIngress": bool})
WORKERS = _section(
    "Workers",
    {**GROUP, "groupName": NAME, "minReplicas": int, "maxReplicas": int},
    {"replicas": int, "numOfHosts": int},
)
CLUSTER = _section(
    "Cluster",
    {"headGroupSpec": HEAD},
    {"workerGroupSpecs": list[WORKERS], "rayVersion": str, "enableInTreeAutoscaling": bool},
)
SPEC = _section(
    "Spec",
    {"entrypoint": str, "rayClusterSpec": CLUSTER},
    {"shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "backoffLimit": int},
)
JOB = _section(
    "RayJob",
    {
        "apiVersion": Literal["ray.io/v1"],
        "kind": Literal["RayJob"],
        "metadata": _section("Metadata", {"name": NAME}, {"namespace": NAME}),
        "spec": SPEC,
    },
    {},
)
"""The part of KubeRay's RayJob (ray.io/v1) that the file may use: what it needs, and types."""


def test_the_job_for_kubernetes_is_a_rayjob_that_mounts_the_project_everywhere(
    project: Path,
) -> None:
    content = yaml.safe_load((project / "docs/scale/rayjob.yaml").read_text())
    job = JOB.model_validate(content)
    cluster = job.spec.rayClusterSpec
    pinned = (project / "constraints.txt").read_text()
    assert f"ray=={cluster.rayVersion}\n" in pinned
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        pod = group.template.spec
        volumes = {volume.name for volume in pod.volumes}
        for container in pod.containers:
            assert {mount.name for mount in container.volumeMounts} == volumes
            assert container.volumeMounts[0].mountPath in job.spec.entrypoint
            gpu = "nvidia.com/gpu"  # Kubernetes has no requests for more than the limit
            resources = container.resources
            assert resources.requests.get(gpu) == resources.limits.get(gpu)
    for workers in cluster.workerGroupSpecs:
        assert workers.minReplicas <= workers.replicas <= workers.maxReplicas
    content["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(ValidationError, match="valid string"):  # a number, which KubeRay refuses
        JOB.model_validate(content)
