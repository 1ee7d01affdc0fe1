"""Training throughput from images on disk to updated weights: the authors' way against ours.

    python benchmarks/training.py [--device cpu] [--batch 4] [--steps 5] [--precision 32-true]
    [--json FILE]

The authors' way: each image is read, resized and given its anomaly when its batch is made, and the
model is written as in their code (benchmarks/authors.py). The simulation is ours, which flatters
their side. Ours: a synthetic set made beforehand, and `fit`. Both train the paper's widths on
ResNet-50 with random weights, Adam, and
the same images: those of the sample suite. Medians over the steps after the first, with the first
and third quartile.

Their scan is mamba_ssm's kernel on a GPU that has it; else --authors-scan names a backend of this
package to stand for it. On a CPU mamba_ssm offers its reference alone, a loop over the tokens
("indexed").

The data's share of a step is the time to make a batch, by itself and in one process, over the time
of a step. What our synthetic set costs is printed below: it is made once.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.authors import AuthorsALMRR
from timing import Timing, measure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.config import (
    BackboneSettings,
    ModelSettings,
    SynthesisSettings,
    Tiling,
    TrainSettings,
)
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.datasets.textures import write_package_textures
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import Backbone, build_backbone
from almrr_pipeline.synthesis.simulate import simulate_sample
from almrr_pipeline.synthesis.synthetic_set import ImagePaths, SyntheticSet, synthesize
from almrr_pipeline.training.checkpoints import Resuming
from almrr_pipeline.training.data import SampleOrder, SyntheticBatches, choose_residence, to_images
from almrr_pipeline.training.losses import focal_loss, reconstruction_loss
from almrr_pipeline.training.train import fit

CATEGORY = "sample_gravel"
SIZE = (256, 256)
SMALL = ModelSettings(latent=32, dim=32, depth=2, decoder=(16, 16), refinement_width=8)
"""Widths with which the script can be tried in seconds."""
SKIPPED = 1
"""Steps at the start that do not count: memory is taken, kernels are compiled."""


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds a step, and seconds to make a batch."""

    way: str
    step: Timing
    data: Timing

    def describe(self, batch: int) -> str:
        """The line, for a batch of that many samples."""
        share = 100 * self.data.median / self.step.median
        rate = batch / self.step.median
        return f"| {self.way} | {self.step} | {rate:.3g} | {self.data} | {share:.2g} % |"


class SimulatedOnTheFly(Dataset[dict[str, Tensor]]):
    """The authors' way: image and texture are read, resized and blended for every sample."""

    def __init__(self, normals: list[Path], textures: list[Path]) -> None:
        self._normals = normals
        self._textures = textures
        self._settings = SynthesisSettings()

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        normal = self._read(self._normals[number % len(self._normals)])
        texture = self._read(self._textures[number % len(self._textures)])
        augmented, mask, _ = simulate_sample(
            number, normals=normal[None], textures=texture[None], settings=self._settings, seed=0
        )
        images = {"normal": normal, "augmented": augmented}
        images = {
            name: torch.from_numpy(one).permute(2, 0, 1).float() / 255
            for name, one in images.items()
        }
        return {**images, "mask": torch.from_numpy(mask)}

    @staticmethod
    def _read(path: Path) -> ImageArray:
        return resize_image(read_image(path), SIZE)


def collect_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the sample suite's images; returns normal images and textures."""
    (folder / CATEGORY).mkdir()
    (folder / "textures").mkdir()
    source = dataset_for(CATEGORY)
    source.fetch(
        CATEGORY, target=folder / CATEGORY, request=FetchRequest(scratch=folder / "scratch")
    )
    write_package_textures(folder / "textures")
    normals = [
        item.image for item in source.items(CATEGORY, folder / CATEGORY) if item.split == "train"
    ]
    return normals, sorted((folder / "textures").iterdir())


def make_synthetic_set(
    folder: Path, normals: list[Path], textures: list[Path], samples: int
) -> tuple[SyntheticSet, float]:
    """Make our synthetic set; returns it with the seconds that a sample took."""
    (folder / "synthetic_set").mkdir()
    begun = time.perf_counter()
    synthesize(
        ImagePaths(root=folder, training=normals, validation=[], textures=textures),
        SynthesisSettings(samples=samples),
        folder=folder / "synthetic_set",
        image_size=SIZE,
        tiling=Tiling(),
        seed=0,
    )
    return SyntheticSet.load(folder / "synthetic_set"), (time.perf_counter() - begun) / samples


