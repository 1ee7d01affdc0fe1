"""Regional features: two small matrices a stage, against resizing to the image's size and pooling.

    python benchmarks/regional_features.py [--device cpu] [--batch 2] [--size 256] [--quick]

Both sides get the same three maps, of ResNet-50's channels, in both memory formats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from timing import measure, measure_peak_memory
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.regional_features import RegionalFeatures

CHANNELS = (256, 512, 1024)
STRIDES = (4, 8, 16)


def resize_then_pool(maps: Sequence[Tensor]) -> Tensor:
    """DFR's and the authors' way, with torch's own pooling."""
    size = 4 * maps[0].shape[-1]
    resized = (
        F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True) for x in maps
    )
    return torch.cat([F.avg_pool2d(x, 4) for x in resized], dim=1)


def resize_then_unfold(maps: Sequence[Tensor]) -> Tensor:
    """The authors' way to the letter: patches are unfused, then averaged."""
    features, grid = [], maps[0].shape[-1]
    for x in maps:
        resized = F.interpolate(x, size=(4 * grid, 4 * grid), mode="bilinear", align_corners=True)
        patches = F.unfold(resized, kernel_size=4, stride=4).view(
            len(x), x.shape[1], 16, grid, grid
        )
        features.append(patches.mean(dim=2))
    return torch.cat(features, dim=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--quick", action="store_true", help="batch 1, 64 pixels, one repetition")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch, arguments.size = 1, 64
    device, size, repeats = arguments.device, arguments.size, 1 if arguments.quick else 9
    separable = RegionalFeatures((size, size)).to(device)
    print(
        f"## Regional features, batch {arguments.batch}, {size}x{size}, {device}, "
        "ResNet-50's channels\n"
    )
    print(
        "| memory format | way | time: median (quartiles) | faster than the first "
        "| peak memory, MB | difference |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = [
            torch.rand(arguments.batch, channels, size // stride, size // stride, device=device)
            .contiguous(memory_format=memory_format)
            for channels, stride in zip(CHANNELS, STRIDES, strict=True)
        ]  # fmt: skip
        with torch.inference_mode():
            print_rows(
                maps,
                separable,
                repeats=repeats,
                device=device,
                label=str(memory_format).removeprefix("torch."),
            )


def print_rows(
    maps: list[Tensor], separable: RegionalFeatures, *, repeats: int, device: str, label: str
) -> None:
    """One row a way, against the first."""
    expected = resize_then_pool(maps)
    slowest = None
    ways = {
        "resize, pool": resize_then_pool,
        "resize, unfold, mean": resize_then_unfold,
        "two matrices": separable,
    }
    for name, way in ways.items():
        timing = measure(lambda way=way: way(maps), repeats=repeats, device=device)
        memory = measure_peak_memory(lambda way=way: way(maps), device=device)
        difference = float((way(maps) - expected).abs().max())
        slowest = slowest or timing.median
        ratio = f"{slowest / timing.median:.1f} x"
        used = "-" if memory is None else f"{memory / 1e6:.0f}"
        print(f"| {label} | {name} | {timing} | {ratio} | {used} | {difference:.1g} |")


if __name__ == "__main__":
    main()
