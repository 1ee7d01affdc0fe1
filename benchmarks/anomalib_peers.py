"""Inference of fused ALMRR against anomalib's DRAEM, PatchCore and EfficientAD at 256x256.

    python benchmarks/anomalib_peers.py [--device cpu] [--batches 1 8] [--quick]

anomalib is not a dependency: `pip install 'almrr-pipeline[peers]'`. All networks have random
weights, which cost the same time. PatchCore searches a memory of the size that its defaults keep
of 250 training images (a tenth of 250 x 32 x 32 features of 1536 channels); its time depends on
that number. Each is anomalib's torch model alone, in evaluation mode, without its loading of
images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import measure, measure_peak_memory

from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone

SIZE = (256, 256)
MEMORY = 250 * 32 * 32 // 10
REMEDY = (
    "anomalib is not installed, so its models are left out; "
    "`pip install 'almrr-pipeline[peers]'` installs it."
)


def build_draem() -> torch.nn.Module:
    """DRAEM at its defaults."""
    from anomalib.models.image.draem.torch_model import DraemModel

    return DraemModel()


def build_patchcore() -> torch.nn.Module:
    """PatchCore at its defaults, its memory filled at random."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(
        layers=("layer2", "layer3"), backbone="wide_resnet50_2", pre_trained=False
    )
    model.memory_bank = torch.rand(MEMORY, 512 + 1024)
    return model


def build_efficient_ad(size: str) -> torch.nn.Module:
    """EfficientAD, small or medium, as if its statistics had been taken."""
    from anomalib.models.image.efficient_ad.torch_model import (
        EfficientAdModel,
        EfficientAdModelSize,
    )

    model = EfficientAdModel(model_size=EfficientAdModelSize(size))
    for statistics, values in ((model.mean_std, (0.0, 1.0)), (model.quantiles, (0.0, 1.0))):
        for name, parameter in statistics.items():
            parameter.data.fill_(values[0] if name.startswith(("mean", "qa")) else values[1])
    return model


def build_ours() -> torch.nn.Module:
    """The paper's widths on ResNet-50."""
    return fuse(ALMRR(build_backbone(BackboneSettings(), weights=None), ModelSettings()).eval())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--quick", action="store_true", help="batch 1, one repetition")
    arguments = parser.parse_args()
    batches, repeats = ([1], 1) if arguments.quick else (arguments.batches, 5)
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "ALMRR (ours), fused": build_ours,
        "DRAEM": build_draem,
        "PatchCore": build_patchcore,
        "EfficientAD-S": partial(build_efficient_ad, "small"),
        "EfficientAD-M": partial(build_efficient_ad, "medium"),
    }
    print(f"## Inference against anomalib's models, {arguments.device}, 256x256\n")
    try:
        import anomalib

        print(f"anomalib {anomalib.__version__}\n")
    except ImportError:
        print(REMEDY + "\n")
        models = {"ALMRR (ours), fused": build_ours}
    print("| batch | model | time: median (quartiles) | images/s | peak memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, build in models.items():
        torch.manual_seed(0)
        model = build().eval().to(arguments.device)
        for batch in batches:
            call = partial(model, torch.rand(batch, 3, *SIZE, device=arguments.device))
            with torch.no_grad():
                timing = measure(call, repeats=repeats, device=arguments.device)
                memory = measure_peak_memory(call, device=arguments.device)
            used = "-" if memory is None else f"{memory / 1e6:.0f}"
            print(f"| {batch} | {name} | {timing} | {batch / timing.median:.2f} | {used} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
