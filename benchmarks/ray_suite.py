"""The suite on three Ray machines, of which one dies in a training, against `dvc repro`.

    python benchmarks/ray_suite.py [--reference CLONE] [--scratch FOLDER] [--task TASK]

clones the last commit twice. In one clone `dvc repro` runs, or has run (--reference); in the other
`almrr repro --engine ray`, on a head without cores and two machines of one core each. Its suite has
one category more, with a broken image, and the machine of TASK, a training of more than one
checkpoint, is killed some time after the first. A second run, without that category, finishes; then
all that is on record is compared. Half an hour on two cores; ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

PROJECT = Path(__file__).parents[1]
METRICS = "data/08_reporting/metrics.json"
TORN = "folder_torn"
MACHINE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def environment_of(clone: Path) -> dict[str, str]:
    """One thread a process, as a machine of one core has, and the clone's own code."""
    own = {"PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    return {**os.environ, **own, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


def begin(clone: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Begin a command in a clone."""
    return subprocess.Popen(
        command, cwd=clone, env=environment_of(clone) | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(clone: Path, *command: str, **environment: str) -> str:
    """Run a command in a clone, and return what it printed; end this program if it fails."""
    begun = begin(clone, *command, **environment)
    printed, _ = begun.communicate()
    if begun.returncode:
        sys.exit(f"{' '.join(command)} ended with {begun.returncode}:\n{printed}")
    return printed


@contextmanager
def three_machines() -> Iterator[Cluster]:
    """A head, which has no cores to give, and two machines of one core each: processes of this."""
    from ray.cluster_utils import Cluster

    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {**MACHINE, "num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**MACHINE)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def kill_machine_of(task: str, cluster: Cluster) -> bool:
    """Kill the machine that runs a task, as if its power failed; Ray names processes by tasks."""
    for process in psutil.process_iter(["cmdline"]):
        if not " ".join(process.info["cmdline"] or []).startswith(f"ray::{task}"):
            continue
        above = {parent.pid for parent in process.parents()}
        for node in cluster.list_all_nodes():
            (raylet,) = node.all_processes["raylet"]
            if raylet.process.pid in above:
                os.kill(process.pid, signal.SIGKILL)
                cluster.remove_node(node, allow_graceful=False)
                return True
    return False


def add_torn_category(clone: Path, like: Path) -> None:
    """Add a category to the suite that is like another one, with one image broken."""
    shutil.copytree(like, clone / TORN)
    sorted((clone / TORN / "train/good").iterdir())[3].write_bytes(b"no image")
    path = clone / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["categories"].append(TORN)
    values["data"]["paths"][TORN] = TORN
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def run_and_kill(clone: Path, task: str, cluster: Cluster) -> tuple[str, str]:
    """Run the suite, kill the task's machine once, and add another one.

    Returns:
        What the run printed, and when the machine was killed.
    """
    scratch = clone / ".almrr/training" / task.partition("@")[2].replace("-", "/seed_")
    begun = begin(clone, "almrr", "repro", "--engine", "ray", RAY_ADDRESS=cluster.address)
    began = time.monotonic()
    training, killed = 0.0, ""
    while begun.poll() is None and not killed:
        training = training or (time.monotonic() if scratch.exists() else 0.0)
        checkpoints = [path.stem for path in scratch.glob("*/step_*.ckpt")]
        if checkpoints:
            time.sleep(0.2 * (time.monotonic() - training))  # steps that are lost
            if kill_machine_of(task, cluster):
                killed = f"{time.monotonic() - began:.0f} s, latest checkpoint {max(checkpoints)}"
                cluster.add_node(**MACHINE)
        time.sleep(0.05)
    return begun.communicate()[0], killed


def compare(reference: Path, clone: Path) -> dict[str, bool]:
    """Whether what two clones have on record is equal, and nothing is stale."""
    metrics = [(one / METRICS).read_bytes() for one in (reference, clone)]
    locks = [yaml.safe_load((one / "dvc.lock").read_text()) for one in (reference, clone)]
    return {
        "metrics.json equal": metrics[0] == metrics[1],
        "dvc.lock equal": locks[0] == locks[1],
        "dvc status clean": "up to date" in run(clone, "dvc", "status"),
    }


def compare_suite(reference: Path, clone: Path, task: str) -> dict[str, bool | str]:
    """Run the suite in the clone with a machine killed, and compare it; one row a finding."""
    os.environ.update(environment_of(clone))  # the machines are processes of this one
    suite = (clone / "params.yaml").read_text()
    category = task.partition("@")[2].rpartition("-")[0]
    add_torn_category(clone, reference / "data/01_raw" / category)
    with three_machines() as cluster:
        began = time.monotonic()
        printed, killed = run_and_kill(clone, task, cluster)
        (clone / "params.yaml").write_text(suite)
        second = run(clone, "almrr", "repro", "--engine", "ray", RAY_ADDRESS=cluster.address)
        seconds = time.monotonic() - began
    log = (clone / f".almrr/logs/{task}.log").read_text()
    resumed = re.findall(r"Resuming from the checkpoint \S*(step_\d+)", log.replace("\n", ""))
    again = re.findall(r"(\S+): finished after", second)
    print(f"{printed}\n{second}")
    return {
        "machine killed after": killed or False,
        "training resumed from": ", ".join(resumed) or False,
        "failing category named": f"\n  fetch@{TORN}: " in printed,
        "others complete": not [name for name in again if "@" in name],
        "run again without it": ", ".join(again),
        **compare(reference, clone),
        "both runs took": f"{seconds:.0f} s",
    }


def main() -> None:
    """Print a table of findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--task", default="train@sample_grass-0")
    options = parser.parse_args()
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="ray-suite-"))
    reference = (options.reference or scratch / "reference").absolute()
    clone = scratch.absolute() / "ray"
    rows: dict[str, bool | str] = {}
    if not options.reference:
        run(PROJECT, "git", "clone", "-q", str(PROJECT), str(reference))
        began = time.monotonic()
        run(reference, "dvc", "repro")
        rows["dvc repro took"] = f"{time.monotonic() - began:.0f} s"
    run(PROJECT, "git", "clone", "-q", str(reference), str(clone))
    rows |= compare_suite(reference, clone, options.task)
    for name, found in rows.items():
        print(f"| {name} | {found if isinstance(found, str) else ('NO', 'yes')[found]} |")
    sys.exit(not all(rows.values()))


if __name__ == "__main__":
    main()
