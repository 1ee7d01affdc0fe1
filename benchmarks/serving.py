"""Throughput of `almrr serve` against the predictor's own, on the same images, in one run.

    python benchmarks/serving.py MODEL_FOLDER IMAGES [--requests 400] [--clients 8]

The two take turns. Every answer is compared with the local prediction; the exit code is 1 where one
is missing or differs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import requests

from almrr_pipeline.common.images import list_images
from almrr_pipeline.inference.predictor import Prediction, Predictor

ROUNDS = 4
TOLERANCE = 1e-5  # of a score: another batch may round the last digits differently


def main() -> int:
    """Print images a second of both, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    count = -(-arguments.requests // ROUNDS)
    images = list(islice(cycle(list_images(arguments.images)), count))
    predictor = Predictor(arguments.model_folder)
    predictor(images[:8])  # warm
    ratios, lost = [], 0
    command = [sys.executable, "-m", "almrr_pipeline.cli", "serve", str(arguments.model_folder)]
    server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().removeprefix("Ready: ").strip()
        start = time.perf_counter()
        _ask(address, images[0])
        print(f"First answer after {time.perf_counter() - start:.2f} s")
        for _ in range(ROUNDS):
            local, seconds = _predict(predictor, images)
            served, answering = _serve(address, images, arguments.clients)
            ratios.append(seconds / answering)
            lost += sum(
                abs(score - prediction.score) > TOLERANCE
                for score, prediction in zip(served, local, strict=True)
            )
            print(
                f"{count / seconds:.1f} images/s locally, {count / answering:.1f} served: "
                f"ratio {ratios[-1]:.2f}"
            )
    finally:
        server.terminate()
        server.wait()
    print(f"Ratio, median: {statistics.median(ratios):.2f}; lost or different: {lost}")
    return int(lost > 0)


def _predict(predictor: Predictor, images: Sequence[Path]) -> tuple[list[Prediction], float]:
    start = time.perf_counter()
    predictions = predictor(images)
    return predictions, time.perf_counter() - start


def _serve(address: str, images: Sequence[Path], clients: int) -> tuple[list[float], float]:
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as executor:
        scores = list(executor.map(lambda image: _ask(address, image), images))
    return scores, time.perf_counter() - start


def _ask(address: str, image: Path) -> float:
    headers = {"Content-Type": "application/octet-stream"}
    answer = requests.post(
        f"{address}/predict", image.read_bytes(), headers=headers, timeout=300
    ).json()
    score: float = answer["predictions"][0]["score"]
    return score


if __name__ == "__main__":
    sys.exit(main())
