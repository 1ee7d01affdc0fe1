"""The factory's question must be answered in counts, and a refuted promise must be named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from almrr_pipeline.evaluation.thresholds import proportion
from almrr_pipeline.reporting.verdicts import (
    describe_broken_promise,
    list_broken_promises,
    list_verdict_headlines,
    tabulate_verdicts,
)


def metrics(
    alarms: int, found: int, *, normals: int = 39, guaranteed: float = 0.05
) -> dict[str, Any]:
    """Of 20 normal and 40 defective test images."""
    of = {"false_alarms": (alarms, 20), "detections": (found, 40)}
    rates = {name: vars(proportion(np.arange(n) < k)) for name, (k, n) in of.items()}
    threshold = {"value": 0.4, "rate": 0.05, "normals": normals, "guaranteed_rate": guaranteed}
    return {"thresholds": {"image": {**threshold, **rates}}}


def test_headlines_count_over_all_runs() -> None:
    missed, stopped = list_verdict_headlines([metrics(1, 40), metrics(4, 30)])
    assert missed[:2] == ("Missed defects", "12.5 %")
    assert missed[2].startswith("10 of 80 defective test images; 95 % interval 6.2 to 21.8 %")
    assert stopped[1] == "12.5 %"
    assert stopped[2].startswith("5 of 40 normal")


def test_seeds_on_the_same_images_have_no_common_interval() -> None:
    assert "interval" not in list_verdict_headlines([metrics(1, 40)] * 2, repeated=True)[0][2]


def test_without_a_threshold_there_is_a_dash_and_a_reason() -> None:
    bare = {"thresholds": {"image": {"value": None, "undefined": "no image was held out"}}}
    assert list_verdict_headlines([bare])[0][1] == "\N{EN DASH}"
    table = tabulate_verdicts({"tiles": bare}, {})
    assert table.notes == ["no image was held out"]


def test_a_promise_is_refuted_where_the_interval_is_above_it() -> None:
    # 4 of 20: 95 % interval 5.7 to 43.7 %; 3 of 20: 3.2 to 37.9 %
    assert describe_broken_promise(metrics(3, 40)["thresholds"]["image"], "image") == ""
    sentence = describe_broken_promise(metrics(4, 40)["thresholds"]["image"], "image")
    assert "4 of 20 are (20 %, 95 % interval 5.7 % to 44 %)" in sentence
    (listed,) = list_broken_promises({"brick": metrics(3, 40), "grass": metrics(4, 40)})
    assert listed.startswith("grass: ")
    table = tabulate_verdicts({"brick": metrics(3, 40), "grass": metrics(4, 40)}, {})
    assert [row.cells[2].small for row in table.rows] == ["", "refuted by the test images"]


def test_the_chance_of_so_many_false_alarms_is_that_of_exchangeable_images() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((40_000, 39 + 20))  # the 38th smallest of 39 keeps 2 of 40: 5 %
    threshold = np.sort(scores[:, :39])[:, 37:38]
    chance = ((scores[:, 39:] > threshold).sum(1) >= 4).mean()
    sentence = describe_broken_promise(metrics(4, 40)["thresholds"]["image"], "image")
    stated = float(sentence.partition("with a chance of ")[2].partition(" %")[0])
    assert stated == pytest.approx(100 * chance, abs=0.4)
