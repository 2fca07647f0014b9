"""How a diffusers forward call maps to the flat list of tensors that a graph takes.

A call such as `unet(sample, t, encoder_hidden_states=c, added_cond_kwargs={"text_embeds": e})`
becomes the tensors named `sample, timestep, encoder_hidden_states, added_cond_kwargs.text_embeds`,
in the order of forward's own parameters. The timestep, which diffusers accepts as a Python
number, a 0-d or a [B] tensor, always becomes one value per sample, [B].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CallError

SAMPLE, TIMESTEP = "sample", "timestep"
TOKENS = ("encoder_hidden_states", "encoder_attention_mask")  # dimension 1 is the prompt length


@dataclass(frozen=True)
class Signature:
    """The flat tensor arguments of one captured model.

    Attributes:
        parameters: names of forward's parameters, in order, without self.
        names: flat tensor names, the order of the graph's inputs.
        ranks: number of dimensions of each.
        dtype: floating dtype that float inputs are cast to, the model's own.
        integer_timestep: learned timestep embeddings index a table and need int64.
    """

    parameters: tuple[str, ...]
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    integer_timestep: bool = False

    @property
    def timestep_index(self) -> int | None:
        return self.names.index(TIMESTEP) if TIMESTEP in self.names else None

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The call's tensors in graph order.

        Raises:
            CallError: missing, unexpected or non-tensor arguments, wrong rank, or batch sizes that
                differ between arguments.
        """
        found = flat_tensors(bind(self.parameters, args, kwargs))
        self._check_names(found)
        sample = found[self.names[0]]
        if TIMESTEP in found:
            dtype = torch.int64 if self.integer_timestep else torch.float32
            found[TIMESTEP] = per_sample(found[TIMESTEP], sample, dtype)
        for name, rank in zip(self.names, self.ranks, strict=True):
            _check_tensor(name, found[name], rank, sample.shape[0])
        return [self._cast(found[name], name) for name in self.names]

    def has_one_timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives a single timestep for all of its samples."""
        given = bind(self.parameters, args, kwargs).get(TIMESTEP)
        return isinstance(given, (int, float)) or (isinstance(given, Tensor) and given.numel() == 1)

    def unflatten(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments for forward from the flat tensors."""
        return nested(dict(zip(self.names, tensors, strict=True)))

    def _check_names(self, found: Mapping[str, Tensor]) -> None:
        missing = [n for n in self.names if n not in found]
        extra = [n for n in found if n not in self.names]
        if missing or extra:
            said = [f"lacks {', '.join(missing)}"] if missing else []
            said += (
                [f"has {', '.join(extra)}, unseen in the first calibration call"] if extra else []
            )
            raise CallError(
                f"this call {' and '.join(said)}. A compiled model takes the tensors it was "
                f"captured with: {', '.join(self.names)}. Pass the same arguments to every call "
                "of the loader and of the compiled model."
            )

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        if name != TIMESTEP and tensor.is_floating_point():
            return tensor.to(self.dtype)
        return tensor


def signature_of(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Signature:
    """The signature that the given first call implies.

    Raises:
        CallError: the call does not bind to `model.forward`, or holds no tensor.
    """
    parameters = tuple(inspect.signature(model.forward).parameters)
    found = flat_tensors(bind(parameters, args, kwargs))
    if not found or next(iter(found.values())).ndim == 0:
        raise CallError(
            "the first call holds no batched tensor; a call is what the model's forward takes, "
            f"as a dict or a tuple: {', '.join(parameters)}"
        )
    first, tensor = next(iter(found.items()))
    if not tensor.is_floating_point():
        raise CallError(f"{first} is {tensor.dtype}; a denoiser's sample is floating point")
    names = tuple(found)
    ranks = tuple(1 if n == TIMESTEP else t.ndim for n, t in found.items())
    learned = getattr(getattr(model, "config", None), "time_embedding_type", None) == "learned"
    return Signature(parameters, names, ranks, floating_dtype(model), learned)


def floating_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the first floating parameter, float32 if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def bind(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by parameter name, in parameter order; None and return_dict are dropped."""
    if len(args) > len(parameters):
        raise CallError(f"{len(args)} positional arguments; forward takes {', '.join(parameters)}")
    given = dict(zip(parameters, args, strict=False))
    unknown = [k for k in kwargs if k not in parameters]
    if unknown:
        raise CallError(
            f"unknown argument {', '.join(map(repr, unknown))}; "
            f"forward takes {', '.join(parameters)}"
        )
    doubled = [k for k in kwargs if k in given]
    if doubled:
        raise CallError(f"argument {doubled[0]!r} is given twice")
    given.update(kwargs)
    keep = [p for p in parameters if given.get(p) is not None and p != "return_dict"]
    return {p: given[p] for p in keep}


def flat_tensors(bound: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"sample": ..., "added_cond_kwargs.text_embeds": ...} from bound arguments."""
    return dict(pair for name, value in bound.items() for pair in _leaves(name, value))


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of flat_tensors."""
    kwargs: dict[str, Any] = {}
    for name, tensor in tensors.items():
        head, _, key = name.partition(".")
        if key:
            kwargs.setdefault(head, {})[key] = tensor
        else:
            kwargs[name] = tensor
    return {k: _tuple_if_indexed(v) for k, v in kwargs.items()}


def per_sample(timestep: Tensor, sample: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, 0-d, [1] or [B] timestep as one value per sample, [B]."""
    batch = sample.shape[0]
    if timestep.numel() == 1 and timestep.device.type == "cpu" != sample.device.type:
        timestep = torch.full((1,), timestep.item(), device=sample.device)  # waits for nothing
    flat = timestep.to(device=sample.device, dtype=dtype).reshape(-1)
    if flat.shape[0] not in (1, batch):
        raise CallError(
            f"timestep has {flat.shape[0]} values for a batch of {batch}; give 1 or {batch}"
        )
    return flat.expand(batch).contiguous()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif name == TIMESTEP and isinstance(value, (int, float)):
        yield name, torch.tensor(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from _leaves(f"{name}.{key}", item)
    else:
        raise CallError(
            f"argument {name!r} is a {type(value).__name__}; fxquant captures tensor arguments "
            "(and dicts or lists of tensors). Leave it out, or fix it inside the module."
        )


def _check_tensor(name: str, tensor: Tensor, rank: int, batch: int) -> None:
    if tensor.ndim != rank:
        raise CallError(f"{name} has shape {tuple(tensor.shape)}; {rank} dimensions were captured")
    if rank and tensor.shape[0] != batch:
        raise CallError(f"{name} has batch size {tensor.shape[0]}, the sample has {batch}")


def _tuple_if_indexed(value: Any) -> Any:
    if isinstance(value, dict) and value and all(k.isdigit() for k in value):
        return tuple(value[str(i)] for i in range(len(value)))
    return value
