"""Delivery, on request, of what MLflow has not received from earlier runs."""

from __future__ import annotations

from pathlib import Path

from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.redaction import redact_address
from almrr_pipeline.kedro_support.delivery import TrackerAwayError
from almrr_pipeline.kedro_support.mlflow_hook import TrackingHook


def deliver_waiting(project: Path) -> str:
    """Deliver what dead processes of this machine have logged; a sentence on what was done.

    Raises:
        AlmrrError: there is no project, or the tracker takes nothing.
    """
    try:
        bootstrap_project(project)
    except RuntimeError:
        advice = "run this in the folder of yours"
        raise AlmrrError(f"There is no Kedro project in {project}; {advice}.") from None
    with KedroSession.create(project) as session:
        context = session.load_context()  # type: ignore[attr-defined]
        hook = TrackingHook()
        hook.after_context_created(context)
        address = redact_address(hook.delivery.address)
        try:
            count = hook.delivery.deliver_now()
        except TrackerAwayError as error:
            raise AlmrrError(
                f"MLflow at {address} takes nothing now ({error}); nothing is lost: start it, and "
                "run almrr sync again."
            ) from error
    return f"MLflow at {address} has all." if not count else f"Delivered {count} events."
