"""Machine code of the scan's Triton kernels as they are launched; needs no GPU."""

# ruff: noqa: N806, E741 - names are those of the formulas
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from almrr_pipeline.model.kernels.scan import triton_backend  # noqa: E402
from almrr_pipeline.model.kernels.scan.operands import ScanOperands  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
MOST = {"_summarize": (104, 1200), "_forward": (168, 1800), "_backward": (255, 3300)}
"""Registers and instructions. The latter hold only while a lane has all tokens of a tile: otherwise
each row costs shuffles or selects over the whole tile."""

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
    pytest.mark.skipif(not TOOL.is_file(), reason="this Triton comes without cuobjdump"),
]

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def draw_operands(dtype: torch.dtype, states: int, *, reverse: bool) -> ScanOperands:
    """A batch of 4 at the paper's widths, without memory, in the views that a model hands over."""
    b, l, d, rank = 4, 256, 384, 24
    with torch.device("meta"):
        z = torch.empty(b, l, 2 * d, dtype=dtype).chunk(2, -1)[1]
        rows = torch.empty(b, l, rank + 2 * states, dtype=dtype)
        _, B, C = rows.split((rank, states, states), -1)
        u, delta = (torch.empty(b, l, d, dtype=dtype) for _ in range(2))
        A, D, bias = torch.empty(d, states), torch.empty(d), torch.empty(d)
    return ScanOperands(u, delta, A, B, C, D, z, bias, True, reverse)


def record_launches(operands: ScanOperands, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernel, arguments and constants of every launch of inference and of a training step."""
    launches: list[Launch] = []

    def record(
        kernel: Any, constants: dict[str, Any], given: list[Any], *more: Any, **flags: Any
    ) -> None:
        launches.append((kernel, (*given, *more), {**constants, **flags}))

    monkeypatch.setattr(triton_backend, "_launch", record)
    triton_backend.scan_forward(operands, keep=False)
    _, starts = triton_backend.scan_forward(operands, keep=True)
    triton_backend.scan_backward(operands, operands.u, starts)
    del launches[2]  # equal to the first: the summaries of a forward pass
    assert [kernel.__name__ for kernel, *_ in launches] == [
        "_summarize", "_forward", "_forward", "_summarize", "_backward",
    ]  # fmt: skip
    return launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile for a GPU with what Triton derives from arguments: types, alignment, ones."""
    kernel, arguments, constants = launch
    options = {"num_warps": constants["num_warps"]}
    constexprs = {name: value for name, value in constants.items() if name != "num_warps"}
    signature, attributes = dict.fromkeys(constexprs, "constexpr"), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        if not tensor and value == 1:
            signature[name], constexprs[name] = "constexpr", 1
            continue
        signature[name] = TYPES[value.dtype] if tensor else "i32"
        first = value.storage_offset() * value.element_size() if tensor else value
        if first % 16 == 0:  # torch's memory begins at multiples of 512 bytes
            attributes[(place,)] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(cubin: Path, what: str) -> str:
    return subprocess.run([TOOL, what, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("capability", "dtype", "states", "reverse"),
    [
        *((sm, dtype, 16, True) for sm in (80, 90, 120) for dtype in TYPES),
        (90, torch.bfloat16, 16, False),
        (90, torch.float32, 32, True),
    ],
)
def test_no_launched_kernel_spills_registers(
    capability: int,
    dtype: torch.dtype,
    states: int,
    reverse: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = record_launches(draw_operands(dtype, states, reverse=reverse), monkeypatch)
    if capability != 90:
        del launches[1]  # the forward pass for inference: what it leaves out saves registers
    for index, launch in enumerate(launches):
        cubin = tmp_path / f"{index}.cubin"
        cubin.write_bytes(compile_launch(launch, capability).asm["cubin"])
        usage = dump(cubin, "--dump-resource-usage")
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers, instructions = MOST[launch[0].__name__]
        assert found["STACK"] == found["LOCAL"] == 0, (launch[0], usage)
        assert found["REG"] <= registers, (launch[0], usage)
        if capability == 90:
            code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ ", dump(cubin, "-sass"), re.MULTILINE)
            assert len(code) <= instructions
