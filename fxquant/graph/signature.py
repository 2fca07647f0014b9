"""How a diffusers forward call maps to the flat list of tensors that a graph takes.

A call such as `unet(sample, t, encoder_hidden_states=c, added_cond_kwargs={"text_embeds": e})`
becomes the tensors named `sample, timestep, encoder_hidden_states, added_cond_kwargs.text_embeds`,
in the order of forward's own parameters. What is no tensor (`return_dict` apart) is fixed by the
first call: numbers, strings and None are part of the program, and another value is refused.

The timestep, by whichever of its usual names forward calls it, may be a Python number, a 0-d or a
[B] tensor. It becomes one value per sample, [B], unless the model only takes it as it was given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CallError
from fxquant.graph.limits import Limits
from fxquant.graph.per_sample import batch_of, repeated, shortened, without_repeats
from fxquant.graph.results import Result, parts
from fxquant.graph.structure import CONSTANTS, FlatCall, Skeleton, names_in, put_together
from fxquant.graph.timestep_forms import Form, forms_of, in_form

TIMESTEP = "timestep"
TIMESTEPS = (TIMESTEP, "timesteps", "t", "time", "timestep_ratio", "sigma", "sigmas", "r")
TOKENS = ("encoder_hidden_states", "encoder_attention_mask")  # dimension 1 is the prompt length
RETURN_DICT = "return_dict"
RESULT, NOTHING = "result", "nothing"  # leaves of what forward returns: a lone tensor, and None
_SMALL = 2  # dimensions: sizes, ids and embeddings keep the precision that they are given in


@dataclass(frozen=True)
class Input:
    """One tensor argument: its name, number of dimensions and dtype."""

    name: str
    rank: int
    dtype: torch.dtype

    @property
    def form(self) -> Form:
        return self.rank, self.dtype


@dataclass(frozen=True)
class Signature:
    """The flat tensor arguments of one captured model.

    Attributes:
        parameters: names of forward's parameters, in order, without self; `*args`, `**kwargs`.
        inputs: the tensors, in the order of the graph's inputs.
        dtype: the model's own floating dtype, that of its images and outputs.
        arguments: how the tensors and constants nest, by parameter.
        constants: the leaves that are no tensors, by name, as in the first call.
        defaults: forward's own numbers and strings, for parameters that a call may leave out.
        timestep: name of the input that is the timestep, None without one.
        result: how the tensors nest in what forward returns; a lone one is called RESULT.
        limits: the sizes that the graph takes; any before it is captured.
        forms: rank and dtype that the first call's timestep can be given to the model in; the
            usual form first.
    """

    parameters: tuple[str, ...]
    inputs: tuple[Input, ...]
    dtype: torch.dtype
    arguments: Skeleton
    constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    timestep: str | None = None
    result: Skeleton | str = RESULT
    limits: Limits = field(default_factory=Limits)
    forms: tuple[Form, ...] = field(default=(), compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(i.name for i in self.inputs)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(i.rank for i in self.inputs)

    @property
    def timestep_index(self) -> int | None:
        return None if self.timestep is None else self.names.index(self.timestep)

    @property
    def takes_return_dict(self) -> bool:
        return RETURN_DICT in self.parameters or RETURN_DICT in self.defaults

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The call's tensors in graph order.

        Raises:
            CallError: arguments that are missing, unexpected, or other constants than those of the
                first call, wrong ranks or kinds of numbers, sizes that the graph does not take.
        """
        leaves = FlatCall.of(bind(self.parameters, args, kwargs)).leaves
        found = _tensors(leaves, self.timestep)
        self._check_names(found, leaves)
        leaves = shortened(self.arguments, leaves, batch_of(found[self.names[0]]))
        self._check_constants({n: v for n, v in leaves.items() if n not in found})
        tensors = [self._fitted(i, found[i.name], found) for i in self.inputs]
        self.limits.check(self.names, tensors)
        return tensors

    def has_one_timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives a single timestep for all of its samples."""
        if self.timestep is None:
            return False
        given = FlatCall.of(bind(self.parameters, args, kwargs)).leaves.get(self.timestep)
        return isinstance(given, (int, float)) or (isinstance(given, Tensor) and given.numel() == 1)

    def call(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for forward from the flat tensors, positional ones only where it takes any.

        A `return_dict` is False: what returns a tuple is taken apart alike for all models.
        """
        given = self.unflatten(tensors)
        if self.takes_return_dict:
            given[RETURN_DICT] = False
        rest = next((p for p in self.parameters if _is_rest(p)), None)
        if rest is None or rest not in given:
            return [], given
        before = self.parameters[: self.parameters.index(rest)]
        return [*(given.pop(p) for p in before), *given.pop(rest)], given

    def unflatten(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments by name, without `return_dict`."""
        leaves = {**self.constants, **dict(zip(self.names, tensors, strict=True))}
        given = repeated(self.arguments, put_together(self.arguments, leaves), tensors[0])
        return dict(given)

    def returned(self, result: Result) -> Any:
        """What forward returns around its tensors, without the class that it may have."""
        names = [name for name in names_in(self.result) if name != NOTHING]
        leaves = dict(zip(names, parts(result), strict=True))
        return put_together(self.result, {**leaves, NOTHING: None})

    def return_dict(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """What a call says of it; True where it says nothing, as diffusers' models have it."""
        if RETURN_DICT in self.parameters:
            place = self.parameters.index(RETURN_DICT)
            if len(args) > place:
                return bool(args[place])
        return bool(kwargs.get(RETURN_DICT, True))

    def with_timestep(self, rank: int, dtype: torch.dtype) -> Signature:
        """The signature of a model that takes its timestep in another form."""
        inputs = [
            dataclasses.replace(i, rank=rank, dtype=dtype) if i.name == self.timestep else i
            for i in self.inputs
        ]
        return dataclasses.replace(self, inputs=tuple(inputs))

    def reformed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat tensors of the usual form, with the timestep in this signature's.

        Raises:
            CallError: several timesteps, where the model takes one.
        """
        found = list(tensors)
        if self.timestep_index is not None:
            wanted, given = self.inputs[self.timestep_index], found[self.timestep_index]
            if wanted.rank == 0 and given.device.type != "meta":
                given = given.unique()
            found[self.timestep_index] = in_form(given, wanted.name, wanted.form, found[0])
        return found

    def _check_names(self, found: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> None:
        missing = [n for n in self.names if n not in found]
        other = next((n for n in missing if leaves.get(n) is not None), None)
        if other:
            raise CallError(
                f"{other} is a {type(leaves[other]).__name__}, in the first calibration call it "
                "was a tensor"
            )
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

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        """What is no tensor is as in the first call; left out is the default, or None."""
        for name in {**self.constants, **given}:
            before, now = (
                leaves.get(name, self.defaults.get(name)) for leaves in (self.constants, given)
            )
            if before != now:
                raise CallError(
                    f"{name} is {now!r}, in the first calibration call it was {before!r}. What is "
                    "no tensor is part of the compiled program: pass a tensor where the module "
                    "takes one, or compile a model for each value"
                )

    def _fitted(self, wanted: Input, tensor: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        """The tensor with the input's rank and dtype."""
        if wanted.name == self.timestep:
            first = self.names[0]
            count, batch = tensor.numel(), batch_of(found[first])
            if wanted.rank == 1 and count not in (1, batch) and "." not in first:
                either = "1" if batch == 1 else f"1 or {batch}"
                raise CallError(
                    f"{wanted.name} has {count} values for a batch of {batch}; give {either}"
                )
            return in_form(tensor, wanted.name, wanted.form, found[first])
        if tensor.ndim != wanted.rank:
            raise CallError(
                f"{wanted.name} has shape {tuple(tensor.shape)}; {wanted.rank} dimensions were "
                "captured"
            )
        if _kind(tensor.dtype) != _kind(wanted.dtype):
            raise CallError(
                f"{wanted.name} is {tensor.dtype}, in the first call it is {wanted.dtype}"
            )
        return tensor.to(wanted.dtype)


def signature_of(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Signature:
    """The signature that the given first call implies. The timestep is float32, one per sample.

    Raises:
        CallError: the call does not bind to `model.forward`, or holds no tensor.
    """
    described = inspect.signature(model.forward).parameters
    parameters = tuple(_STARS.get(p.kind, "") + name for name, p in described.items())
    call = FlatCall.of(bind(parameters, args, kwargs))
    timestep = timestep_name(call)
    found = _tensors(call.leaves, timestep)
    if not found or next(iter(found.values())).ndim == 0:
        raise CallError(
            "the first call holds no batched tensor; a call is what the model's forward takes, "
            f"as a dict or a tuple: {', '.join(parameters)}"
        )
    first, tensor = next(iter(found.items()))
    defaults = {
        name: p.default
        for name, p in described.items()
        if type(p.default) in CONSTANTS and p.default is not None
    }
    if RETURN_DICT in kwargs:
        defaults[RETURN_DICT] = True
    dtype = floating_dtype(model)
    inputs = [Input(n, t.ndim, _dtype(t, dtype, n == first)) for n, t in found.items()]
    forms = () if timestep is None else forms_of(found[timestep])
    constants = {n: v for n, v in call.constants.items() if n not in found}
    skeleton = without_repeats(call.skeleton, constants, batch_of(tensor))
    kept = set(names_in(skeleton))
    signature = Signature(
        parameters,
        tuple(inputs),
        dtype,
        skeleton,
        {n: v for n, v in constants.items() if n in kept},
        defaults,
        timestep,
        forms=forms,
    )
    return signature.with_timestep(*forms[0]) if forms else signature


def floating_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the first floating parameter, float32 if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def bind(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by parameter name, in parameter order, without return_dict."""
    plain = [p for p in parameters if not p.startswith("*")]
    rest = next((p for p in parameters if _is_rest(p)), None)
    if len(args) > len(plain) and rest is None:
        raise CallError(f"{len(args)} positional arguments; forward takes {', '.join(parameters)}")
    given = dict(zip(plain, args, strict=False))
    if len(args) > len(plain) and rest is not None:
        given[rest] = tuple(args[len(plain) :])
    unknown = [k for k in kwargs if k not in plain and k != rest]
    if unknown and not any(p.startswith("**") for p in parameters):
        raise CallError(
            f"unknown argument {', '.join(map(repr, unknown))}; "
            f"forward takes {', '.join(parameters)}"
        )
    doubled = [k for k in kwargs if k in given]
    if doubled:
        raise CallError(f"argument {doubled[0]!r} is given twice")
    given.update(kwargs)
    order = [*parameters, *unknown]
    return {p: given[p] for p in order if p in given and p != RETURN_DICT}


def timestep_name(call: FlatCall) -> str | None:
    """The timestep among a call's arguments: a number or a vector, but not the first of them."""
    leaves = call.leaves
    for name in (*TIMESTEPS, *_second_positional(call)):
        value = leaves.get(name)
        is_vector = isinstance(value, Tensor) and value.ndim <= 1
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (is_vector or is_number) and name != next(iter(leaves)):
            return name
    return None


def _second_positional(call: FlatCall) -> list[str]:
    """Where forward takes `*args` alone: that is where denoisers have their timestep."""
    head = call.skeleton.members[0] if call.skeleton.members else ("", "")
    is_rest = isinstance(head[1], Skeleton) and _is_rest(str(head[0]))
    return [f"{str(head[0]).lstrip('*')}.1"] if is_rest else []


def _tensors(leaves: Mapping[str, Any], timestep: str | None) -> dict[str, Tensor]:
    """The leaves that are tensors, and the timestep, which becomes one."""
    return {
        n: v if isinstance(v, Tensor) else torch.tensor(v)
        for n, v in leaves.items()
        if isinstance(v, Tensor) or (n == timestep and isinstance(v, (int, float)))
    }


def _dtype(tensor: Tensor, dtype: torch.dtype, is_sample: bool) -> torch.dtype:
    """What an input is cast to: images and tokens take the model's floating dtype; small floats
    may be sizes and ids, and keep theirs."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if is_sample or tensor.ndim > _SMALL:
        return dtype
    return torch.float32 if tensor.dtype == torch.float64 else tensor.dtype


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _is_rest(parameter: str) -> bool:
    """Is it forward's `*args`?"""
    return parameter.startswith("*") and not parameter.startswith("**")


_STARS: Mapping[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
