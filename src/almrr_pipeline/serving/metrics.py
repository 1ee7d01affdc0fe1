"""Counters of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds

RECENT = 1000
"""Images among which alarms are counted."""


class Metrics:
    """What has been asked and answered since the start; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._seconds = [0] * (len(_BOUNDS) + 1)  # requests in each interval of the histogram
        self._total = 0.0
        self._score = 0.0
        self._unlike: Counter[str] = Counter()
        self._recent: deque[bool] = deque(maxlen=RECENT)  # whether each was an alarm

    def count_request(self, status: int, seconds: float) -> None:
        """Count an answer by its HTTP status, and the time that it took."""
        with self._lock:
            self._requests[status] += 1
            self._seconds[bisect_left(_BOUNDS, seconds)] += 1
            self._total += seconds

    @property
    def recent(self) -> tuple[int, int]:
        """Alarms among the last images, and the number of these."""
        with self._lock:
            return sum(self._recent), len(self._recent)

    def count_image(
        self, score: float, is_anomalous: bool | None, unlike: Iterable[str] = ()
    ) -> None:
        """Count an image by its verdict, and in what it is unlike those of the calibration."""
        names = {True: "anomalous", False: "normal", None: "unjudged"}
        with self._lock:
            self._verdicts[names[is_anomalous]] += 1
            self._score += score
            self._unlike.update(unlike)
            self._recent.append(is_anomalous is True)

    def render(self, *, waiting: int, version: str, p_value: float | None = None) -> str:
        """Text for Prometheus.

        Args:
            waiting: images that wait now.
            version: of the model.
            p_value: of the recent alarms; None where the threshold promises nothing.
        """
        with self._lock:
            requests = [
                f'almrr_requests_total{{status="{status}"}} {count}'
                for status, count in sorted(self._requests.items())
            ]
            images = [
                f'almrr_images_total{{verdict="{verdict}"}} {count}'
                for verdict, count in sorted(self._verdicts.items())
            ]
            cumulative, seconds = 0, []
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._seconds, strict=True):
                cumulative += count
                seconds.append(f'almrr_request_seconds_bucket{{le="{bound}"}} {cumulative}')
            seconds += [
                f"almrr_request_seconds_sum {self._total:.6f}",
                f"almrr_request_seconds_count {cumulative}",
            ]
            scores = [f"almrr_score_sum {self._score:.6f}"]
            unlike = [
                f'almrr_images_unlike_total{{how="{how}"}} {count}'
                for how, count in sorted(self._unlike.items())
            ]
        alarms = "Probability of so many alarms in the last 1000 images, were all normal."
        known = [] if p_value is None else [f"almrr_alarm_p_value {p_value:.6g}"]
        families = (
            ("requests_total", "counter", "Answers by HTTP status.", requests),
            ("images_total", "counter", "Images by verdict.", images),
            ("score_sum", "counter", "Sum of the anomaly scores.", scores),
            ("images_unlike_total", "counter", "Images unlike the calibration's, by how.", unlike),
            ("alarm_p_value", "gauge", alarms, known),
            ("request_seconds", "histogram", "Time from a request to its answer.", seconds),
            ("images_waiting", "gauge", "Images that wait.", [f"almrr_images_waiting {waiting}"]),
            ("model_info", "gauge", "The model.", [f'almrr_model_info{{version="{version}"}} 1']),
        )
        lines: list[str] = []
        for name, kind, text, samples in families:
            lines += [f"# HELP almrr_{name} {text}", f"# TYPE almrr_{name} {kind}", *samples]
        return "\n".join(lines) + "\n"
