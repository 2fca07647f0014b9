"""Which kernel runs an op: an ordered list per op, and the reasons why not.

The lists are written out here, best kernel first; the reference ends each and never refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fxquant.kernels import reference, sdpa
from fxquant.kernels.config import Config, Kernel, TensorInfo
from fxquant.kernels.x86 import attention, gemm, onednn, producers

__all__ = ["BACKENDS", "KERNELS", "Choice", "Config", "Kernel", "TensorInfo", "choose", "run"]

BACKENDS = ("auto", "x86", "reference")
_EVERYWHERE = ("aten", "reference")


@dataclass(frozen=True)
class Choice:
    """The kernel that was taken, and for each better one the sentence why it was not."""

    kernel: str
    reasons: tuple[tuple[str, str], ...] = ()


def choose(config: Config, backend: str = "auto") -> Choice:
    """The best kernel for ``config``.

    ``auto`` tries every kernel, ``reference`` only the reference, and another backend its own
    kernels before those that run anywhere. Raises ValueError for an unknown backend or op.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    reasons: list[tuple[str, str]] = []
    for kernel in _kernels(config.op):
        reason = _wrong_backend(kernel, backend) or kernel.why_not(config)
        if reason is None:
            return Choice(kernel.name, tuple(reasons))
        reasons.append((kernel.name, reason))
    raise AssertionError(f"the reference of {config.op} refused: {reasons}")


def run(op: str, kernel: str) -> Callable[..., Tensor]:
    """The function that runs ``op`` with the kernel of that name."""
    try:
        return _RUN[op, kernel]
    except KeyError:
        known = ", ".join(k.name for k in _kernels(op))
        raise ValueError(f"{op} has no kernel {kernel!r}; there are {known}") from None


def _kernels(op: str) -> tuple[Kernel, ...]:
    if op not in KERNELS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(KERNELS)}")
    return KERNELS[op]


def _wrong_backend(kernel: Kernel, backend: str) -> str | None:
    allowed = ("reference",) if backend == "reference" else (backend, *_EVERYWHERE)
    if backend == "auto" or kernel.backend in allowed:
        return None
    return f"the {backend} backend was asked for, this is a kernel of {kernel.backend}"


def _always(config: Config) -> None:
    return None


def _fused(op: str) -> Kernel:
    return Kernel("fused", op, "x86", producers.why_not, getattr(producers, op))


def _reference(op: str) -> Kernel:
    return Kernel("reference", op, "reference", _always, getattr(reference, op))


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "quantize": (_fused("quantize"), _reference("quantize")),
    "linear": (
        Kernel("gemm", "linear", "x86", gemm.why_not, gemm.linear),
        Kernel("gemm_int4", "linear", "x86", gemm.why_not_int4, gemm.linear),
        Kernel("onednn", "linear", "x86", onednn.why_not, onednn.linear),
        Kernel("onednn_int4", "linear", "x86", onednn.why_not_int4, onednn.linear),
        _reference("linear"),
    ),
    "conv2d": (
        Kernel("gemm", "conv2d", "x86", gemm.why_not, gemm.conv2d),
        Kernel("gemm_int4", "conv2d", "x86", gemm.why_not_int4, gemm.conv2d),
        Kernel("onednn", "conv2d", "x86", onednn.why_not, onednn.conv2d),
        Kernel("onednn_int4", "conv2d", "x86", onednn.why_not_int4, onednn.conv2d),
        _reference("conv2d"),
    ),
    "group_norm_silu_quantize": (
        _fused("group_norm_silu_quantize"),
        _reference("group_norm_silu_quantize"),
    ),
    "layer_norm_quantize": (_fused("layer_norm_quantize"), _reference("layer_norm_quantize")),
    "geglu_quantize": (_fused("geglu_quantize"), _reference("geglu_quantize")),
    "cat_quantize": (_fused("cat_quantize"), _reference("cat_quantize")),
    "upsample_quantize": (_fused("upsample_quantize"), _reference("upsample_quantize")),
    "add_quantize": (_fused("add_quantize"), _reference("add_quantize")),
    "attention": (
        Kernel("fused", "attention", "x86", attention.why_not, attention.attention),
        Kernel("sdpa", "attention", "aten", sdpa.why_not, sdpa.attention),
        _reference("attention"),
    ),
}
_RUN = {(op, kernel.name): kernel.run for op, kernels in KERNELS.items() for kernel in kernels}
