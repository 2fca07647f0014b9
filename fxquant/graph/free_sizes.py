"""Which sizes torch.export is asked to leave free, and on what example.

Most are left to the tracer (`Dim.AUTO`): it keeps a size free until the model fixes it, and finds
which sizes go together. Heights and widths that a UNet halves at every level are free in steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._sympy.functions import Mod, PythonMod

from fxquant.graph.guards import counts_pieces
from fxquant.graph.signature import TOKENS, Signature

_ROOMY = 4  # samples: a batch of two, halved, would be one, which the tracer takes for a constant
_STEPS = (2, 4, 8, 16, 32)
_SMALL_SIDE = 32
_PATCHES = (1, 2, 4)  # their sides
_SOUND, _IMAGE, _VIDEO = 3, 4, 5  # dimensions; channels of a sound may come first or last


@dataclass(frozen=True)
class Plan:
    """What to trace.

    Attributes:
        example: the flat tensors.
        free: by input, the dimensions that calls may choose and how export is told.
    """

    example: list[Tensor]
    free: tuple[dict[int, Any], ...]


def plans(
    model: nn.Module,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    tensors: Sequence[Tensor],
    dynamic: bool,
) -> Iterator[Plan]:
    """From the freest to the one that fixes every size.

    Args:
        calls: all that are known; what differs between them is free.
        tensors: the call to trace.
        dynamic: False for the last plan alone.
    """
    if dynamic:
        free = _free_dimensions(calls, tensors)
        examples = _examples(signature, tensors)
        step = _level_step(model, tensors[0])
        if step > 1:
            yield Plan(examples[0], stepwise(tensors, free, step))
        for example in examples:
            yield Plan(example, tuple(dict.fromkeys(dims, Dim.AUTO) for dims in free))
        batch = [{0} & dims for dims in free]
        yield Plan(examples[0], tuple(dict.fromkeys(dims, Dim.AUTO) for dims in batch))
    yield Plan(list(tensors), tuple({} for _ in tensors))


def stepwise(
    tensors: Sequence[Tensor], free: Sequence[set[int]], step: int
) -> tuple[dict[int, Any], ...]:
    """Height and width of the first input in multiples of `step`."""
    shapes = [dict.fromkeys(dims, Dim.AUTO) for dims in free]
    height, width = tensors[0].ndim - 2, tensors[0].ndim - 1
    shapes[0] |= {height: step * Dim("height"), width: step * Dim("width")}
    return tuple(shapes)


def in_steps(plan: Plan, step: int) -> Plan:
    """The same plan with the sides of the first input in multiples of `step`."""
    return Plan(plan.example, stepwise(plan.example, [set(dims) for dims in plan.free], step))


def widened(plan: Plan) -> Plan | None:
    """The same plan on images twice as high and wide; None where the sides are not small.

    At the smallest size that a UNet takes, its deepest images have one pixel, which the tracer
    takes for a constant.
    """
    first = plan.example[0]
    if first.ndim < _IMAGE or max(first.shape[-2:]) > _SMALL_SIDE:
        return None
    example = [
        t.repeat_interleave(2, -1).repeat_interleave(2, -2)
        if t.ndim >= _IMAGE and t.is_floating_point()
        else t
        for t in plan.example
    ]
    return Plan(example, plan.free)


def with_fixed(plan: Plan, values: Sequence[Tensor], sizes: set[Any]) -> Plan:
    """The same plan with these sizes, symbols of the inputs' example values, as they are."""
    free = [
        {axis: how for axis, how in dims.items() if not _symbols(value.shape[axis]) & sizes}
        for value, dims in zip(values, plan.free, strict=True)
    ]
    return Plan(plan.example, tuple(free))