def make_loader(
    dataset: SimulatedOnTheFly, *, batch: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """The authors' batches, in order."""
    return iter(
        DataLoader(
            dataset, batch_size=batch, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
    )


def build_parts(arguments: argparse.Namespace) -> tuple[Backbone, ModelSettings]:
    """The backbone and the model's widths: the paper's, or small ones."""
    settings = BackboneSettings(name="resnet18" if arguments.small else "resnet50")
    return build_backbone(settings, weights=None), SMALL if arguments.small else ModelSettings()


def train_as_authors(
    batches: Iterator[dict[str, Tensor]], arguments: argparse.Namespace
) -> Callable[[], None]:
    """One step of the authors' training: Adam, mean squared error plus focal loss."""
    device = torch.device(arguments.device)
    backbone, widths = build_parts(arguments)
    model = (
        AuthorsALMRR(backbone, widths, image_size=SIZE, scan=arguments.authors_scan)
        .train()
        .to(device)
    )
    optimizer = torch.optim.Adam((one for one in model.parameters() if one.requires_grad), lr=1e-4)

    def step() -> None:
        batch = {name: one.to(device, non_blocking=True) for name, one in next(batches).items()}
        optimizer.zero_grad()
        output = model.training_forward(batch["normal"], batch["augmented"])
        loss = reconstruction_loss(output.reconstruction, output.target) + focal_loss(
            output.logits, batch["mask"]
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def time_fit(synthetic_set: SyntheticSet, arguments: argparse.Namespace, scratch: Path) -> Timing:
    """Seconds a step of `fit`, by the times at which its windows end."""
    window = (
        10 if arguments.device == "cuda" else 1
    )  # on a GPU, reading the loss at each step would make it wait
    ends: list[float] = []
    backbone, widths = build_parts(arguments)
    fit(
        ALMRR(backbone, widths, image_size=SIZE),
        synthetic_set,
        TrainSettings(
            steps=window * (arguments.steps + SKIPPED),
            batch_size=arguments.batch,
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            devices=1,
            log_every=window,
            checkpoint_every=10**9,
            deterministic=False,
            precision=arguments.precision,
            channels_last=arguments.channels_last,
        ),
        resuming=Resuming(scratch, "benchmark"),
        seed=0,
        on_metrics=lambda step, values: ends.append(time.perf_counter()),
    )
    seconds = sorted(np.diff(ends[SKIPPED - 1 :]) / window)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(statistics.median(seconds), low, high)


def time_gathering(synthetic_set: SyntheticSet, arguments: argparse.Namespace) -> Timing:
    """Seconds to make one of our batches, floats on the device included."""
    device = torch.device(arguments.device)
    order = SampleOrder(len(synthetic_set), batch_size=arguments.batch, seed=0)
    batches = SyntheticBatches(synthetic_set, order, device=choose_residence(synthetic_set, device))
    steps = iter(range(10**6))

    def gather() -> None:
        batch = batches[next(steps)]
        for name in ("normal", "augmented"):
            to_images(batch[name].to(device), channels_last=arguments.channels_last)

    return measure(gather, repeats=30, warmup=3, device=device)


def compare(arguments: argparse.Namespace, folder: Path) -> tuple[list[Row], float]:
    """Measure both ways; returns their rows, and seconds per sample of our synthetic set."""
    device = torch.device(arguments.device)
    normals, textures = collect_images(folder)
    synthetic_set, synthetic_set_seconds = make_synthetic_set(
        folder, normals, textures, arguments.samples
    )
    on_the_fly = SimulatedOnTheFly(normals, textures)
    alone = make_loader(on_the_fly, batch=arguments.batch, workers=0)
    simulated = measure(lambda: next(alone), repeats=20)

    batches = make_loader(on_the_fly, batch=arguments.batch, workers=arguments.workers)
    step = train_as_authors(batches, arguments)
    theirs = Row(
        "the authors' way",
        measure(step, repeats=arguments.steps, warmup=SKIPPED, device=device),
        simulated,
    )
    del step, batches
    return [
        theirs,
        Row(
            "ours",
            time_fit(synthetic_set, arguments, folder / "checkpoints"),
            time_gathering(synthetic_set, arguments),
        ),
    ], synthetic_set_seconds


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=5, help="measured; on a GPU, of `fit`, tens of them"
    )
    parser.add_argument("--samples", type=int, default=200, help="of our synthetic set")
    parser.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed", "16-mixed"],
        default="32-true",
        help="of `fit`",
    )
    parser.add_argument("--channels-last", action="store_true", help="of `fit`")
    parser.add_argument(
        "--authors-scan", default="indexed", help="indexed, mamba_ssm, triton, numba or torch"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that simulate for the authors' loop"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument(
        "--small", action="store_true", help="small widths on ResNet-18, to try the script"
    )
    return parser.parse_args(command)


def main() -> None:
    """Measure, print the table."""
    arguments = parse()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows, synthetic_set_seconds = compare(arguments, Path(folder))
    print(
        f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batch {arguments.batch}, ",
        end="",
    )
    print(f"their scan {arguments.authors_scan}, `fit` at {arguments.precision}\n")
    print(
        "| | a step | samples a second | making a batch | its fraction |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        print(row.describe(arguments.batch))
    print(f"\nThroughput, ours over the authors': {rows[0].step.median / rows[1].step.median:.3g}")
    print(f"Our synthetic set: {1e3 * synthetic_set_seconds:.3g} ms a sample, once")
    if arguments.json:
        written: dict[str, Any] = {
            "rows": [asdict(row) for row in rows],
            "synthetic_set_seconds_per_sample": synthetic_set_seconds,
        }
        arguments.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
