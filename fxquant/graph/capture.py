"""A module becomes a plain FX graph of whole ATen operators (conv2d, linear, group_norm, ...).

torch.export does the tracing. Sizes stay symbolic wherever the model leaves them free: batch,
height, width, frames, prompt length; which do is found by tracing, and read off the result (see
`limits` and `guards`). What comes back takes flat tensors, returns one tensor, has no guards, and
carries on every node, under `meta["custom"]["fxquant"]["stack"]`, the path and type of the modules
it came from.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from fxquant.errors import CallError, CaptureError
from fxquant.graph import faithful, free_sizes
from fxquant.graph.flat_call import AsksForValuesError, FlatModule
from fxquant.graph.free_sizes import Plan
from fxquant.graph.guards import asked_by_the_model, traced_limits
from fxquant.graph.limits import Dimension, Guard
from fxquant.graph.plain_graph import plain_graph
from fxquant.graph.signature import TIMESTEP, Signature, signature_of
from fxquant.graph.untraceable import explain

log = logging.getLogger(__name__)

_LOGGERS_OF_TRACING = (
    "torch._export.non_strict_utils",
    "torch.fx.experimental.symbolic_shapes",
)
_WARNINGS_OF_TRACING = (
    r"The tensor attributes? .* assigned during export",
    r"Using padding='same' with even kernel lengths",
)
_MOST_EXAMPLES = 4  # calls of different sizes that are tried as the traced one


@dataclass(frozen=True)
class Captured:
    """A float graph and the way calls map to its inputs.

    Attributes:
        output: the class of what forward returns, None for tensors, tuples, lists and dicts.
    """

    graph_module: GraphModule
    signature: Signature
    output: type[Any] | None = None


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool = True,
) -> Captured:
    """Trace `model` on one example call.

    Args:
        model: any module in eval mode whose forward takes tensors; on any device, meta included.
        args, kwargs: one call; batch size and spatial size are examples, not fixed.
        dynamic: False to fix all sizes to those of the call.

    Raises:
        CaptureError: not a module, or torch.export refuses it.
        CallError: the call does not fit forward.
    """
    check_module(model)
    signature = signature_of(model, args, kwargs or {})
    return capture_flat(model, signature, signature.flatten(args, kwargs or {}), dynamic)


def capture_flat(
    model: nn.Module, signature: Signature, tensors: Sequence[Tensor], dynamic: bool = True
) -> Captured:
    """Trace `model` on the flat tensors of one call, its timestep in the first form it takes."""
    failure: CaptureError | None = None
    for form in formed(signature):
        try:
            return capture_calls(model, form, [form.reformed(tensors)], dynamic)
        except CaptureError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def formed(signature: Signature) -> list[Signature]:
    """The signature with its timestep in each form that the model may take."""
    return [signature.with_timestep(*form) for form in signature.forms] or [signature]


def check_module(model: object) -> None:
    """Raises CaptureError for what is no module."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")


def capture_calls(
    model: nn.Module,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    dynamic: bool = True,
) -> Captured:
    """Trace `model` on one of these calls, so that the graph holds for all of them.

    Args:
        calls: flat tensors in the order of the signature.

    Raises:
        CaptureError: torch.export refuses the module, or it takes different ways for the calls.
    """
    kinds: dict[tuple[torch.Size, ...], Sequence[Tensor]] = {}
    for call in calls:
        kinds.setdefault(tuple(t.shape for t in call), call)
    different = sorted(kinds.values(), key=_is_lone)
    failure: Exception | None = None
    for call in different[:_MOST_EXAMPLES]:
        for plan in free_sizes.plans(model, signature, calls, call, dynamic):
            tried = _tried(model, signature, plan, different, dynamic)
            if isinstance(tried, Captured):
                return tried
            if isinstance(tried, CaptureError) and str(tried) == str(failure):
                raise tried  # asked in two ways, the module gives one answer
            failure = failure if isinstance(failure, CaptureError) else tried
        if not isinstance(failure, CaptureError):
            break  # it cannot be traced at any size
    if isinstance(failure, CaptureError):
        raise failure
    assert failure is not None
    raise CaptureError(explain(failure, model)) from failure


