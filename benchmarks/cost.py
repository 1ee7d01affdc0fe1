"""A model of cost: what a training step and inference take on a GPU, without having one.

    python benchmarks/cost.py [--batches 4 32] [--breakdown | --scan]

The network runs on fake tensors, which have shapes but no values, by the branches of its code that
a GPU takes; every operation is counted with its FLOP and with the bytes that it has to move: each
input read once, each output written once. (Autograd does not run on fake CUDA tensors
where there is no driver, so these are of the CPU. Autocast keeps a few small operations in bfloat16
there which it does in float32 on a GPU.)

An operation's modelled time is the largest of FLOP over the rate of the unit that does them, bytes
over the bandwidth, and the shortest kernel; a step's is the sum over its operations, or the time in
which the host issues them, whichever is longer. Rates are those of the data sheets times `REACHED`.
Caches, kernels that read an input twice, and choices of cuDNN are not in the model: it bounds from
below, and says which term bounds.

The selective scan is entered by formula, as the Triton kernels do it. `--scan` models its kernels
one by one, next to mamba-ssm's, by the instructions that they issue: for so small kernels that is
what takes longest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from almrr_pipeline.config import BackboneSettings, ModelSettings, TrainSettings
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.model import bimamba
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.model.kernels import composed
from almrr_pipeline.model.kernels.scan.reference import without_autocast
from almrr_pipeline.training import losses
from almrr_pipeline.training.optim import build_optimizer


@dataclass(frozen=True)
class Device:
    """A GPU's data sheet: FLOP/s by the type of the operands, and B/s of its memory."""

    name: str
    rates: dict[str, float]
    bandwidth: float


