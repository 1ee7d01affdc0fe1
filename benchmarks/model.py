"""The whole model: the authors' formulation, ours, and the bare backbone as the lower bound.

    python benchmarks/model.py [--device cpu] [--batches 1 8 32] [--step-batches 4]
        [--authors-up-to 8] [--precision float32] [--compile] [--weights FILE --stride-in-1x1]
        [--quick]

The paper's widths on ResNet-50 and 256x256 images; both sides have equal architectures and are
timed in one run. The authors' formulation is benchmarks/authors.py, with mamba_ssm's reference
scan (a loop over tokens by index), and once more with this package's fastest scan in its place, so
that one sees what the scan alone makes. Without --weights the weights are random, which costs the
same time. Above
--authors-up-to images a batch the authors'
side is left out: it needs more than a gigabyte an image.

A training step is forward, loss, backward and Adam. Peak memory is what a call adds to what was
held before it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from baselines.authors import AuthorsALMRR
from timing import measure, measure_peak_memory
from torch import Tensor

from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import Backbone, build_backbone
from almrr_pipeline.model.kernels.scan import resolve_backend
from almrr_pipeline.training.losses import focal_loss, reconstruction_loss

SIZE = (256, 256)
HEADER = (
    "| batch | way | time: median (quartiles) | images/s | over the backbone "
    "| authors' over it | peak memory, MB |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
BACKBONE, AUTHORS = "bare backbone", "authors'"
SCANS = ((AUTHORS, "indexed"), (f"{AUTHORS}, our scan", "auto"))


class Table:
    """Rows of measurements, relative to the backbone's and the authors' time at the same batch."""

    def __init__(self, title: str, *, repeats: int, device: torch.device) -> None:
        self.repeats, self.device = repeats, device
        self.seconds: dict[tuple[str, int], float] = {}
        print(f"## {title}\n", *HEADER, sep="\n")

    def add(self, batch: int, name: str, way: Callable[[], object]) -> None:
        """Time one way and print its row."""
        timing = measure(way, repeats=self.repeats, device=self.device)
        memory = measure_peak_memory(way, device=self.device)
        self.seconds[name, batch] = timing.median
        over = f"{timing.median / self.seconds[BACKBONE, batch]:.2f}"
        authors = self.seconds.get((AUTHORS, batch))
        times = "-" if authors is None else f"{authors / timing.median:.1f}"
        used = "-" if memory is None else f"{memory / 1e6:.0f}"
        print(
            f"| {batch} | {name} | {timing} | {batch / timing.median:.2f} "
            f"| {over} | {times} | {used} |",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--step-batches", type=int, nargs="*", default=[4])
    parser.add_argument("--authors-up-to", type=int, default=8)
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile of the fused model"
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--stride-in-1x1", action="store_true")
    parser.add_argument("--quick", action="store_true", help="batch 1, one repetition")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.step_batches = [1], [2]
    device, repeats = torch.device(arguments.device), 1 if arguments.quick else 5
    torch.manual_seed(0)
    backbone = build_backbone(
        BackboneSettings(stride_in_1x1=arguments.stride_in_1x1), weights=arguments.weights
    )
    label = f"{device}, {arguments.precision}, scan of ours: {resolve_backend('auto', device)}"
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
        table = Table(f"Inference, {label}", repeats=repeats, device=device)
        time_inference(
            table, backbone, arguments.batches, arguments.authors_up_to, compiled=arguments.compile
        )
        print()
        table = Table(f"Training step, {label}", repeats=min(repeats, 3), device=device)
        time_steps(table, backbone, arguments.step_batches, arguments.authors_up_to)


@torch.no_grad()  # as the authors' validation
def time_inference(
    table: Table, backbone: Backbone, batches: list[int], authors_up_to: int, *, compiled: bool
) -> None:
    """Anomaly maps of both formulations, and the backbone alone in both memory formats."""
    ours = ALMRR(backbone, ModelSettings()).eval().to(table.device)
    authors = AuthorsALMRR(backbone, ModelSettings()).eval().to(table.device)
    fused = fuse(ours)
    for batch in batches:
        images = torch.rand(batch, 3, *SIZE, device=table.device)
        table.add(batch, BACKBONE, partial(backbone, images))
        table.add(
            batch,
            f"{BACKBONE}, channels last",
            partial(backbone, images.contiguous(memory_format=torch.channels_last)),
        )
        for name, authors.scan in SCANS if batch <= authors_up_to else ():
            table.add(batch, name, partial(authors, images))
        table.add(batch, "ours", partial(ours, images))
        table.add(batch, "ours, fused", partial(fused, images))
        if compiled:
            table.add(batch, "ours, fused, compiled", partial(torch.compile(fused), images))


def time_steps(table: Table, backbone: Backbone, batches: list[int], authors_up_to: int) -> None:
    """Training steps of both formulations, and the backbone alone on both branches' images."""
    for batch in batches:
        images = [torch.rand(batch, 3, *SIZE, device=table.device) for _ in range(2)]
        mask = (torch.rand(batch, *SIZE, device=table.device) > 0.9).float()
        table.add(batch, BACKBONE, lambda images=images: [backbone(one) for one in images])
        for name, scan in SCANS if batch <= authors_up_to else ():
            table.add(
                batch,
                name,
                build_step(AuthorsALMRR(backbone, ModelSettings(), scan=scan), *images, mask),
            )
            gc.collect()  # of the step before nothing is to be in memory
        table.add(batch, "ours", build_step(ALMRR(backbone, ModelSettings()), *images, mask))


def build_step(
    model: ALMRR | AuthorsALMRR, normal: Tensor, augmented: Tensor, mask: Tensor
) -> Callable[[], None]:
    """Forward, loss, backward and Adam."""
    model.train().to(mask.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        out = model.training_forward(normal, augmented)
        loss = reconstruction_loss(out.reconstruction, out.target) + focal_loss(out.logits, mask)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
