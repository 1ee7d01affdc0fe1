"""`almrr train`, `almrr test` and `almrr report`: DVC's commands for one category, and what came.

DVC is told the stages by name. Without names it removes whatever no stage of params.yaml has made
(`dvc exp run` and `dvc checkout` do), and runs what other categories lack.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import Parameters, load_parameters, merge_values, parse_parameters
from almrr_pipeline.datasets.folder import PREFIX
from almrr_pipeline.own_data import budgets
from almrr_pipeline.own_data import surface as own
from almrr_pipeline.own_data.guard import restore_after_kill, restored_on_failure

REPORT = Path("data/08_reporting/report.html")
LOCK_FILE = Path("dvc.lock")
HEADLINE = Path("data/08_reporting/headline.json")
REPORT_STAGE = ("--single-item", "report")
_PATIENCE = 120.0  # seconds for a training to write its checkpoint after SIGTERM


class DvcError(AlmrrError):
    """A command of DVC failed; what was wrong is among what it printed."""


def train_surface(
    project: Path,
    name: str,
    folder: Path | None,
    assignments: Sequence[str] = (),
    *,
    budget: str | None = None,
    change: bool = False,
) -> Iterator[str]:
    """Add a surface, train, evaluate and report; or go on with one that is known.

    Args:
        project: the project's folder.
        name: of the surface.
        folder: of its images; None for one that is known.
        assignments: values of the category alone, as `section.name=value`.
        budget: that its sizes are taken from, see `budgets`; None for those it has, and for
            `budgets.DEFAULT` where it is new.
        change: whether a known surface may change.

    Yields:
        Lines to print: what is written, the commands as they begin, and the result.

    Raises:
        AlmrrError: something is wrong with the name, the folder or a value, a known surface would
            change without `change`, or a command failed. params.yaml, conf/ and dvc.lock are then
            as before, and so are the results of all categories.
    """
    category = own.category_of(name)
    if restore_after_kill(project):
        yield "params.yaml and conf/ are as before the run that was killed."
    known = own.find_surface(project, category)
    surface, backbone = _compose(project, name, folder, assignments, budget, known)
    changes = own.list_changes(known, surface) if known is not None else []
    if changes and not change:
        raise AlmrrError(
            f"{surface.name} has other settings: {'; '.join(changes)}. Repeat with --change to "
            "train it again with these, or choose another name."
        )
    if known is None or folder is not None:
        yield from _check_images(project, surface)
    started = False
    try:
        with restored_on_failure(project, [*own.FILES, LOCK_FILE]):
            if known is None or changes:
                own.add_surface(project, surface, backbone=backbone)
                yield f"Wrote {', '.join(map(str, own.FILES))}: {category} is among the categories."
            parameters = load_parameters(project / own.PARAMS_FILE)
            started = True
            yield from _run(project, ["repro", *_stages(parameters, category)])
    except BaseException as error:
        if started:  # DVC has removed what it was about to replace
            before = _stages(parameters, category) if known is not None else []
            _bring_back(project, ["settings", *before])
        if isinstance(error, DvcError):
            raise DvcError(f"{error} params.yaml and conf/ are as before.") from error
        raise
    yield from describe_result(project, parameters, category)
    yield from make_report(project)
    yield _to_commit(project)


def _compose(
    project: Path,
    name: str,
    folder: Path | None,
    assignments: Sequence[str],
    budget: str | None,
    known: own.Surface | None,
) -> tuple[own.Surface, dict[str, Any] | None]:
    """The surface that is asked for, and its budget's backbone section, if it takes a budget.

    Assignments win over the budget, and the budget over what is known.
    """
    if folder is not None:
        path = own.relative_path(project, folder)
    elif known is not None:
        path = known.path
    else:
        raise AlmrrError(f"{name} is not known yet; name the folder of its images too.")
    overrides = own.parse_assignments(assignments)
    if budget is None and known is None:
        budget = budgets.DEFAULT
    backbone: dict[str, Any] | None = None
    if budget is not None:
        sections = budgets.read_budget(project, budget)
        backbone = sections.pop("backbone", None)
        if "image_size" not in overrides.get("data", {}):
            budgets.suit_input(sections, project / path)
        overrides = merge_values(sections, overrides)
    if known is not None:
        overrides = merge_values(dict(known.overrides), overrides)
    plain = own.category_of(name).removeprefix(PREFIX)
    return own.Surface(plain, path, overrides), backbone


def evaluate_surface(project: Path, name: str) -> Iterator[str]:
    """Evaluate a category that was trained, where it is not up to date; yields lines to print."""
    parameters, category = _known(project, name)
    yield from _run(project, ["repro", *_stages(parameters, category)])
    yield from describe_result(project, parameters, category)


def make_report(project: Path) -> Iterator[str]:
    """Write the report of all categories, if each has results; yields lines to print."""
    parameters = load_parameters(project / own.PARAMS_FILE)
    missing = [
        category
        for category in parameters.categories
        if not all(_metrics(project, category, seed).is_file() for seed in parameters.seeds)
    ]
    if missing:
        yield f"No report: {', '.join(missing)} has no results yet; run `dvc repro` for all."
        return
    yield from _run(project, ["repro", *REPORT_STAGE])
    yield f"Report: {REPORT}"


def describe_result(project: Path, parameters: Parameters, category: str) -> Iterator[str]:
    """Lines with the model folder, the metrics and the threshold's errors on the test images."""
    for seed in parameters.seeds:
        metrics = json.loads(_metrics(project, category, seed).read_text(encoding="utf-8"))
        yield f"Model: data/06_models/{category}/seed_{seed}"
        for title, key in (("image", "image_auroc"), ("pixel", "pixel_auroc")):
            value = metrics.get(key)
            yield f"  {title} AUROC  {'undefined' if value is None else f'{value:.3f}'}"
        yield from _describe_threshold(metrics["thresholds"]["image"])