def _tried(
    model: nn.Module,
    signature: Signature,
    plan: Plan,
    calls: Iterable[Sequence[Tensor]],
    warn: bool,
) -> Captured | Exception:
    """The captured model that holds for all calls, or why there is none."""
    try:
        traced = _refined(model, signature, plan)
        captured = _for_all(model, _captured(signature, traced), calls)
    except DifferentWaysError as error:
        return error
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001 - becomes a CaptureError if nothing else succeeds
        log.debug("export with %s failed: %s", plan.free, error)
        return error
    if warn:
        _warn_of_fixed_sizes(model, signature, traced)
    return captured


class DifferentWaysError(CaptureError):
    """The graph of one call does not hold for another."""


def _is_lone(call: Sequence[Tensor]) -> bool:
    """Has it a single sample? Such sizes are taken for constants."""
    return call[0].shape[0] == 1


def _for_all(model: nn.Module, captured: Captured, calls: Iterable[Sequence[Tensor]]) -> Captured:
    """The same with limits that take all of these calls.

    Where a call answers a question of the model's code in another way, but both ways compute the
    same for it, the question does not matter.
    """
    signature = captured.signature
    for call in calls:
        try:
            broken = signature.limits.broken(signature.names, call)
        except CallError as error:
            raise DifferentWaysError(
                f"the calibration calls have sizes that {type(model).__name__} could not be "
                f"captured for at once: {error}. Compile one model for each"
            ) from error
        if broken:
            _compare(model, captured, call, broken)
            limits = signature.limits.without(broken)
            signature = dataclasses.replace(signature, limits=limits)
    return dataclasses.replace(captured, signature=signature)


def _compare(
    model: nn.Module, captured: Captured, call: Sequence[Tensor], broken: Sequence[Guard]
) -> None:
    with torch.no_grad():
        try:
            faithful.check(
                model,
                captured.signature,
                call,
                lambda: captured.graph_module(*call),
                captured.graph_module,
            )
        except (CaptureError, RuntimeError) as error:
            raise DifferentWaysError(
                f"{type(model).__name__} takes different ways for the sizes of the calibration "
                f"calls: {broken[0].place or 'it'} asks whether {broken[0].text}. Compile one "
                "model for each, with calls of its own"
            ) from error


def _captured(signature: Signature, traced: _Traced) -> Captured:
    returned, limits = traced.wrapper.returned, traced_limits(traced.inputs)
    signature = dataclasses.replace(signature, limits=limits, result=returned.result)
    if signature.timestep_index is not None and len(signature.forms) > 1:
        _check_timestep(signature, limits.shapes)
    graph = plain_graph(traced.exported, signature, traced.plan.example[0].device.type)
    return Captured(graph, signature, returned.output)


def _check_timestep(signature: Signature, shapes: Sequence[Sequence[Dimension]]) -> None:
    """One timestep per sample must go with the batch: not with a width that happens to be equal.

    It may go with nothing, where it and the sample never meet.
    """
    assert signature.timestep_index is not None
    timestep = shapes[signature.timestep_index]
    others = [d for shape in shapes for d in shape[1:]]  # first ones are batches, too
    if timestep and timestep[0] != shapes[0][0] and timestep[0] in others:
        raise CaptureError(
            f"{signature.timestep} is one number for all samples in this module; with one number "
            f"per sample it would go with another dimension, {timestep[0]}"
        )


@dataclass(frozen=True)
class _Traced:
    """What torch.export made of a plan."""

    plan: Plan
    wrapper: FlatModule
    exported: torch.export.ExportedProgram

    @property
    def inputs(self) -> list[FakeTensor]:
        """Example values of the inputs; parameters come before them."""
        values = [n.meta["val"] for n in self.exported.graph.nodes if n.op == "placeholder"]
        return values[len(values) - len(self.plan.example) :]