DEVICES = (
    # NVIDIA A100 80GB SXM, data sheet of 2021: dense rates.
    Device("A100", {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}, 2.039e12),
    # NVIDIA H100 SXM, data sheet of 2023: half of the rates with sparsity.
    Device("H100", {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}, 3.35e12),
    # NVIDIA Ada architecture whitepaper 2.02, RTX 4090: dense, float32 accumulation.
    Device("RTX 4090", {"bfloat16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}, 1.008e12),
)
REACHED = {"rates": 0.7, "bandwidth": 0.9}
"""Of the data sheet: a copy on an H100 moves 3.0 TB/s; convolutions reach less than products do."""
SHORTEST = 2.5e-6
"""Seconds of a kernel that does nearly nothing, in a queue of others."""
ISSUE = 6e-6
"""Seconds in which the host issues an operation from Python, autograd and optimizer included."""
TILE = 8
"""Tokens a state that the scan's forward pass keeps for the backward pass; triton_backend's."""
BLOCK_D = 8
"""Channels of a program, for which it writes gradients of B and C of its own; likewise."""
SCAN_FLOP = {"forward": 9, "backward": 30}
"""For each token, channel and state, by counting the kernels' lines; an exponential as one."""

PROGRAMS = 1536
"""Programs that the scan makes by splitting the tokens; likewise."""
SCHEDULERS, CLOCK = 528, 1.755e9
"""Of an H100 SXM: 132 multiprocessors of four, each issues an instruction of a warp per cycle."""


@dataclass(frozen=True)
class Code:
    """Instructions that a warp issues; counted in the machine code for sm_90."""

    once: int
    inner: int
    """In each turn of the loop: over tiles in the Triton kernels, over states in mamba-ssm's."""
    carry: int = 0
    """For each span of the tokens before its own."""


SCAN_CODE = {  # the Triton kernels for 16 states, by Triton 3.8
    "float32": {
        "forward": (Code(227, 333), Code(286, 570, 40)),
        "backward": (Code(247, 369), Code(421, 1609, 42)),
    },
    "bfloat16": {
        "forward": (Code(231, 345), Code(288, 592, 40)),
        "backward": (Code(249, 383), Code(413, 1649, 42)),
    },
}
"""Of the summaries of the spans, and of the pass itself."""
MAMBA_CODE = {  # mamba-ssm 2.3.2.post1 (Apache-2.0), by nvcc 13.5: one warp, eight tokens a lane
    "float32": {"forward": Code(625, 159), "backward": Code(1057, 487)},
    "bfloat16": {"forward": Code(624, 168), "backward": Code(1125, 499)},
}

aten = torch.ops.aten
FREE = {
    aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.lift_fresh, aten._local_scalar_dense, aten.detach,
}  # fmt: skip
"""Operations without a kernel, besides views."""
OVERWRITING = {aten.copy_, aten.zero_, aten.fill_}
"""In-place operations that do not read what they change."""
GATHERING = {aten.index, aten._unsafe_index, aten.index_select, aten.gather, aten.embedding}
"""Operations that read of their input no more than they return."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
"""Operations that tensor cores do."""


@dataclass(frozen=True)
class Operation:
    """What one operation needs."""

    name: str
    flop: float
    moved: int
    """Bytes."""
    unit: str
    """"bfloat16", "product" (of float32: TF32 or not) or "float32"."""


class Counter(TorchDispatchMode):
    """Counts the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (torch's own signature)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not is_free(func):
            self.operations.append(describe(func, args, kwargs, out))
        return out

    def add_scan(self, direction: str, u: Tensor, states: int, *, keeps: bool) -> None:
        """The scan's forward or backward pass over u (b, l, d)."""
        (b, l, d), size = u.shape, u.element_size()  # noqa: E741 (names of the formulas)
        rows = {"forward": 4, "backward": 7}[direction]  # u, delta, z, out; or with the gradients
        moved = rows * b * l * d * size + 2 * b * l * states * size
        if keeps:
            moved += b * math.ceil(l / TILE) * states * d * 4
        if direction == "backward":
            partial = 2 * math.ceil(d / BLOCK_D) * b * l * states * 4  # gradients of B and C,
            moved += 2 * partial + b * states * d * 4  # written, read to be summed; and of A
        flop = SCAN_FLOP[direction] * b * l * d * states
        self.operations.append(Operation(f"scan {direction}", flop, moved, "float32"))

    def flop(self) -> float:
        """Of all operations."""
        return sum(one.flop for one in self.operations)

    def moved(self) -> int:
        """Bytes of all operations."""
        return sum(one.moved for one in self.operations)


def tensors_in(tree: object) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_free(func: Any) -> bool:  # noqa: ANN401 (OpOverload)
    """Whether an operation starts no kernel: views, and those that only take memory."""
    returns = [one.alias_info for one in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    return is_view or func._overloadpacket in FREE or func.namespace == "prim"


def describe(func: Any, args: Any, kwargs: dict[str, Any], out: object) -> Operation:  # noqa: ANN401
    """FLOP and bytes of an operation that has run."""
    packet = func._overloadpacket
    name = packet.__name__
    written = {id(one): one for one in tensors_in(out)}
    read = {id(one): one for one in tensors_in((args, kwargs))}
    in_place = {key: one for key, one in read.items() if key in written}
    if func._schema.is_mutable and not in_place:  # such as foreach operations, which return nothing
        in_place = mutated(func, args, kwargs)
    moved = sum(size_in_memory(one) for one in (written | in_place).values())
    if packet in GATHERING:
        moved += moved + sum(size_in_memory(one) for one in read.values() if one.dtype in INDICES)
    else:
        skipped = in_place if packet in OVERWRITING else {}
        moved += sum(size_in_memory(one) for key, one in read.items() if key not in skipped)
    if packet in flop_registry:
        flop = flop_registry[packet](*args, **kwargs, out_val=out)
    else:
        flop = sum(one.numel() for one in (written | in_place).values())
    floating = [one.dtype for one in read.values() if one.is_floating_point()]
    half = bool(floating) and floating[0] in (torch.bfloat16, torch.float16)
    unit = ("bfloat16" if half else "product") if name in PRODUCTS else "float32"
    return Operation(name, flop, moved, unit)


INDICES = (torch.int64, torch.int32)


def mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[int, Tensor]:  # noqa: ANN401
    """The tensors that an operation changes according to its schema."""
    names = [one.name for one in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    changed = [
        given.get(one.name)
        for one in func._schema.arguments
        if one.alias_info is not None and one.alias_info.is_write
    ]
    return {id(one): one for one in tensors_in(changed)}


def size_in_memory(tensor: Tensor) -> int:
    """Bytes of a tensor, what `expand` repeats counted once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride) * tensor.element_size()


# ---------------------------------------------------------------------------------------------
# What is counted.


class _CountedScan(torch.autograd.Function):
    """Stands for the scan: counted by formula, with results of the right shapes."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, *operands: Tensor) -> Tensor:  # noqa: ANN401
        u, _, A, *_ = operands  # noqa: N806
        ctx.counter = counter
        ctx.save_for_backward(*operands)
        counter.add_scan("forward", u, A.shape[1], keeps=any(ctx.needs_input_grad))
        return torch.empty_like(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        u, _, A, *_ = ctx.saved_tensors  # noqa: N806
        ctx.counter.add_scan("backward", u, A.shape[1], keeps=True)
        return (None, *(torch.empty_like(one) for one in ctx.saved_tensors))


def _resize_by_matrices(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize_bilinear` as on CUDA, where the matrices are made once."""
    rows, columns = (
        torch.empty(target, length, dtype=x.dtype)
        for length, target in zip(x.shape[2:], size, strict=True)
    )
    with without_autocast(x):
        return composed.apply_separably(x, rows, columns)


@contextmanager
def counting(precision: str) -> Iterator[Counter]:
    """Count what runs inside, in float32 or under autocast to bfloat16."""
    counter, resize = Counter(), composed.resize_bilinear

    def scan(*operands: Tensor, z: Tensor, delta_bias: Tensor, **others: object) -> Tensor:
        result: Tensor = _CountedScan.apply(counter, *operands, z, delta_bias)
        return result

    with ExitStack() as stack:
        # While compiling, the code takes no branch that is for CPUs alone.
        stack.enter_context(mock.patch("torch.compiler.is_compiling", return_value=True))
        stack.enter_context(mock.patch.object(bimamba, "selective_scan", scan))
        squared = getattr(losses, "_SquaredError", None)  # on CUDA; its arguments are the same
        if squared is not None:
            stack.enter_context(mock.patch.object(losses, "reconstruction_loss", squared.apply))
        for module in [one for name, one in sys.modules.items() if name.startswith("almrr_")]:
            if getattr(module, "resize_bilinear", None) is resize:
                given = mock.patch.object(module, "resize_bilinear", _resize_by_matrices)
                stack.enter_context(given)
        half = precision == "bfloat16"
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=half))
        stack.enter_context(counter)
        yield counter


def build_model(model: ModelSettings | None, size: tuple[int, int], backbone: str) -> ALMRR:
    """The network, with random weights."""
    network = build_backbone(BackboneSettings(name=backbone), weights=None)
    return ALMRR(network, model or ModelSettings(), image_size=size)


def move_to_fake(network: torch.nn.Module) -> None:
    """Put fake tensors in the place of a network's tensors; inside a FakeTensorMode."""

    def empty(one: Tensor) -> Tensor:
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype)

    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                trained = parameter.requires_grad
                module._parameters[name] = torch.nn.Parameter(empty(parameter), trained)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = empty(buffer)


def count_step(
    batch: int,
    precision: str,
    *,
    model: ModelSettings | None = None,
    size: tuple[int, int] = (256, 256),
    backbone: str = "resnet50",
) -> Counter:
    """Forward, loss, backward, clipping and Adam of a batch."""
    network = build_model(model, size, backbone).train()
    settings = TrainSettings()
    with FakeTensorMode():
        move_to_fake(network)
        optimizer = build_optimizer(network, settings)
        images = [torch.empty(batch, 3, *size) for _ in range(2)]
        mask = torch.zeros(batch, *size, dtype=torch.uint8)
        with counting(precision) as counter:
            output = network.training_forward(*images)
            losses.compute_losses(output, mask, settings)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # the first one makes the moments
        with counter:
            trained = list(network.trainable_parameters())
            # In lists, as on a GPU.
            torch.nn.utils.clip_grad_norm_(trained, settings.gradient_clip, foreach=True)
            optimizer.step()
    return counter


def count_inference(
    batch: int,
    precision: str,
    *,
    model: ModelSettings | None = None,
    size: tuple[int, int] = (256, 256),
    backbone: str = "resnet50",
    fused: bool = True,
) -> Counter:
    """Anomaly maps of a batch; the check of the images' values is left out."""
    whole = build_model(model, size, backbone).eval()
    network: torch.nn.Module = fuse(whole) if fused else whole
    with FakeTensorMode(), mock.patch("almrr_pipeline.model.almrr.check_images"):
        move_to_fake(network)
        images = torch.empty(batch, 3, *size)
        images = images.contiguous(memory_format=torch.channels_last)
        compute: Callable[[Tensor], Tensor] = getattr(network, "compute", network)
        with torch.no_grad(), counting(precision) as counter:
            compute(images)
    return counter


# ---------------------------------------------------------------------------------------------
# Modelled times.


@dataclass
class Modelled:
    """Seconds on one device, and the operations' share."""

    device: float = 0.0
    host: float = 0.0
    by_name: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The device's time, or the host's where the device waits for it."""
        return max(self.device, self.host)


def model_time(operations: Sequence[Operation], device: Device, *, tf32: bool) -> Modelled:
    """Add up the operations; `tf32` lets tensor cores do the products of float32."""
    result = Modelled(host=ISSUE * len(operations))
    for one in operations:
        unit = one.unit
        if unit == "product":
            unit = "tf32" if tf32 else "float32"
        seconds = max(
            one.flop / (REACHED["rates"] * device.rates[unit]),
            one.moved / (REACHED["bandwidth"] * device.bandwidth),
            SHORTEST,
        )
        result.device += seconds
        result.by_name[one.name] = result.by_name.get(one.name, 0.0) + seconds
    return result


@dataclass(frozen=True)
class Launch:
    """A kernel of a scan."""

    warps: int = 0
    instructions: int = 0
    """Of each warp."""
    moved: int = 0
    """Bytes."""

    def time(self, device: Device) -> float:
        """Seconds on an H100: of its instructions, of its bytes, or of the shortest kernel."""
        issued = max(1.0, self.warps / SCHEDULERS) * self.instructions / CLOCK
        return max(issued, self.moved / (REACHED["bandwidth"] * device.bandwidth), SHORTEST)


def launch_scan(direction: str, precision: str, b: int, l: int, d: int, n: int) -> list[Launch]:  # noqa: E741
    """The kernels of the Triton scan for 16 states: summaries of the spans, pass, sums."""
    blocks, tiles = math.ceil(d / BLOCK_D), math.ceil(l / TILE)
    spans = min(math.ceil(PROGRAMS / (b * blocks)), tiles)
    summary, code = SCAN_CODE[precision][direction]
    warps, turns = b * blocks * spans, math.ceil(tiles / spans)
    size, rows = {"float32": 4, "bfloat16": 2}[precision], b * l * d
    shared, states = 2 * b * l * n * size, b * d * n * 4
    launches = []
    if spans > 1:  # reads u and delta, or delta, the gate and the gradient
        read = {"forward": 2, "backward": 3}[direction] * rows * size + shared // 2
        launches.append(Launch(warps, summary.once + turns * summary.inner, read + spans * states))
    instructions = code.once + turns * code.inner + (spans - 1) * code.carry // 2
    moved = {"forward": 4, "backward": 7}[direction] * rows * size + shared + tiles * states
    partial = 2 * blocks * b * l * n * 4 if direction == "backward" else 0
    launches.append(Launch(warps, instructions, moved + partial + spans * states))
    if direction == "backward":
        launches += [Launch(moved=partial // 2)] * 2 + [Launch()] * 3  # sums: B and C; A, D, bias
        launches += [Launch()] * (2 * (precision == "bfloat16"))  # B and C to bfloat16
    return launches


def launch_mamba(direction: str, precision: str, b: int, l: int, d: int, n: int) -> list[Launch]:  # noqa: E741
    """The kernels of mamba-ssm's scan, on tensors in its own layout, at 129 to 256 tokens.

    A block of one warp for each image and channel. Its atomic additions to the gradients of B and C
    count no more than these gradients do, which is in its favor.
    """
    code = MAMBA_CODE[precision][direction]
    size, rows = {"float32": 4, "bfloat16": 2}[precision], b * l * d
    shared, states = 2 * b * l * n * size, b * d * n * 4
    # u, delta, z, out before and behind the gate; with the gradients of u, delta, z and out
    moved = {"forward": 5, "backward": 8}[direction] * rows * size + shared
    gradients = 2 * b * l * n * 4 if direction == "backward" else 2 * states
    launches = [Launch(b * d, code.once + n * code.inner, moved + gradients)]
    if direction == "backward":
        launches += [Launch()] * 5  # zeros for the gradients of A, B, C, D and the bias
        launches += [Launch()] * (2 * (precision == "bfloat16"))
    return launches


def print_scans(batches: Sequence[int]) -> None:
    """The scan's modelled time beside that of mamba-ssm's kernels, at the paper's widths."""
    heads = ["batch", "precision", "Triton, forward / both, us", "mamba-ssm, forward / both, us"]
    print(f"| {' | '.join([*heads, 'Triton over it, both'])} |\n|{' --- |' * (len(heads) + 1)}")
    for precision in SCAN_CODE:
        for batch in batches:
            ours, theirs = (
                [
                    1e6 * sum(one.time(DEVICES[1]) for one in launch(way, precision, *shape))
                    for way in ("forward", "backward")
                ]
                for launch in (launch_scan, launch_mamba)
                for shape in [(batch, 256, 384, 16)]
            )
            cells = [f"{one[0]:.1f} / {sum(one):.1f}" for one in (ours, theirs)]
            ratio = sum(ours) / sum(theirs)
            print(f"| {batch} | {precision} | {' | '.join(cells)} | {ratio:.2f} |")


PRECISIONS = (("float32", "float32", False), ("float32, TF32", "float32", True),
              ("bfloat16", "bfloat16", False))  # fmt: skip


def main() -> None:
    """Print the tables of docs/performance.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--breakdown", action="store_true", help="also the operations, on an H100")
    parser.add_argument("--scan", action="store_true", help="the scan's kernels alone, on an H100")
    arguments = parser.parse_args()
    if arguments.scan:
        print_scans(arguments.batches)
        return
    heads = ["what", "batch", "precision", "operations", "TFLOP", "GB"]
    heads += [f"{one.name}, ms" for one in DEVICES]
    print(f"Modelled, not measured.\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    counted: list[tuple[str, Counter]] = []
    for what, count in (("training step", count_step), ("inference, fused", count_inference)):
        for batch in arguments.batches:
            for label, precision, tf32 in PRECISIONS:
                counter = count(batch, precision)
                cells: list[object] = [what, batch, label, len(counter.operations)]
                cells += [f"{counter.flop() / 1e12:.3g}", f"{counter.moved() / 1e9:.3g}"]
                for device in DEVICES:
                    modelled = model_time(counter.operations, device, tf32=tf32)
                    waits = " (host)" if modelled.host > modelled.device else ""
                    cells.append(f"{modelled.seconds * 1e3:.3g}{waits}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                counted.append((f"{what}, batch {batch}, {label}", counter))
    for title, counter in counted if arguments.breakdown else ():
        print(f"\n### {title}, H100\n\n| operation | times | GFLOP | GB | ms |\n|{' --- |' * 5}")
        modelled = model_time(counter.operations, DEVICES[1], tf32="TF32" in title)
        for name, seconds in sorted(modelled.by_name.items(), key=lambda one: -one[1])[:15]:
            same = [one for one in counter.operations if one.name == name]
            flop, moved = (sum(getattr(one, key) for one in same) for key in ("flop", "moved"))
            cells = [name, len(same), f"{flop / 1e9:.4g}", f"{moved / 1e9:.3g}"]
            print(f"| {' | '.join(map(str, cells))} | {seconds * 1e3:.3g} |")


if __name__ == "__main__":
    main()
