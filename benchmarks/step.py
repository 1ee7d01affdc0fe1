"""A training step of this tree against another commit's: CPU time on one thread, in turns.

    git worktree add ../before COMMIT
    python benchmarks/step.py ../before [--size 256] [--width 32] [--batch 8] [--steps 8]

The light network of params.yaml with random weights, half of the samples with an anomaly; forward,
loss, backward and AdamW. Once with all images embedded anew and once, in this tree alone, with kept
features. Each tree has a process of its own; they take turns, so that other work on the machine
disturbs both alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from almrr_pipeline.model.almrr import ALMRR

HERE = Path(__file__).resolve()


def main() -> None:
    """Print a table, or work for the process that does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the other commit")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--width", type=int, default=32, help="base width of the U-Net")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kept", action="store_true", help="embed once (for a process below this)")
    arguments = parser.parse_args()
    if arguments.before is None:
        answer(make_step(arguments))
        return
    trees = {
        "before": arguments.before,
        "now": HERE.parents[1],
        "now, kept features": HERE.parents[1],
    }
    rounds = {name: start(tree, kept="kept" in name) for name, tree in trees.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(arguments.steps + 2):  # two that do not count
        for name, step in rounds.items():
            seconds[name].append(step())
    medians = {name: statistics.median(each[2:]) for name, each in seconds.items()}
    print("| way | CPU ms a step | over before |\n| --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.0f} | {median / medians['before']:.2f} |")


def start(tree: Path, *, kept: bool) -> Callable[[], float]:
    """A process on a tree's code; each call is a step of it and gives its CPU seconds."""
    words = [word for word in sys.argv[1:] if not Path(word).is_dir()] + ["--kept"] * kept
    path = str(tree.resolve() / "src")
    process = subprocess.Popen(
        [sys.executable, str(HERE), *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    send, answers = process.stdin, process.stdout

    def step() -> float:
        send.write("step\n")
        send.flush()
        return float(answers.readline())

    return step


def answer(step: Callable[[], None]) -> None:
    """Take a step for each line of the standard input, and print its CPU seconds."""
    for _ in sys.stdin:
        begun = time.process_time()
        step()
        print(time.process_time() - begun, flush=True)


def make_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """A training step of the code that is imported, always on the same batch."""
    import torch

    import almrr_pipeline
    from almrr_pipeline.config import load_parameters
    from almrr_pipeline.model.almrr import ALMRR
    from almrr_pipeline.model.backbone import build_backbone
    from almrr_pipeline.training.losses import compute_losses
    from almrr_pipeline.training.optim import build_optimizer

    project = Path(almrr_pipeline.__file__).parents[2]
    parameters = load_parameters(project / "params.yaml")
    torch.manual_seed(0)
    settings = parameters.model.model_copy(update={"refinement_width": arguments.width})
    backbone = build_backbone(parameters.backbone, weights=None)
    model = ALMRR(backbone, settings, image_size=(arguments.size, arguments.size)).train()
    optimizer = build_optimizer(model, parameters.train)
    normal = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    augmented, mask = normal.clone(), torch.zeros(len(normal), *normal.shape[2:])
    augmented[::2, :, :32, :32], mask[::2, :32, :32] = 0.0, 1.0
    maps = model.backbone(torch.cat([normal, augmented[::2]]).to(memory_format=torch.channels_last))

    frozen = freeze(model)

    def step() -> None:
        recall = (lambda _images, _chosen: maps) if arguments.kept else frozen
        embedded = model.embed_both(normal, augmented, recall)
        output = model.training_forward(normal, augmented, embedded)
        loss = compute_losses(output, mask, parameters.train)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def freeze(model: ALMRR) -> Callable[[Tensor, Tensor], list[Tensor]] | None:
    """What embeds images in a training: the fused backbone, in trees that have one."""
    try:
        from almrr_pipeline.model.fused_backbone import FusedBackbone
    except ModuleNotFoundError:
        return None
    import torch

    fused = FusedBackbone(model.backbone, model.image_size).to(memory_format=torch.channels_last)
    return lambda images, _chosen: fused(images.contiguous(memory_format=torch.channels_last))


if __name__ == "__main__":
    main()