def _refined(model: nn.Module, signature: Signature, plan: Plan) -> _Traced:
    """Traced; again on larger images if these were too small, or in steps if sides are."""
    traced = _export(model, signature, plan)
    if free_sizes.has_fixed_sides(plan, traced.inputs):
        wide = free_sizes.widened(plan)
        again = _attempt(model, signature, wide) if wide else None
        if again is None or free_sizes.has_fixed_sides(again.plan, again.inputs):
            return traced
        traced = again
    first = traced.inputs[0]
    pinned = free_sizes.pinned(first.fake_mode.shape_env, traced.inputs)
    if pinned:
        fixed = _export(model, signature, free_sizes.with_fixed(traced.plan, traced.inputs, pinned))
        return dataclasses.replace(fixed, plan=traced.plan)  # which says what was to be free
    if first.ndim < 4 or any(not isinstance(side, torch.SymInt) for side in first.shape[-2:]):
        return traced
    sides = traced.plan.example[0].shape[-2:]
    step = free_sizes.step_of(first.fake_mode.shape_env, first.shape[-2:], sides)
    if step == 1:
        return traced
    return _attempt(model, signature, free_sizes.in_steps(traced.plan, step)) or traced


def _attempt(model: nn.Module, signature: Signature, plan: Plan) -> _Traced | None:
    """Traced, or None where the tracer refuses what it was asked to leave free."""
    try:
        return _export(model, signature, plan)
    except Exception as error:  # noqa: BLE001 - there is a graph already
        log.debug("export with %s failed: %s", plan.free, error)
        return None


def _export(model: nn.Module, signature: Signature, plan: Plan) -> _Traced:
    wrapper = FlatModule(model, signature)
    with faithful.evaluating(model), _tracing(), torch.no_grad():
        try:
            exported = torch.export.export(
                wrapper.eval(), tuple(plan.example), dynamic_shapes=(plan.free,), strict=False
            )
        except AsksForValuesError as error:
            raise error.__cause__ or error from None
    return _Traced(plan, wrapper, exported)


@contextmanager
def _tracing() -> Iterator[None]:
    """Without the cache of fake tensors: keys of symbolic sizes cost more than it saves."""
    cache = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with asked_by_the_model(), _quiet(), _with_roots(), cache:
        yield


@contextmanager
def _with_roots() -> Iterator[None]:
    """NumPy takes the root of what is no number by its method `sqrt`, which torch's sizes lack."""
    if hasattr(torch.SymFloat, "sqrt"):
        yield
        return
    torch.SymFloat.sqrt = torch.sym_sqrt  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del torch.SymFloat.sqrt  # type: ignore[attr-defined]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch notes which sizes became constants; what of it concerns a user, we say.

    Its warnings are of how its own layers look while they are traced: a GRU assigns its weights,
    a convolution of an even kernel pads one side more. They are no errors, whatever filter is set;
    whether state matters is asked by `faithful`.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS_OF_TRACING]
    was = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS_OF_TRACING:
                warnings.filterwarnings("ignore", message, UserWarning)
            yield
    finally:
        for logger, disabled in zip(loggers, was, strict=True):
            logger.disabled = disabled


def _warn_of_fixed_sizes(model: nn.Module, signature: Signature, traced: _Traced) -> None:
    fixed = free_sizes.fixed_sizes(traced.plan, traced.inputs)
    if fixed:
        shapes = {k: list(traced.inputs[k].shape) for k, _ in fixed}
        said = [f"{signature.names[k]} {axis} ({shapes[k][axis]})" for k, axis in fixed]
        log.warning(
            "%s takes one size only in these dimensions, that of the calibration calls: %s. "
            "Calibrate at the sizes that you will serve",
            type(model).__name__, ", ".join(said),
        )  # fmt: skip


__all__ = ["TIMESTEP", "Captured", "capture"]
