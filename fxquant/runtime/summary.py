"""What compile() did, in numbers and reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import LAYERS, arguments, is_op
from fxquant.graph.nodes import is_layer, module_path, note
from fxquant.graph.weighted import reason_to_stay_float
from fxquant.reconstruction.checkpoint import UnitReport

_SIMULATED = "simulated: no kernel has that many bits"


@dataclass(frozen=True)
class Summary:
    """Result of one compilation.

    Attributes:
        recipe: its name.
        precision: number of layers, and of other operators with weights, by precision, e.g.
            {"w8a8": 73, "float": 4}.
        stayed_float: those by the reason they stayed float.
        kernels: number of calls by "op kernel".
        fallbacks: unplanned slow paths: "node: why".
        bytes_before, bytes_after: parameters and buffers of the original and the compiled model.
        seconds: wall time by phase.
        units: what the reconstruction did to each unit; empty without one, and after loading.
        ranges: what calibration warned of; empty after loading.
        error: relative L2 error to the original's result on the first calibration call, as it
            serves; None where it was not tried.
        unsaved: why save_pretrained would refuse the model, "" if it would not.
    """

    recipe: str
    precision: Mapping[str, int]
    stayed_float: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, int]
    fallbacks: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    units: tuple[UnitReport, ...] = ()
    ranges: tuple[str, ...] = ()
    unsaved: str = ""
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {k: (list(v) if isinstance(v, tuple) else v) for k, v in self.__dict__.items()}
        return {**plain, "units": [asdict(unit) for unit in self.units]}

    def __str__(self) -> str:
        mib = 1 << 20
        lines = [
            f"fxquant {self.recipe}: "
            + ", ".join(f"{n} layers {p}" for p, n in self.precision.items())
            + f"; {self.bytes_before / mib:.1f} -> {self.bytes_after / mib:.1f} MiB"
            + f" ({self.bytes_after / max(1, self.bytes_before):.3f}x)"
        ]
        for reason, layers in self.stayed_float.items():
            lines.append(f"  float, {reason}: {', '.join(layers)}")
        lines += [f"  {count:4d} x {kernel}" for kernel, count in self.kernels.items()]
        lines += [f"  fallback: {text}" for text in self.fallbacks]
        lines += [f"  ranges: {text}" for text in self.ranges]
        if self.units:
            lines.append(f"  {reconstruction_text(self.units)}")
        if self.error is not None:
            lines.append(f"  relative error on the first calibration call {self.error:.3g}")
        if self.unsaved:
            lines.append(f"  cannot be saved: {self.unsaved}")
        if self.seconds:
            lines.append("  " + ", ".join(f"{k} {v:.1f} s" for k, v in self.seconds.items()))
        return "\n".join(lines)


def summarise(
    lowered: GraphModule,
    bytes_before: int,
    recipe: str,
    reasons: Mapping[str, str],
    seconds: Mapping[str, float],
    units: Sequence[UnitReport] = (),
    ranges: Sequence[str] = (),
    unsaved: str = "",
) -> Summary:
    """The summary of a bound graph; `reasons` are the fallbacks by node name."""
    precision: Counter[str] = Counter()
    stayed: dict[str, list[str]] = {}
    kernels: Counter[str] = Counter()
    for node in lowered.graph.nodes:
        if is_op(node):
            kernels[_kernel(node)] += 1
        if node.op == "call_function" and node.target in LAYERS:
            precision[_precision(node)] += 1
        elif is_layer(node) or reason_to_stay_float(node):
            reason = reason_to_stay_float(node)
            precision["float" if reason else "simulated"] += 1
            stayed.setdefault(reason or _SIMULATED, []).append(module_path(node))
    return Summary(
        recipe=recipe,
        precision=dict(precision),
        stayed_float={k: tuple(v) for k, v in stayed.items()},
        kernels=dict(kernels.most_common()),
        fallbacks=tuple(f"{name}: {why}" for name, why in reasons.items()),
        bytes_before=bytes_before,
        bytes_after=size_in_bytes(lowered),
        seconds=dict(seconds),
        units=tuple(units),
        ranges=tuple(ranges),
        unsaved=unsaved,
    )


def reconstruction_text(units: Sequence[UnitReport]) -> str:
    """One line over all units."""
    ratios = [u.loss_after / u.loss_before for u in units if u.loss_before > 0]
    typical = f"{median(ratios):.2f}x" if ratios else "0"
    worst = max(units, key=lambda u: u.loss_after / max(1e-30, u.loss_before))
    return (
        f"{len(units)} units reconstructed, {sum(u.iters for u in units):,} iterations: loss "
        f"{typical} (median), {worst.loss_after / max(1e-30, worst.loss_before):.2f}x at "
        f"{worst.path} (worst)"
    )


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of distinct parameters and buffers."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _kernel(node: Node) -> str:
    """Operator and kernel; attention says if it multiplies integers."""
    integers = arguments(node).get("q_index", -1) >= 0
    return f"{str(node.target).split('.')[1]} {node.args[-1]}{' on integers' if integers else ''}"


def _precision(layer: Node) -> str:
    """w8a8, from the layer's spec."""
    quant = note(layer, "quant")
    return f"w{quant['weight']['bits']}a{quant['input']['bits']}"
