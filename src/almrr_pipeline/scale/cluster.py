"""A Ray cluster: reaching one, or starting one on this machine, and what has to be true of it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import DataSettings, ScaleSettings

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "timm", "lightning", "numpy", "scipy", "numba", "pandas", "kedro", "mlflow")
"""Packages that decide results or the work's form: of one version on all machines."""
OWN_CODE = "almrr_pipeline's code"
_PASSED_ON = ("MLFLOW_", "AWS_", "DVC_EXP_NAME", "KEDRO_DISABLE_TELEMETRY", "DO_NOT_TRACK")
"""How the names of the environment variables begin that tasks get from the driver."""
_OBJECT_STORE = 256 * 2**20  # bytes; paths, verdicts and reports go through it, no images
_SECONDS_TO_CONNECT = 5.0  # Ray itself tries for minutes
_SECONDS_TO_PROBE = 60.0  # a machine's first Python process has to start


class Share(NamedTuple):
    """What a task asks for."""

    cpus: float
    gpus: float


class Machine(NamedTuple):
    """What a machine of the cluster reports."""

    name: str
    versions: dict[str, str]
    unseen: list[Path]


def import_ray() -> Any:  # noqa: ANN401 - a module
    """Ray, which is an extra; AlmrrError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise AlmrrError(
            "Ray is not installed; run: pip install 'almrr-pipeline[ray]' (on a cluster, on all "
            "of its machines)."
        ) from None
    return ray


@contextmanager
def connected() -> Iterator[Any]:
    """The cluster of RAY_ADDRESS, else one of this machine's cores and GPUs, which ends with this.

    A connection that exists is used and left.

    Raises:
        AlmrrError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # no GPU asked, none seen
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        sizes = {"object_store_memory": _OBJECT_STORE, "include_dashboard": False}
        ray.init(address, **sizes, **quiet)
    else:
        _check_address(address)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(address, str(error).partition("\n")[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise AlmrrError if nothing answers at HOST:PORT; what is no such address passes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise _unreachable(address, str(error.strerror or error)) from error


def _unreachable(address: str, reason: str) -> AlmrrError:
    return AlmrrError(
        f"There is no Ray cluster at RAY_ADDRESS {address} ({reason}); start one with `ray start "
        "--head`, correct the address, or unset RAY_ADDRESS to use this machine alone."
    )


def prepare(ray: Any, project: Path, settings: ScaleSettings) -> Share:  # noqa: ANN401
    """What a task asks for; AlmrrError unless all machines can do a project's tasks."""
    share = share_of(settings, ray)
    check_share(share, ray, wait=settings.wait)
    linked = [folder for name in ("data", ".almrr") if (folder := project / name).exists()]
    check_machines(ray, project, packages=own_versions(), files=linked)
    return share


def check_sources(ray: Any, data: DataSettings) -> None:  # noqa: ANN401
    """AlmrrError unless all machines see what images are fetched from, as far as it exists here."""
    named = (Path(name).expanduser() for name in (*data.paths.values(), data.mirror) if name)
    if sources := [path for path in named if path.exists()]:
        check_machines(ray, None, packages={}, files=sources)


def share_of(settings: ScaleSettings, ray: Any) -> Share:  # noqa: ANN401
    """What a task asks for; `gpus: auto` is one where the cluster has any."""
    present = ray.cluster_resources().get("GPU", 0)
    gpus = min(1.0, present) if settings.gpus == "auto" else settings.gpus
    return Share(settings.cpus, gpus)


def check_share(share: Share, ray: Any, *, wait: float) -> None:  # noqa: ANN401
    """Raise AlmrrError if no machine has what a task asks for, which Ray would wait for for ever.

    Args:
        share: of one task.
        ray: connected.
        wait: seconds that a cluster has for adding such a machine.
    """
    end = time.monotonic() + wait
    while True:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has = [(one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in machines]
        if any(cpus >= share.cpus and gpus >= share.gpus for cpus, gpus in has):
            return
        if time.monotonic() >= end:
            break
        time.sleep(0.5)
    listed = ", ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in sorted(set(has)))
    raise AlmrrError(
        f"A task asks for {share.cpus:g} CPUs and {share.gpus:g} GPUs, and after {wait:g} s no "
        f"machine of the cluster has them; there are machines with {listed or 'nothing'}. Ask for "
        "less (scale.cpus, scale.gpus), or add a machine."
    )


def check_machines(
    ray: Any,  # noqa: ANN401
    folder: Path | None,
    *,
    packages: Mapping[str, str],
    files: Sequence[Path] = (),
) -> None:
    """Raise AlmrrError if a machine has other versions, or does not see a folder or file.

    Args:
        ray: connected.
        folder: writable, and the same on all machines, as on a shared disk; None for none.
        packages: expected versions, see `own_versions`.
        files: others that all machines have to see.
    """
    marker = None if folder is None else folder / f".seen-by-all-{uuid.uuid4().hex}"
    if marker:
        marker.touch()
    try:
        machines = _ask_machines(ray, [*([marker] if marker else []), *files])
    finally:
        if marker:
            marker.unlink()
    for machine in machines:
        for name, expected in packages.items():
            found = machine.versions.get(name, "missing")
            if found != expected:
                raise AlmrrError(
                    f"{machine.name} has {name} {found}, this machine {expected}; install the same "
                    "versions on all machines of the cluster (constraints.txt pins them)."
                )
        for path in machine.unseen:
            raise AlmrrError(
                f"{machine.name} does not see {folder if path == marker else path} of this "
                "machine; put it on a disk that all machines mount under the same path."
            )


def _ask_machines(ray: Any, paths: list[Path]) -> list[Machine]:  # noqa: ANN401
    """Ask each machine for its versions, and which of the paths it does not see."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0, max_retries=0)(_describe)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(PACKAGES, paths)
        for node in alive
    ]
    try:
        return [Machine(*answer) for answer in ray.get(asked, timeout=_SECONDS_TO_PROBE)]
    except ray.exceptions.RayError as error:
        reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        raise AlmrrError(
            f"Not every machine of the cluster could run a task ({reason}); install almrr-pipeline "
            "on all of them, in the environment that `ray start` runs in."
        ) from error


def _describe(
    packages: tuple[str, ...], paths: list[Path]
) -> tuple[str, dict[str, str], list[Path]]:
    """Name and versions of the machine that this runs on, and what it does not see."""
    return platform.node(), own_versions(packages), [path for path in paths if not path.exists()]


def own_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of packages, and a checksum of this package's files."""
    found = {"Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {OWN_CODE: _hash_own_code()}


def _hash_own_code() -> str:
    spec = find_spec("almrr_pipeline")
    assert spec is not None
    assert spec.origin is not None
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def passed_environment() -> dict[str, str]:
    """Environment variables of this process that tasks get too."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