def pinned(environment: Any, values: Sequence[Tensor]) -> set[Any]:
    """The sizes of images that can have one value only, by what the tracer found.

    Learned positions do that: height times width is then a number, though neither of them is.
    `h // (h // 2) == 2` does not: it says that h is even; and in `c * (h // (h // 2)) == 8` it is
    c, the channels, that has one value.
    """
    symbols = {
        s for value in values if value.ndim >= _IMAGE for n in value.shape[1:] for s in _symbols(n)
    }
    asked = [g for g in environment.guards if not counts_pieces(g)]
    found: set[Any] = set()
    for equation in (g.expr for g in asked if isinstance(g.expr, sympy.Eq)):
        # Guards may still name what the inputs' symbols have replaced.
        made, value = (environment.replace(side) for side in equation.args)
        is_made_of_sizes = made.free_symbols and made.free_symbols <= symbols
        is_remainder = made.has(Mod, PythonMod)
        if is_made_of_sizes and not is_remainder and value.is_number and value > 0:
            found |= _fixing(sympy.Eq(made, value), environment.backed_var_to_val)
    return found


def _fixing(equation: Any, example: Mapping[Any, Any]) -> set[Any]:
    """The fewest symbols that must have their example's value for this to hold for all others."""
    symbols = sorted(equation.free_symbols, key=str)
    for count in range(len(symbols) + 1):
        for chosen in itertools.combinations(symbols, count):
            rest = equation.subs({s: example[s] for s in chosen})
            if any(_holds_everywhere(rest, step) for step in (1, *_STEPS)):
                return set(chosen)
    return set(symbols)


def step_of(environment: Any, sides: Sequence[Any], example: Sequence[int]) -> int:
    """The least step for which what the tracer found out about these sides is always true."""
    symbols = {s for side in sides for s in _symbols(side)}
    asked = [environment.replace(g.expr) for g in environment.guards]
    equations = [e for e in asked if isinstance(e, sympy.Eq) and e.free_symbols <= symbols]
    for step in (1, *_STEPS):
        if any(size % step for size in example):
            break
        if all(_holds(e, step) for e in equations):
            return step
    return 1


