"""How a CUDA library is called: on the tensors' device and its stream, with errors by name."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

from fxquant.errors import BackendError, OperandError
from fxquant.kernels.cuda import call

DEVICE = "cuda"
FLOATS = {
    torch.float32: call.FLOAT32,
    torch.float16: call.FLOAT16,
    torch.bfloat16: call.BFLOAT16,
}
"""Float dtypes as call.h numbers them."""
TYPES = FLOATS | {torch.int8: call.INT8}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}

_LAUNCH = 6
_REFUSALS = {
    call.VERSION: "was built from other sources: `fxquant kernels build` builds it again",
    2: "does not take these sizes or options",
    3: "needs other alignment of pointers or rows",
    4: "was not compiled for these dtypes",
    5: "was given too small a workspace",
}
"""What is said of a Status of call.h that comes before a launch."""


class KernelLaunchError(BackendError):
    """The CUDA runtime refused to launch a kernel."""


def run(library: ctypes.CDLL, function: str, device: torch.device, *arguments: object) -> None:
    """Call a function of ``library`` on ``device``'s current stream, its last argument.

    Raises:
        OperandError: the library refused the call, and launched nothing.
        KernelLaunchError: CUDA refused the launch, in its words.
    """
    with on(device):
        status = getattr(library, function)(*arguments, stream(device))
    if status == call.OK:
        return
    if status != _LAUNCH:
        raise OperandError(f"{function}: the library {_REFUSALS.get(status, f'says {status}')}")
    library.fxquant_last_error.restype = ctypes.c_char_p
    said = library.fxquant_last_error() or b"nothing"
    raise KernelLaunchError(f"{function}: CUDA did not launch it and says: {said.decode()}")


def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes ``device`` the current one."""
    return torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The address of ``device``'s current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def check(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise OperandError unless ``device`` is a GPU and the tensors are on it."""
    for name, tensor in tensors.items():
        if device.type != DEVICE or (tensor is not None and tensor.device != device):
            where = tensor.device if tensor is not None else device
            raise OperandError(f"all tensors go on one GPU; {name} is on {where}")


def check_row(row: Tensor, index: int) -> None:
    """Raise OperandError unless ``row`` holds quantiser ``index``."""
    if row.dtype != torch.float32 or not row.is_contiguous() or row.shape[1:] != (2,):
        raise OperandError(f"the row is contiguous float32 [n, 2], not {row.dtype} {row.shape}")
    if not 0 <= index < row.shape[0]:
        raise OperandError(f"quantiser {index} is not in a row of {row.shape[0]}")
