"""The selective scan as one ONNX `Scan` node: nine operations a token, and no state is kept.

For export to ONNX alone. A graph of tensor operations, as `parallel` writes it, has a hundred nodes
a scan, over which the exporter takes seconds. While torch traces, a scan is one symbolic node;
`write_scans` puts the `Scan` in its place.
"""

# ruff: noqa: N806 - names are those of the formulas
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from almrr_pipeline.model.kernels.scan.operands import ScanOperands
from almrr_pipeline.model.kernels.scan.reference import discretize_delta, skip_and_gate

if TYPE_CHECKING:
    import onnx

DOMAIN, _NAME = "almrr", "Recur"
_STEP = """
step (float[b, d, n] h, float[b, d] dt, float[b, d] x, float[b, n] B, float[b, n] C)
  => (float[b, d, n] h_out, float[b, d] y) {
    last = Constant <value_ints: ints = [-1]> ()
    middle = Constant <value_ints: ints = [1]> ()
    dt_column = Unsqueeze (dt, last)
    exponent = Mul (dt_column, A)
    decay = Exp (exponent)
    kept = Mul (decay, h)
    x_column = Unsqueeze (x, last)
    B_row = Unsqueeze (B, middle)
    increment = Mul (x_column, B_row)
    h_out = Add (kept, increment)
    C_column = Unsqueeze (C, last)
    y_column = MatMul (h_out, C_column)
    y = Squeeze (y_column, last)
}
"""
"""h_t = exp(dt_t A) h_{t-1} + x_t B_t and y_t = C_t h_t; A comes from the graph around."""
_USES_A = 3  # the node whose second input it is


def scan_with_onnx(scan: ScanOperands) -> Tensor:
    """`selective_scan` for `torch.onnx.export`; float32. Its values in torch are zeros."""
    u, delta, A, B, C, D = scan[:6]
    delta = discretize_delta(delta, scan)
    state = torch.zeros_like(delta[:, 0]).unsqueeze(-1) + torch.zeros_like(A)  # (b, d, n)
    y = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_NAME}",
        (state, delta, delta * u, B, C, A),
        {"reverse": int(scan.reverse)},
        dtype=u.dtype,
        shape=u.shape,
        version=1,
    )
    return skip_and_gate(y, u, D, scan.z)


def write_scans(model: onnx.ModelProto) -> None:
    """Replace the symbolic nodes of `scan_with_onnx`, in place, by `Scan` nodes."""
    from onnx import helper, parser

    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        (*operands, A), (y,), reverse = node.input, node.output, node.attribute[0].i
        body = parser.parse_graph(_STEP)
        body.node[_USES_A].input[1] = A
        scan = helper.make_node(
            "Scan",
            operands,
            [f"{y}_last_state", y],
            name=node.name,
            body=body,
            num_scan_inputs=4,
            scan_input_axes=[1] * 4,
            scan_output_axes=[1],
            scan_input_directions=[reverse] * 4,
            scan_output_directions=[reverse],
        )
        node.CopyFrom(scan)
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
