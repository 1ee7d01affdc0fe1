"""Images a second from JPEG files to maps and scores, against anomalib's inferencers.

    python benchmarks/prediction.py [--images 64] [--side 700] [--rounds 5] [--device cpu]
        [--runtimes torch openvino onnxruntime] [--rivals ...] [--quick]

Ours is the light network of conf/budget/laptop.yaml at its 256x256, through `Predictor.stream`, the
way of `almrr predict`, at its defaults (batches of 8, images decoded ahead); maps have the image's
size. anomalib's are its TorchInferencer (under torch.inference_mode, which it does not enter by
itself) and OpenVINOInferencer, one image a call as their interface takes files; models are exported
by anomalib's own to_torch and to_openvino, for one image of the files' size, the fastest form of
their graphs, resize to 256x256 and thresholds included. Weights are random, which costs the same
time; PatchCore's memory has the size that its defaults keep of 200 images. On processors with
bfloat16 OpenVINO computes in it unless told otherwise: then a second row has float32, as ours do.

All ways take turns, every round on the same files; slow ones take the first of them, as many as
about --seconds allow, ours never fewer than four batches. anomalib is not a dependency:
`pip install 'almrr-pipeline[peers]'`.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib_peers import REMEDY
from PIL import Image

from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.datasets.textures import read_package_image
from almrr_pipeline.datasets.weights import fetch_backbone
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.own_data.budgets import read_budget
from almrr_pipeline.reporting.predict_files import predict_files

SIZE = (256, 256)
MEMORY = 200 * 32 * 32 // 10
PROJECT = Path(__file__).resolve().parents[1]
PATCHCORES = {
    "PatchCore, wide_resnet50_2": ("wide_resnet50_2", ("layer2", "layer3")),  # its defaults
    "PatchCore, resnet18": ("resnet18", ("layer2", "layer3")),
    "PatchCore, tf_efficientnet_lite0": ("tf_efficientnet_lite0", ("blocks.2", "blocks.4")),
}
"""Backbones and layers, all at strides 8 and 16; the last is our backbone."""
EFFICIENT_AD = "EfficientAD-S"
RUNTIMES = ("torch", "openvino", "onnxruntime")


@dataclass
class Way:
    """A way to predict files, and the images a second of each round."""

    name: str
    predict: Callable[[Sequence[Path]], object]
    precision: str = "float32"
    is_ours: bool = False
    rates: list[float] = field(default_factory=list)
    images: int = 0  # a round

    def run(self, files: Sequence[Path]) -> float:
        """Images a second."""
        start = time.perf_counter()
        self.predict(files)
        return len(files) / (time.perf_counter() - start)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rates)


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=700, help="of the files, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="about, of a way in a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument(
        "--rivals", nargs="*", choices=[*PATCHCORES, EFFICIENT_AD], metavar="RIVAL",
        default=[*PATCHCORES, EFFICIENT_AD], help=f"of {', '.join([*PATCHCORES, EFFICIENT_AD])}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few images, one round, torch alone")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.rounds, arguments.seconds = 4, 1, 1
        arguments.runtimes = ["torch"]
        arguments.rivals = arguments.rivals and [EFFICIENT_AD]
    if arguments.device != "cpu":
        arguments.runtimes = ["torch"]
    with TemporaryDirectory() as folder, chdir(folder):
        os.environ["XDG_CACHE_HOME"] = folder  # of our exported graphs
        files = write_images(Path("images"), arguments.images, arguments.side)
        ways = list(build_ours(arguments.runtimes, arguments.device))
        ways += build_rivals(arguments)
        take_turns(ways, files, rounds=arguments.rounds, seconds=arguments.seconds)
    side = arguments.side
    print(f"## From {len(files)} JPEG files of {side} x {side} to maps, {arguments.device}\n")
    print_table(ways)


def write_images(folder: Path, number: int, side: int) -> list[Path]:
    """JPEG files of the sample suite's textures, each in a light of its own and with noise."""
    folder.mkdir()
    generator, paths = np.random.default_rng(0), []
    textures = [read_package_image(f"{name}.png") for name in ("brick", "grass", "gravel")]
    for index in range(number):
        image = Image.fromarray(textures[index % 3]).resize((side, side), Image.Resampling.BICUBIC)
        light = generator.uniform(0.8, 1.1) * np.asarray(image, dtype=np.float32)
        noisy = light + generator.normal(0, 4, light.shape)
        paths.append(folder / f"{index:03d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=95)
    return paths


def build_ours(runtimes: Sequence[str], device: str) -> Iterator[Way]:
    """Our ways, with and without test-time augmentation, and with results written."""
    folders = {flips: Path(f"flips_{flips}") for flips in (False, True)}
    for flips, folder in folders.items():
        save_model(folder, flips=flips)
    for flips, folder in folders.items():
        for runtime in runtimes:
            predictor = load(folder, runtime, device)
            name = f"ours, {runtime}" + ", flips" * flips
            yield Way(name, partial(stream, predictor), is_ours=True)
    predictor = load(folders[False], "torch", device)
    for overlays, name in ((False, "`almrr predict --no-overlays`"), (True, "`almrr predict`")):
        write = partial(predict_into_new, predictor, overlays, count())
        yield Way(f"ours, torch, files written as {name} does", write, is_ours=True)


def save_model(folder: Path, *, flips: bool) -> None:
    """A model folder of the laptop's budget with the package's backbone."""
    sections = read_budget(PROJECT, "laptop")
    settings = BackboneSettings(**sections["backbone"])
    weights = Path(f"{folder}_backbone")
    weights.mkdir()
    fetch_backbone(settings, target=weights)
    torch.manual_seed(0)
    backbone = build_backbone(settings, weights=weights / "backbone.safetensors")
    folder.mkdir()
    model = ALMRR(backbone, ModelSettings(**sections["model"]), image_size=SIZE)
    model.eval().save(folder)
    InferenceConfig(category="benchmark", image_size=SIZE, flips=flips).save(folder)


def load(folder: Path, runtime: str, device: str) -> Predictor:
    """A predictor that gives verdicts, as anomalib's do."""
    return Predictor(
        folder, device=device, runtime=runtime, image_threshold=0.5, pixel_threshold=0.5
    )


def stream(predictor: Predictor, files: Sequence[Path]) -> None:
    """Predict and drop the maps one after the other."""
    deque(predictor.stream(files), maxlen=0)


def predict_into_new(
    predictor: Predictor, overlays: bool, numbers: count[int], files: Sequence[Path]
) -> None:
    """Predict and write scores.csv, and overlays if asked for, into a new folder."""
    output = Path(f"results_{overlays}_{next(numbers)}")
    predict_files(predictor, files, output, overlays=overlays)


def build_rivals(arguments: argparse.Namespace) -> Iterator[Way]:
    """Models of anomalib in its two inferencers; none if it is not installed."""
    if not arguments.rivals:
        return
    try:
        import anomalib
    except ImportError:
        print(REMEDY + "\n")
        return
    print(f"anomalib {anomalib.__version__}\n")
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    from anomalib.deploy import TorchInferencer

    os.environ["TRUST_REMOTE_CODE"] = "1"  # files that were written a moment ago
    memory = 256 if arguments.quick else MEMORY
    for name in arguments.rivals:
        model = build_efficient_ad() if name == EFFICIENT_AD else build_patchcore(name, memory)
        set_thresholds(model.post_processor)
        inferencer = TorchInferencer(model.eval().to_torch(name), device=arguments.device)
        yield Way(f"anomalib {name}, torch", partial(call, inferencer))
        if "openvino" in arguments.runtimes:
            yield from build_openvino(name, model, arguments.side)


def build_openvino(name: str, model: Any, side: int) -> Iterator[Way]:  # noqa: ANN401
    """OpenVINOInferencer as it comes and, where that is not float32, in float32."""
    from anomalib.deploy import OpenVINOInferencer

    # By default anomalib exports a batch that may vary; of PatchCore that graph refuses one image.
    fixed = {"dynamic_shapes": None, "dynamic_axes": None}
    with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
        path = model.to_openvino(name, input_size=(side, side), onnx_kwargs=fixed)
    for config in (None, {"INFERENCE_PRECISION_HINT": "f32"}):
        inferencer = OpenVINOInferencer(path, device="CPU", config=config)
        precision = inferencer.model.get_property("INFERENCE_PRECISION_HINT").to_string()
        precision = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[precision]
        yield Way(f"anomalib {name}, openvino", partial(call, inferencer), precision)
        if precision == "float32":
            return


def call(inferencer: Any, files: Sequence[Path]) -> None:  # noqa: ANN401
    """One call an image."""
    with torch.inference_mode():
        for path in files:
            found = inferencer.predict(path)
            assert found.anomaly_map is not None
            assert found.pred_label is not None


def build_patchcore(name: str, memory: int) -> Any:  # noqa: ANN401
    """PatchCore with random weights, its memory filled at random."""
    from anomalib.models import Patchcore

    backbone, layers = PATCHCORES[name]
    module = Patchcore(backbone=backbone, layers=layers, pre_trained=False)
    channels = sum(module.model.feature_extractor.out_dims)
    module.model.memory_bank = torch.rand(memory, channels)
    return module


def build_efficient_ad() -> Any:  # noqa: ANN401
    """EfficientAD, small, as if its statistics had been taken."""
    from anomalib.models import EfficientAd

    module = EfficientAd()
    for statistics_, zeros in ((module.model.mean_std, "mean"), (module.model.quantiles, "qa")):
        for name, parameter in statistics_.items():
            parameter.data.fill_(0.0 if name.startswith(zeros) else 1.0)
    return module


def set_thresholds(post_processor: Any) -> None:  # noqa: ANN401
    """As if they had been found: without them anomalib's graphs have no verdict."""
    for what in ("image", "pixel"):
        getattr(post_processor, f"_{what}_threshold").fill_(0.5)
        getattr(post_processor, f"{what}_min").fill_(0.0)
        getattr(post_processor, f"{what}_max").fill_(1.0)


def take_turns(ways: Sequence[Way], files: list[Path], *, rounds: int, seconds: float) -> None:
    """Fill in every way's rates, after a warm-up that also decides how many images it takes."""
    for way in ways:
        way.run(files[:8] if way.is_ours else files[:2])
        rate = way.run(files[:16] if way.is_ours else files[:2])
        way.images = int(min(len(files), max(32 if way.is_ours else 2, rate * seconds)))
    for number in range(rounds):
        for way in ways:
            way.rates.append(way.run(files[: way.images]))
            print(f"round {number + 1}: {way.rates[-1]:.2f} {way.name}", file=sys.stderr)


def print_table(ways: Sequence[Way]) -> None:
    """Every way with its rate, and ours over anomalib's fastest."""
    rivals = [way for way in ways if not way.is_ours]
    fastest = max(rivals, key=lambda way: way.median, default=None)
    in_float32 = [way for way in rivals if way.precision == "float32"]
    fastest_float32 = max(in_float32, key=lambda way: way.median, default=None)
    print("| way | precision | images a round | images/s: median (quartiles) "
          "| over anomalib's fastest | over its fastest in float32 |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- |")
    for way in sorted(ways, key=lambda way: -way.median):
        low, _, high = (
            statistics.quantiles(way.rates, n=4, method="inclusive")
            if len(way.rates) > 1
            else way.rates * 3
        )
        ratios = [
            f"{way.median / other.median:.2f}" if other else "-"
            for other in (fastest, fastest_float32)
        ]
        print(f"| {way.name} | {way.precision} | {way.images} | {way.median:.2f} "
              f"({low:.2f}-{high:.2f}) | {' | '.join(ratios)} |")  # fmt: skip


if __name__ == "__main__":
    main()
