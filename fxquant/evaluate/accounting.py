"""What a compiled model costs: bytes by part, bit operations, memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.evaluate.coverage import macs, sizes
from fxquant.graph.lowered import LAYERS, arguments
from fxquant.graph.nodes import CONV2D, LINEAR, attribute, note
from fxquant.runtime.model import QuantizedModel

PARTS = ("integer weights", "weight scales", "float leftovers", "activation table")
_FLOAT_BITS = 32  # of the original, in both factors


def size_by_part(model: QuantizedModel) -> dict[str, int]:
    """Bytes of each of PARTS. Float leftovers are biases, norms and the layers kept float."""
    roles: dict[int, str] = {}
    for node in model.graph.graph.nodes:
        if node.op == "call_function" and node.target in LAYERS:
            found = arguments(node)
            for name, part in (("weight", PARTS[0]), ("weight_scale", PARTS[1])):
                roles[id(attribute(model.graph, str(found[name].target)))] = part
    held: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for tensor in _tensors(model.graph):
        held[roles.get(id(tensor), PARTS[2])] += tensor.nbytes
    held[PARTS[3]] += sum(t.nbytes for t in _tensors(model.table))
    return dict(held)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Distinct parameters and buffers."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


@dataclass(frozen=True)
class Operations:
    """The multiply-accumulates of one kind of layer in one call.

    Attributes:
        kind: "layers" (conv2d and linear) or "attention" (products of two activations).
        precision: "w8a8", or the dtype the products run in, e.g. "bfloat16".
        macs: multiply-accumulates.
        bit_operations: macs x weight bits x activation bits; of a float, 32 x 32 or 16 x 16.
    """

    kind: str
    precision: str
    macs: int
    bit_operations: int


def bit_operations(model: QuantizedModel, tensors: Sequence[Tensor]) -> list[Operations]:
    """Bit operations of one call with these flat inputs, as it runs here; nothing is computed.

    The figure of EDA-DM's and Q-Diffusion's tables, which divide by the batch.
    """
    totals: Counter[tuple[str, str, int]] = Counter()
    shapes = sizes(model.graph, tensors)
    for node in model.graph.graph.nodes:
        if count := macs(node, shapes):
            totals[_how(node)] += count
    return [Operations(k, p, count, count * bits) for (k, p, bits), count in totals.items()]


def _how(node: Node) -> tuple[str, str, int]:
    """(kind, precision, bits x bits) of a matrix product."""
    if node.target in LAYERS:
        quant = note(node, "quant")
        weight_bits, bits = quant["weight"]["bits"], quant["input"]["bits"]
        return "layers", f"w{weight_bits}a{bits}", weight_bits * bits
    x = node.args[0]
    assert isinstance(x, Node)
    dtype: torch.dtype = x.meta["val"].dtype
    kind = "layers" if node.target in (CONV2D, LINEAR) else "attention"
    return kind, str(dtype).removeprefix("torch."), (8 * dtype.itemsize) ** 2


def float_bit_operations(operations: Sequence[Operations]) -> int:
    """Bit operations of the same call in float32."""
    return sum(o.macs for o in operations) * _FLOAT_BITS**2


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one call, above what was held before it.

    Attributes:
        bytes: peak minus level before the call; weights that were there do not count.
        how: how it was measured.
    """

    bytes: int
    how: str


def peak_memory(call: Callable[[], object], device: str = "cpu") -> PeakMemory | None:
    """Run `call` twice and measure the second run; the first packs weights and fills caches.

    On a GPU PyTorch's allocator knows; on a Linux CPU the process's resident high-water mark is
    reset first (freed memory is handed back before), so it includes everything the process does
    meanwhile. None where neither exists.
    """
    call()
    if torch.device(device).type == "cuda":
        return _cuda_peak(call)
    try:
        return _resident_peak(call)
    except OSError:
        return None


def _cuda_peak(call: Callable[[], object]) -> PeakMemory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return PeakMemory(torch.cuda.max_memory_allocated() - before, "torch.cuda allocator")


def _resident_peak(call: Callable[[], object]) -> PeakMemory:
    """Raises OSError where the kernel keeps no resettable high-water mark."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    call()
    return PeakMemory(
        max(0, _status("VmHWM") - before), "resident high-water mark of the process (VmHWM)"
    )


def _status(field: str) -> int:
    """A memory field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
