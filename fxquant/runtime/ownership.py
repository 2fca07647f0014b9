"""Tensors of a compiled model that are nobody else's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def own_tensors(module: nn.Module) -> None:
    """Replace tensors that may be shared by copies without gradients.

    Layers that stayed float still hold the original model's own parameters; and tensors made in
    inference mode count no changes, so that kernels could not tell when to pack them again. Integer
    weights were made by lowering, for this model alone: copying them would only cost memory.
    """
    copies: dict[int, Tensor] = {}  # tied tensors stay tied

    @torch.no_grad()
    def copy(tensor: Tensor) -> Tensor:
        new = tensor.detach().clone()
        return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new

    with torch.inference_mode(mode=False):
        for part in module.modules():
            owners: list[Any] = [part._parameters, part._buffers]
            for tensors in owners:
                for name, tensor in tensors.items():
                    if tensor is not None and not _is_integer_weight(tensor):
                        if id(tensor) not in copies:
                            copies[id(tensor)] = copy(tensor)
                        tensors[name] = copies[id(tensor)]


def _is_integer_weight(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.uint8) and not tensor.is_inference()
