"""The structs of call.h in Python, field by field; a test compares the two."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

ABI = 1
"""FXQUANT_ABI: raised with every change of either file."""

OK = 0
VERSION = 1

FLOAT32, FLOAT16, BFLOAT16, INT8 = 1, 2, 3, 4

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Epilogue(ctypes.Structure):
    """What happens to the sums."""

    _fields_ = [
        *((name, _POINTER) for name in ("row", "weight_scale", "weight_sums", "tap_sums", "bias")),
        *((name, _POINTER) for name in ("channel_add", "residual", "out")),
        *((name, _INT32) for name in ("x_index", "out_index", "out_bits", "activation")),
        *((name, _INT32) for name in ("residual_type", "out_type")),
    ]


class Call(ctypes.Structure):
    """One linear or convolution."""

    _fields_ = [
        *((name, _INT32) for name in ("version", "multiprocessors")),
        *((name, _POINTER) for name in ("x", "weight", "workspace")),
        *((name, _INT64) for name in ("workspace_bytes", "m", "n", "k")),
        *((name, _INT32) for name in ("batch", "height", "width", "channels")),
        *((name, _INT32) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, _INT32) for name in ("pad_top", "pad_left", "dilation_h", "dilation_w")),
        *((name, _INT32) for name in ("out_height", "out_width")),
        ("epilogue", Epilogue),
    ]


def example(fields: Iterable[tuple[str, int]]) -> Call:
    """A call to ask a library about: aligned addresses that nothing is at, and the fields given."""
    made = Call(version=ABI, x=1 << 20, weight=2 << 20, workspace=3 << 20, workspace_bytes=1 << 40)
    end = made.epilogue
    end.row, end.weight_scale, end.weight_sums, end.out = 4 << 20, 5 << 20, 6 << 20, 7 << 20
    end.out_index, end.out_bits = -1, 8
    inner = {name for name, *_ in Epilogue._fields_}
    for name, value in fields:
        setattr(end if name in inner else made, name, value)
    return made