def _describe_threshold(threshold: dict[str, Any]) -> Iterator[str]:
    if threshold.get("value") is None:
        yield f"  no threshold: {threshold.get('undefined', 'no validation images')}"
        return
    for title, key, missed in (
        ("defects missed", "detections", True),
        ("good parts stopped", "false_alarms", False),
    ):
        found = threshold[key]
        count = found["of"] - found["count"] if missed else found["count"]
        yield f"  {title}: {count} of {found['of']} test images"


def _check_images(project: Path, surface: own.Surface) -> Iterator[str]:
    """What `almrr check` says; AlmrrError if training would fail or give wrong numbers."""
    from almrr_pipeline.datasets.doctor import examine

    folder = project / surface.path
    if not folder.is_dir():
        raise AlmrrError(f"There is no folder {surface.path}; correct the path.")
    general = load_parameters(project / own.PARAMS_FILE)
    own_values = {"overrides": {surface.category: dict(surface.overrides)}}
    merged = parse_parameters(merge_values(general.model_dump(mode="json"), own_values))
    try:
        parameters = merged.anchored(project).for_category(surface.category)
        diagnosis = examine(folder, parameters.data)
    except AlmrrError as error:
        raise AlmrrError(f"{surface.path}: {str(error).rstrip('.')}.") from error
    yield from diagnosis.lines()
    for finding in diagnosis.findings:
        yield f"{finding.level}: {finding.text}."
    if diagnosis.has_errors:
        raise AlmrrError(f"{surface.path} is not ready to be trained on; see the errors above.")


def _known(project: Path, name: str) -> tuple[Parameters, str]:
    restore_after_kill(project)
    parameters = load_parameters(project / own.PARAMS_FILE)
    for category in (name, own.category_of(name)):
        if category in parameters.categories:
            return parameters, category
    listed = ", ".join(parameters.categories)
    raise AlmrrError(f"There is no category {name}; params.yaml has {listed}.")


def _stages(parameters: Parameters, category: str) -> list[str]:
    """The last stages of a category; DVC finds those before them."""
    evaluated = [f"evaluate@{category}-{seed}" for seed in parameters.seeds]
    return [*evaluated, f"baseline@{category}"]


def _metrics(project: Path, category: str, seed: int) -> Path:
    return project / f"data/08_reporting/categories/{category}/seed_{seed}/metrics.json"


def _run(project: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Run `dvc ARGUMENTS`, whose output goes to the terminal; DvcError if it fails.

    DVC and what it runs are a process group of their own: whatever ends this process ends them,
    after a training has written its checkpoint.
    """
    shown = shlex.join(["dvc", *arguments])
    yield f"$ {shown}"
    sys.stdout.flush()
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project,
        env=environment,
        start_new_session=True,
    )
    try:
        status = process.wait()
    except BaseException:
        _end_group(process)
        raise
    if status:
        raise DvcError(f"`{shown}` ended with status {status}; what was wrong is above.")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _bring_back(project: Path, stages: Sequence[str]) -> None:
    """Check out the former outputs of stages from DVC's cache, as far as they are there."""
    command = [sys.executable, "-m", "dvc", "checkout", "-q", "--with-deps", "--allow-missing"]
    subprocess.run([*command, "--force", *stages], cwd=project, check=False)


def _to_commit(project: Path) -> str:
    files = (*own.FILES, LOCK_FILE, HEADLINE)
    listed = " ".join(str(file) for file in files if (project / file).is_file())
    return f"To keep this state: git add {listed}; git commit"
