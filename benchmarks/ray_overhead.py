"""One category through Ray against the same without: ratio of wall times.

    python benchmarks/ray_overhead.py [--stage train] [--namespace X.seed_0] [--repeats 3]

runs `kedro run` of a stage in the project around the working directory, in turn with Kedro's own
runner and with RayRunner on a cluster of this machine that is started and ended each time. The
stage's inputs have to be there; its outputs are written again, with equal content.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time

RUNNERS = {
    "sequential": "SequentialRunner",
    "Ray": "almrr_pipeline.kedro_support.ray_runner.RayRunner",
}


def measure(stage: str, namespace: str, runner: str) -> float:
    """Wall time of a run, in seconds."""
    command = ["kedro", "run", "--pipelines", stage, "--namespaces", namespace, "--runner", runner]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # as many for both
    begin = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", default="train")
    parser.add_argument("--namespace", default="sample_brick.seed_0")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in RUNNERS}
    for _ in range(options.repeats):
        for name, runner in RUNNERS.items():
            times[name].append(measure(options.stage, options.namespace, runner))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:12} {median:8.1f} s  of {', '.join(f'{t:.1f}' for t in times[name])}")
    extra = medians["Ray"] - medians["sequential"]
    print(f"ratio        {medians['Ray'] / medians['sequential']:8.3f}    {extra:+.1f} s a run")


if __name__ == "__main__":
    main()
