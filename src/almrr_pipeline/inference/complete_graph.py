"""From an image of any size to map, score and verdict inside one ONNX graph, as `almrr predict`.

Input "image": uint8 RGB, shape (H, W, 3), any H and W. Outputs: "map", float32 in [0, 1], shape
(H, W); "score", float32 in [0, 1]; and, where the model has a threshold, "is_anomalous", bool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import BLANK, Region
from almrr_pipeline.inference.inference_config import InferenceConfig

if TYPE_CHECKING:
    import onnx

# Weights (out, in) of Pillow's bilinear resizing of one axis: triangles around the centers of the
# outputs, as wide as one where the axis shrinks. Resize with antialias differs by runtime.
_WEIGHTS = """
    {w}_outputs = Range (zero, {length_out}, one)
    {w}_inputs = Range (zero, {length_in}, one)
    {w}_scale = Div ({length_in}, {length_out})
    {w}_support = Max ({w}_scale, one)
    {w}_centers = Add ({w}_outputs, half)
    {w}_scaled = Mul ({w}_centers, {w}_scale)
    {w}_column = Unsqueeze ({w}_scaled, innermost)
    {w}_places = Add ({w}_inputs, half)
    {w}_offsets = Sub ({w}_places, {w}_column)
    {w}_relative = Div ({w}_offsets, {w}_support)
    {w}_distance = Abs ({w}_relative)
    {w}_inside = Sub (one, {w}_distance)
    {w}_raw = Relu ({w}_inside)
    {w}_sum = ReduceSum ({w}_raw, innermost)
    {w} = Div ({w}_raw, {w}_sum)
"""
# Pixels of one axis of the region, stretched over the image: those that the centers are in.
_PLACES = """
    {w}_long = Gather (image_shape, {w}_index)
    {w}_range = Range (none, {w}_long, single)
    {w}_twice = Mul ({w}_range, double)
    {w}_odd = Add ({w}_twice, single)
    {w}_own = Constant <value_int: int = {own}> ()
    {w}_product = Mul ({w}_odd, {w}_own)
    {w}_whole = Mul ({w}_long, double)
    {w}_places = Div ({w}_product, {w}_whole)
"""
_IN_REGION = """
    none = Constant <value_int: int = 0> ()
    single = Constant <value_int: int = 1> ()
    double = Constant <value_int: int = 2> ()
    {places}
    counted_rows = Gather <axis: int = 0> (region, height_places)
    counted_bytes = Gather <axis: int = 1> (counted_rows, width_places)
    counted = Cast <to: int = 1> (counted_bytes)
    counted_column = Unsqueeze (counted, innermost)
    above_blank = Sub (whole_image, blank)
    kept = Mul (above_blank, counted_column)
    float_image = Add (kept, blank)
"""
# By products: of constant masks of bool OpenVINO's Where takes nothing for true.
_BLANK_LEVELS = """
    levels_above_blank = Sub (whole_levels, blank_planar)
    levels_kept = Mul (levels_above_blank, region_small)
    levels = Add (levels_kept, blank_planar)
