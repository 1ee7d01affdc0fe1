"""docs/scale.md and the files that it points to."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import yaml

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


def test_the_job_for_slurm_is_a_script_that_bash_reads(project: Path) -> None:
    script = project / "docs/scale/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert "almrr repro --engine ray" in script.read_text()


def test_the_job_for_kubernetes_mounts_the_project_everywhere(project: Path) -> None:
    job = yaml.safe_load((project / "docs/scale/rayjob.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["volumeMounts"][0]["mountPath"] in job["spec"]["entrypoint"]
