"""A training step of this tree against another commit's, in turns: time, and CPU time.

    git worktree add ../before COMMIT
    python benchmarks/step.py ../before [--size 256] [--width 32] [--batch 8] [--steps 8]
        [--threads 2] [--precision bf16-mixed]

The light network of params.yaml with random weights, half of the samples with an anomaly; forward,
loss, backward and AdamW. Once with all images embedded anew and once, in this tree alone, with kept
features; with `--precision bf16-mixed` both again in bfloat16. Each tree has a process of its own;
they take turns, so that other work on the machine disturbs all alike. CPU time is that of all
threads together.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from timing import read_clocks, tabulate_clocks

if TYPE_CHECKING:
    from torch import Tensor

    from almrr_pipeline.model.almrr import ALMRR

HERE = Path(__file__).resolve()
Step = Callable[[], tuple[float, float]]
"""Takes a step and gives its wall and CPU seconds."""
PRECISIONS = ("32-true", "bf16-mixed")


def main() -> None:
    """Print a table, or work for the process that does."""
    arguments = parse_arguments()
    if arguments.before is None:
        answer(make_step(arguments))
        return
    rounds = {"before": start(arguments.before, arguments.threads)}
    for precision in dict.fromkeys(("32-true", arguments.precision)):
        for kept in (False, True):
            name = "now" + ", bfloat16" * (precision != "32-true") + ", kept features" * kept
            words = ["--precision", precision, *["--kept"] * kept]
            rounds[name] = start(HERE.parents[1], arguments.threads, words)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rounds}
    for _ in range(arguments.steps + 2):  # two that do not count
        for name, step in rounds.items():
            measured[name].append(step())
    counted = {name: each[2:] for name, each in measured.items()}
    print(tabulate_clocks(counted, unit="a step", over="before"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the other commit")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--width", type=int, default=32, help="base width of the U-Net")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--kept", action="store_true", help="embed once (for a process below this)")
    return parser.parse_args()


def start(tree: Path, threads: int, words: list[str] | None = None) -> Step:
    """A process on a tree's code; each call is a step of it and gives its wall and CPU seconds."""
    sizes = [word for word in sys.argv[1:] if not Path(word).is_dir()]
    path = str(tree.resolve() / "src")
    process = subprocess.Popen(
        # The last of two equal options counts.
        [sys.executable, str(HERE), *sizes, "--precision", PRECISIONS[0], *(words or [])],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    send, answers = process.stdin, process.stdout

    def step() -> tuple[float, float]:
        send.write("step\n")
        send.flush()
        wall, cpu = map(float, answers.readline().split())
        return wall, cpu

    return step


def answer(step: Callable[[], None]) -> None:
    """Take a step for each line of the standard input, and print its wall and CPU seconds."""
    for _ in sys.stdin:
        print(*read_clocks(step), flush=True)


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
    if prefers_innermost():
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, parameters.train)
    normal = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    augmented, mask = normal.clone(), torch.zeros(len(normal), *normal.shape[2:])
    augmented[::2, :, :32, :32], mask[::2, :32, :32] = 0.0, 1.0
    frozen = freeze(model)
    # As `fit` calls the model; without the cache, as there.
    half = arguments.precision == "bf16-mixed"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
    images = torch.cat([normal, augmented[::2]]).to(memory_format=torch.channels_last)
    with autocast, torch.no_grad():
        maps = model.backbone(images)

    def step() -> None:
        recall = (lambda _images, _chosen: maps) if arguments.kept else frozen
        with autocast:
            embedded = model.embed_both(normal, augmented, recall)
            output = model.training_forward(normal, augmented, embedded)
            loss = compute_losses(output, mask, parameters.train)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def prefers_innermost() -> bool:
    """Whether this tree's training has the weights' channels innermost on a CPU."""
    import torch

    from almrr_pipeline.config import TrainSettings
    from almrr_pipeline.training.runtime import prefers_channels_last

    return prefers_channels_last(TrainSettings(), torch.device("cpu"))


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