def fixed_sizes(plan: Plan, values: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(input, dimension) of what was to be free and turned out to have one size.

    Args:
        values: the inputs' example values in the traced graph.
    """
    return [
        (k, axis)
        for k, (dims, value) in enumerate(zip(plan.free, values, strict=True))
        for axis in sorted(dims)
        if isinstance(value.shape[axis], int)
        and plan.example[k].shape[axis] > 1
        and axis not in _channels(value)
    ]


def _channels(value: Tensor) -> tuple[int, ...]:
    """Which dimensions of a sound or video are its channels, as far as one can see."""
    if value.ndim == _SOUND:
        fixed = tuple(axis for axis in (1, 2) if isinstance(value.shape[axis], int))
        return fixed if len(fixed) == 1 else ()
    if value.ndim < _VIDEO:
        return ()
    is_first = any(isinstance(size, int) for size in value.shape[1:3])
    return (1, 2) if is_first else (value.ndim - 1,)


def has_fixed_sides(plan: Plan, values: Sequence[Tensor]) -> bool:
    """Have the images of the first input one height or width, which were to be free?"""
    sides = (values[0].ndim - 2, values[0].ndim - 1)
    return values[0].ndim >= _IMAGE and any(
        axis in plan.free[0] and isinstance(values[0].shape[axis], int) for axis in sides
    )


def _symbols(size: Any) -> set[Any]:
    found: set[Any] = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
    return found


def _holds(equation: Any, step: int) -> bool:
    """Is it true for all small multiples of the step?"""
    symbols = sorted(equation.free_symbols, key=str)
    return all(
        _is_true(equation, dict.fromkeys(symbols, sympy.Integer(step * k))) for k in range(1, 10)
    )


def _holds_everywhere(equation: Any, step: int) -> bool:
    """Is it true for all small multiples of the step, whichever symbol has which?"""
    symbols = sorted(equation.free_symbols, key=str)
    sizes = [sympy.Integer(step * k) for k in range(1, 6)]
    return all(
        _is_true(equation, dict(zip(symbols, values, strict=True)))
        for values in itertools.product(sizes, repeat=len(symbols))
    )


def _is_true(equation: Any, values: dict[Any, Any]) -> bool:
    """Not where it has no value: one halved is nothing to divide by."""
    try:
        return bool(equation.subs(values) == sympy.true)
    except ZeroDivisionError:
        return False


def _level_step(model: nn.Module, sample: Tensor) -> int:
    """What a UNet's height and width are a multiple of for its skips to match, if these are."""
    levels = getattr(getattr(model, "config", None), "down_block_types", None)
    if not levels or sample.ndim < _IMAGE:
        return 1
    step = 2 ** (len(levels) - 1)
    return 1 if any(side % step for side in sample.shape[-2:]) else step


def _free_dimensions(
    calls: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[set[int]]:
    prompts = {t.shape[1] for t in tensors if t.ndim == 3}
    lengths = prompts | _tokens_of_images(tensors)
    lengths |= {a + b for a, b in itertools.combinations(lengths, 2)}  # prompt and image together
    return [
        _usual(t, lengths, prompts)
        | (set(range(t.ndim)) if k == 0 and t.ndim == _SOUND else set())
        | {axis for axis in range(t.ndim) if len({call[k].shape[axis] for call in calls}) > 1}
        for k, t in enumerate(tensors)
    ]


def _usual(tensor: Tensor, lengths: set[int], prompts: set[int]) -> set[int]:
    """Batch, sides and frames, numbers of tokens; not channels where they are known.

    What comes last of three is channels that may be as many as an image has patches, or a mask's
    prompt length.
    """
    if tensor.ndim == _IMAGE:
        return {0, 2, 3}
    if tensor.ndim >= _VIDEO:
        return set(range(tensor.ndim))
    known = [lengths, prompts] if tensor.ndim == 3 else [lengths] * tensor.ndim
    tokens = {axis for axis, n in enumerate(tensor.shape[1:], 1) if n in known[axis - 1]}
    return {0} | tokens if tensor.ndim else set()


def _tokens_of_images(tensors: Sequence[Tensor]) -> set[int]:
    """How many frames, and patches of them, the images and videos may have: positions, and
    timesteps of their own, are given for so many."""
    videos = [t for t in tensors if t.ndim == _VIDEO]
    frames = {n for t in videos for n in t.shape[1:3]}
    images = {n for t in tensors if t.ndim >= _IMAGE for n in _patches(*t.shape[-2:])}
    volumes = {
        count * patches
        for t in videos
        for sides in (t.shape[-2:], t.shape[-3:-1])
        for patches in _patches(*sides)
        for count in t.shape[1:3]
    }
    return (frames | images | volumes) - {1}


def _patches(height: int, width: int) -> list[int]:
    """In how many patches, of each size that is usual, an image is cut."""
    fitting = [side for side in _PATCHES if height % side == 0 and width % side == 0]
    return [(height // side) * (width // side) for side in fitting]


def _examples(signature: Signature, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The call with more samples, with the rows folded into the batch as well, and as it is."""
    batch = tensors[0].shape[0]
    plain = [_two_tokens(t, n) for n, t in zip(signature.names, tensors, strict=True)]
    found = [plain]
    if 0 < batch < _ROOMY:
        rows = [t.shape[0] if t.ndim else 0 for t in plain]
        whole = [_repeated(t) if n == batch else t for t, n in zip(plain, rows, strict=True)]
        folded = [
            _repeated(t) if n and n % batch == 0 else t for t, n in zip(plain, rows, strict=True)
        ]
        is_folded = any(n != batch and n % batch == 0 for n in rows if n)
        found = [whole, *([folded] if is_folded else []), plain]
    return found


def _repeated(tensor: Tensor) -> Tensor:
    return tensor.repeat(_ROOMY, *[1] * (tensor.ndim - 1))


def _two_tokens(tensor: Tensor, name: str) -> Tensor:
    if name in TOKENS and tensor.ndim > 1 and tensor.shape[1] == 1:
        return tensor.repeat(1, 2, *[1] * (tensor.ndim - 2))
    return tensor
