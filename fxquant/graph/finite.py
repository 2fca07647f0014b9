"""Weights that are no numbers are refused before anything is made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.errors import CaptureError

_MOST = 5  # names in a message


def check_finite(module: nn.Module) -> None:
    """Raise CaptureError for parameters that hold NaN or infinity, and for buffers with NaN.

    Rounded to integers such a weight would be some number. Infinity in a buffer may be a mask's.
    """
    bad = [name for name, weight in module.named_parameters() if not _is_finite(weight)]
    bad += [name for name, buffer in module.named_buffers() if _has_nan(buffer)]
    if bad:
        more = f" and {len(bad) - _MOST} more" if len(bad) > _MOST else ""
        raise CaptureError(
            f"NaN or infinity in the weights {', '.join(bad[:_MOST])}{more}. Load or train the "
            "model again; half precision overflows above 65,504"
        )


def _is_finite(tensor: Tensor) -> bool:
    """In one pass without a copy: NaN spreads to the extremes, infinity is one."""
    return not _has_numbers(tensor) or bool(torch.isfinite(torch.stack(_extremes(tensor))).all())


def _has_nan(tensor: Tensor) -> bool:
    return _has_numbers(tensor) and bool(torch.isnan(torch.stack(_extremes(tensor))).any())


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta


def _extremes(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach()
    return list(torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor))
