"""The forms in which a module may take a call's timestep: one or one a sample, float or whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CallError

Form = tuple[int, torch.dtype]  # number of dimensions, and dtype


def forms_of(timestep: Tensor) -> tuple[Form, ...]:
    """How a model may take a timestep that a call gives like this.

    One float per sample serves all samplers. Tables of embeddings want integers, and a module that
    multiplies by the timestep may want the number that it was given.
    """
    ranks = [1] if timestep.ndim == 1 and timestep.numel() > 1 else [1, 0]
    whole = not timestep.is_floating_point()
    dtypes = [torch.float32, torch.int64] if whole else [torch.float32]
    return tuple((rank, dtype) for rank in ranks for dtype in dtypes)


def in_form(tensor: Tensor, name: str, form: Form, sample: Tensor) -> Tensor:
    """A timestep with this rank and dtype, where the sample is.

    Raises:
        CallError: numbers that the form cannot hold.
    """
    rank, dtype = form
    if dtype == torch.int64 and tensor.is_floating_point():
        whole = tensor.round()
        if tensor.device.type != "meta" and not torch.equal(whole, tensor):
            raise CallError(
                f"{name} is {tensor.tolist()}; this model looks timesteps up in a table and "
                "takes whole numbers"
            )
        tensor = whole
    if rank == 1:
        return per_sample(tensor, sample, dtype)
    if tensor.numel() != 1:
        raise CallError(f"{name} has {tensor.numel()} values; this model takes one for all samples")
    return _near(tensor, sample).to(dtype).reshape(())


def _near(timestep: Tensor, sample: Tensor) -> Tensor:
    """The timestep where the sample is."""
    if timestep.numel() == 1 and timestep.device.type == "cpu" != sample.device.type:
        value = timestep.item()  # waits for nothing
        return torch.full((1,), value, device=sample.device, dtype=timestep.dtype)
    return timestep.to(sample.device)


def per_sample(timestep: Tensor, sample: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, 0-d, [1] or [B] timestep as one value per sample, [B]."""
    batch = sample.shape[0]
    flat = _near(timestep, sample).to(dtype=dtype).reshape(-1)
    if flat.shape[0] == 1:
        return flat.expand(batch).contiguous()
    return flat
