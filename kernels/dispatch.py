"""Which kernel runs an op: an ordered list per op, and the reasons why not.

The lists are written out here, best kernel first; the reference ends each and never refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fxquant.kernels import int_mm, reference, sdpa
from fxquant.kernels.config import Config, Kernel, TensorInfo
from fxquant.kernels.cuda import producers as cuda
from fxquant.kernels.cutlass.gemm import INT4, INT8, W4A4
from fxquant.kernels.x86 import attention, gemm, onednn, producers

__all__ = ["BACKENDS", "KERNELS", "Choice", "Config", "Kernel", "TensorInfo", "choose", "run"]

BACKENDS = ("auto", "x86", "cuda", "reference")
_EVERYWHERE = ("aten", "reference")
_DEVICES = {"x86": ("cpu", "a CPU"), "cuda": ("cuda", "a GPU")}
_FOR_OTHERS = ("it runs on a", "its weights have", "its activations have")


@dataclass(frozen=True)
class Choice:
    """The kernel that was taken, and for each better one the sentence why it was not."""

    kernel: str
    reasons: tuple[tuple[str, str], ...] = ()
    is_fallback: bool = False
    """It is slower than the op need be on such a device; the reasons say what is missing."""


def choose(config: Config, backend: str = "auto") -> Choice:
    """The best kernel for ``config``.

    ``auto`` tries every kernel, ``reference`` only the reference, and another backend its own
    kernels before those that run anywhere. Raises ValueError for an unknown backend or op.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    reasons: list[tuple[str, str]] = []
    for kernel in _kernels(config.op):
        reason = _wrong_place(kernel, backend, config.device) or kernel.why_not(config)
        if reason is None:
            return Choice(kernel.name, tuple(reasons), kernel.is_fallback)
        reasons.append((kernel.name, reason))
    raise AssertionError(f"the reference of {config.op} refused: {reasons}")


def missing(choice: Choice) -> list[tuple[str, str]]:
    """The kernels that a fallback stands in for, and what they lack on this machine: not those for
    another device or other operands, which nothing could make serve the call."""
    return [(k, why) for k, why in choice.reasons if not why.startswith(_FOR_OTHERS)]


def run(op: str, kernel: str) -> Callable[..., Tensor]:
    """The function that runs ``op`` with the kernel of that name."""
    return named(op, kernel).run


def named(op: str, kernel: str) -> Kernel:
    """The kernel of that name; raises ValueError if ``op`` has none."""
    try:
        return _NAMED[op, kernel]
    except KeyError:
        known = ", ".join(k.name for k in _kernels(op))
        raise ValueError(f"{op} has no kernel {kernel!r}; there are {known}") from None


def _kernels(op: str) -> tuple[Kernel, ...]:
    if op not in KERNELS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(KERNELS)}")
    return KERNELS[op]


def _wrong_place(kernel: Kernel, backend: str, device: str) -> str | None:
    allowed = ("reference",) if backend == "reference" else (backend, *_EVERYWHERE)
    if backend != "auto" and kernel.backend not in allowed:
        return f"the {backend} backend was asked for, this is a kernel of {kernel.backend}"
    own, name = _DEVICES.get(kernel.backend, (device, ""))
    return None if own == device else f"it runs on {name}, the tensors are on {device}"


def _always(config: Config) -> None:
    return None


def _fused(op: str) -> tuple[Kernel, ...]:
    return (
        Kernel("fused", op, "x86", producers.why_not, getattr(producers, op), is_repeatable=True),
        Kernel("cuda", op, "cuda", cuda.why_not, getattr(cuda, op)),
        _reference(op),
    )


def _reference(op: str) -> Kernel:
    run = getattr(reference, op)
    return Kernel("reference", op, "reference", _always, run, is_fallback=True, is_repeatable=True)


def _layer(op: str) -> tuple[Kernel, ...]:
    return (
        Kernel("gemm", op, "x86", gemm.why_not, getattr(gemm, op), is_repeatable=True),
        Kernel("gemm_int4", op, "x86", gemm.why_not_int4, getattr(gemm, op), is_repeatable=True),
        Kernel("onednn", op, "x86", onednn.why_not, getattr(onednn, op)),
        Kernel("onednn_int4", op, "x86", onednn.why_not_int4, getattr(onednn, op)),
        Kernel("cutlass", op, "cuda", INT8.why_not, getattr(INT8, op)),
        Kernel("cutlass_w4a4", op, "cuda", W4A4.why_not, getattr(W4A4, op)),
        Kernel("cutlass_int4", op, "cuda", INT4.why_not, getattr(INT4, op)),
        Kernel("int_mm", op, "aten", int_mm.why_not, getattr(int_mm, op), is_fallback=True),
        _reference(op),
    )


_PRODUCERS = (
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "geglu_quantize",
    "cat_quantize",
    "upsample_quantize",
    "add_quantize",
)
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "quantize": _fused("quantize"),
    "linear": _layer("linear"),
    "conv2d": _layer("conv2d"),
    **{op: _fused(op) for op in _PRODUCERS},
    "attention": (
        Kernel(
            "fused", "attention", "x86", attention.why_not, attention.attention, is_repeatable=True
        ),
        Kernel("sdpa", "attention", "aten", sdpa.why_not, sdpa.attention, is_repeatable=True),
        _reference("attention"),
    ),
}
_NAMED = {(op, kernel.name): kernel for op, kernels in KERNELS.items() for kernel in kernels}
