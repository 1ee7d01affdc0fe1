"""What a run on a cluster says at its end; the run itself is in tests/scale."""

from __future__ import annotations

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.kedro_support.ray_runner import _list_failures


def test_each_failure_has_a_line_and_what_needs_it_is_named() -> None:
    needs = {"a": set(), "a.seed_0": {"a"}, "b": set(), "b.seed_0": {"b"}}
    needs["report"] = {"a.seed_0", "b.seed_0"}
    text = _list_failures({"a": AlmrrError("3.png is torn; replace it.")}, needs)
    assert text.splitlines() == [
        "1 of 5 parts of the run failed, 2 are finished, 2 need a failed one (a.seed_0, report):",
        "  a: 3.png is torn; replace it.",
    ]