"""
_GRAPH = """
complete (uint8[H, W, 3] image) => ({outputs}) {{
    zero = Constant <value_float: float = 0.0> ()
    half = Constant <value_float: float = 0.5> ()
    one = Constant <value_float: float = 1.0> ()
    innermost = Constant <value_ints: ints = [-1]> ()
    first = Constant <value_ints: ints = [0]> ()
    rows = Constant <value_float: float = {rows}.0> ()
    columns = Constant <value_float: float = {columns}.0> ()
    image_shape = Shape (image)
    lengths = Cast <to: int = 1> (image_shape)
    height_index = Constant <value_int: int = 0> ()
    width_index = Constant <value_int: int = 1> ()
    height = Gather (lengths, height_index)
    width = Gather (lengths, width_index)
    {weights}
    whole_image = Cast <to: int = 1> (image)
    {blank_image}
    planar = Transpose <perm: ints = [2, 0, 1]> (float_image)
    shrink_x_transposed = Transpose (shrink_x)
    narrow = MatMul (planar, shrink_x_transposed)
    narrow_half = Add (narrow, half)
    narrow_levels = Floor (narrow_half)
    small = MatMul (shrink_y, narrow_levels)
    small_half = Add (small, half)
    whole_levels = Floor (small_half)
    {blank_levels}
    batch = Unsqueeze (levels, first)
    white = Constant <value_float: float = 255.0> ()
    images = Div (batch, white)
    after_network = {cut_network}
    channel = Constant <value_ints: ints = [1]> ()
    maps = Unsqueeze (after_network, channel)
    smooth = AveragePool <kernel_shape: ints = [{side}, {side}],
        pads: ints = [{before}, {before}, {after}, {after}]> (maps)
    score = ReduceMax <keepdims: int = 0> (smooth)
    threshold = Constant <value_float: float = {threshold}> ()
    is_anomalous = Greater (score, threshold)
    network_map = Squeeze (after_network, first)
    grow_x_transposed = Transpose (grow_x)
    wide = MatMul (network_map, grow_x_transposed)
    full = MatMul (grow_y, wide)
    whole_map = Clip (full, zero, one)
    {cut_map}
}}
"""


def check_completable(config: InferenceConfig) -> None:
    """Refuse, before the export, a model that cuts images into tiles."""
    if config.tiling.enabled:
        raise AlmrrError(
            "A complete graph cannot cut images into tiles, as this model does; export it without "
            "--complete."
        )


def complete_graph(model: onnx.ModelProto, config: InferenceConfig) -> None:
    """Put resizing before the network of `export_onnx`, and score and verdict after it, in place.

    Equal to `almrr predict` within 5e-3 in the map and 1e-3 in the score: after resizing, a pixel
    near the middle of two of its 256 levels may be rounded to the other.
    """
    from onnx import parser

    threshold = config.image_threshold.value if config.image_threshold else None
    verdict = "" if threshold is None else ", bool is_anomalous"
    rows, columns = config.image_size
    side = config.smoothing
    axes = [("shrink_y", "rows", "height"), ("shrink_x", "columns", "width")]
    axes += [(name.replace("shrink", "grow"), i, o) for name, o, i in axes]
    region = config.region
    if region is None:
        blank_image, blank_levels = (
            "float_image = Identity (whole_image)",
            "levels = Identity (whole_levels)",
        )
        cut_network, cut_map = "Identity (anomaly_map)", "map = Identity (whole_map)"
    else:
        sides = zip(("height", "width"), region.mask.shape, strict=True)
        blank_image = _IN_REGION.format(
            places="".join(_PLACES.format(w=w, own=n) for w, n in sides)
        )
        blank_levels = _BLANK_LEVELS
        cut_network, cut_map = "Mul (anomaly_map, region_small)", "map = Mul (whole_map, counted)"
        model.graph.initializer.extend(_describe_region(region, config.image_size))
    around = parser.parse_graph(
        _GRAPH.format(
            outputs=f"float[H, W] map, float score{verdict}",
            weights="".join(_WEIGHTS.format(w=w, length_out=o, length_in=i) for w, o, i in axes),
            rows=rows,
            columns=columns,
            side=side,
            before=side // 2,
            after=(side - 1) // 2,
            threshold=f"{threshold or 0.0:.9f}",
            blank_image=blank_image,
            blank_levels=blank_levels,
            cut_network=cut_network,
            cut_map=cut_map,
        )
    )
    network = list(model.graph.node)
    (cut,) = (i for i, node in enumerate(around.node) if node.output[0] == "after_network")
    del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend([*around.node[:cut], *network, *around.node[cut:]])
    model.graph.input.extend(around.input)
    model.graph.output.extend(around.output)


def _describe_region(region: Region, size: tuple[int, int]) -> list[onnx.TensorProto]:
    """The region as constants: in its own size and the network's, and the color outside."""
    from onnx import numpy_helper

    color = np.array(BLANK, dtype=np.float32)
    arrays: dict[str, npt.NDArray[Any]] = {
        "region": region.mask.astype(np.uint8),
        "region_small": region.at(size)[None].astype(np.float32),
        "blank": color,
        "blank_planar": color[:, None, None],
    }
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]
