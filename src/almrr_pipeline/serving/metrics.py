"""Counters of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class Metrics:
    """What has been asked and answered since the start; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._seconds = [0] * (len(_BOUNDS) + 1)  # requests in each interval of the histogram
        self._total = 0.0
        self._score = 0.0

    def count_request(self, status: int, seconds: float) -> None:
        """Count an answer by its HTTP status, and the time that it took."""
        with self._lock:
            self._requests[status] += 1
            self._seconds[bisect_left(_BOUNDS, seconds)] += 1
            self._total += seconds

    def count_image(self, score: float, is_anomalous: bool | None) -> None:
        """Count an image by its verdict."""
        names = {True: "anomalous", False: "normal", None: "unjudged"}
        with self._lock:
            self._verdicts[names[is_anomalous]] += 1
            self._score += score

    def render(self, *, waiting: int, version: str) -> str:
        """Text for Prometheus.

        Args:
            waiting: images that wait now.
            version: of the model.
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
        families = (
            ("requests_total", "counter", "Answers by HTTP status.", requests),
            ("images_total", "counter", "Images by verdict.", images),
            ("score_sum", "counter", "Sum of the anomaly scores.", scores),
            ("request_seconds", "histogram", "Time from a request to its answer.", seconds),
            ("images_waiting", "gauge", "Images that wait.", [f"almrr_images_waiting {waiting}"]),
            ("model_info", "gauge", "The model.", [f'almrr_model_info{{version="{version}"}} 1']),
        )
        lines: list[str] = []
        for name, kind, text, samples in families:
            lines += [f"# HELP almrr_{name} {text}", f"# TYPE almrr_{name} {kind}", *samples]
        return "\n".join(lines) + "\n"
