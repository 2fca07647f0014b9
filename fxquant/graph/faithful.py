"""Does a captured graph compute what its module computes? Asked of every model that is compiled."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import CaptureError
from fxquant.graph.flat_call import tensors_in
from fxquant.graph.limits import Guard, Limits
from fxquant.graph.nodes import is_random
from fxquant.graph.results import Result, parts, result_of
from fxquant.graph.signature import Signature
from fxquant.graph.specialise import device_of
from fxquant.graph.state import kept, place_of_forward

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of the relative L2 error
_COARSE = 5e-2  # of 16-bit floats, whose rounding a deep network amplifies

_STATE = (
    "on something besides its inputs and weights: state that it keeps between calls, Python's or "
    "NumPy's random numbers, or the time"
)
_ASK = "Make that an argument, or compile the submodule without it"


class UnfaithfulError(CaptureError):
    """A graph computes something else than its module."""


def run_model(model: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> Result:
    """The module's own result, in eval mode, for flat tensors; copies, into which it may write.

    Random numbers come from the state that `same_draws` sets.
    """
    args, kwargs = signature.call([tensor.clone() for tensor in tensors])
    with evaluating(model), torch.no_grad(), same_draws():
        output = model(*args, **kwargs)
    return result_of(tensors_in(output)[1])


def error(result: Result, expected: Result) -> float:
    """Relative L2 error, the largest of several tensors'."""
    return max(map(_error, parts(result), parts(expected)))


def _error(result: Tensor, expected: Tensor) -> float:
    """Values that are not finite count where they differ."""
    a, b = result.detach().double(), expected.detach().double()
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    scale = torch.where(b.isfinite(), b, 0.0).norm()
    ratio = difference.norm() / scale if scale > 0 else difference.norm()
    return float(torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf))


def agrees(result: Result, expected: Result) -> bool:
    """Equal, up to the rounding of floats."""
    return all(
        _error(a, b) <= _TOLERANCE.get(b.dtype, _COARSE)
        for a, b in zip(parts(result), parts(expected), strict=True)
    )


def check(
    model: nn.Module,
    signature: Signature,
    tensors: Sequence[Tensor],
    result: Callable[[], Result],
    graph: GraphModule,
) -> Result:
    """The module's result for a call, with which the graph's agrees.

    Args:
        result: computes the graph's.
        graph: says whether random numbers are drawn; both draw from the same state of torch's
            generator.

    Raises:
        UnfaithfulError: the results differ.
    """
    expected, changes = _first_result(model, signature, tensors)
    with same_draws():
        found = result()
    if agrees(found, expected):
        return expected
    shapes = ", ".join(
        f"{n} {list(t.shape)}" for n, t in zip(signature.names, tensors, strict=True)
    )
    if _draws(graph):
        log.warning(
            "%s draws random numbers, and its captured graph draws others: what was captured "
            "could not be compared with it", type(model).__name__,
        )  # fmt: skip
        return expected
    raise UnfaithfulError(
        f"what torch.export made of {type(model).__name__} is not what the module computes: for a "
        f"call with {shapes} the relative error is {error(found, expected):.3g}, before anything "
        f"is quantised. {_cause(model, changes)}"
    )


def _first_result(
    model: nn.Module, signature: Signature, tensors: Sequence[Tensor]
) -> tuple[Result, list[str]]:
    """What a first call gives, and what of the model it set; such state may not matter.

    Raises UnfaithfulError if it does: if a second call gives something else.
    """
    with kept(model) as changes:
        first = run_model(model, signature, tensors)
    if changes:
        with kept(model):
            again = [run_model(model, signature, tensors) for _ in range(2)]
        if not agrees(again[1], first):
            raise UnfaithfulError(_two_results(model, changes))
    return first, changes


def _two_results(model: nn.Module, changes: Sequence[str]) -> str:
    return f"{type(model).__name__} returned two results for one call. {_cause(model, changes)}"


def _cause(model: nn.Module, changes: Sequence[str]) -> str:
    """What forward may depend on besides its arguments, and where it is written."""
    if changes:
        return f"Its forward sets {', '.join(changes)}; a compiled model keeps nothing. {_ASK}"
    place = place_of_forward(model)
    return f"Its forward{f' ({place})' if place else ''} depends {_STATE}. {_ASK}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; then every module is in the mode it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(), which would reach the frozen ones as well
            module.training = True


@contextmanager
def same_draws() -> Iterator[None]:
    """Within, random numbers come from one fixed state; then the generators go on as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _draws(graph: GraphModule) -> bool:
    return any(is_random(node) for node in graph.graph.nodes)


class Comparison:
    """Compares a float graph with its module on calibration calls, as `compiler.observe` runs them.

    One call of each combination of sizes is compared, and one sample by itself: the tracer takes
    for granted that there are several, and a model may do something else for one. A module that
    keeps state between calls differs in the second call, if not in the first.

    Attributes:
        signature: the graph's, with limits that refuse single samples where it does.
        expected: the module's result for the first call, None before.
    """

    def __init__(self, model: nn.Module, signature: Signature, floats: GraphModule):
        self.signature = signature
        self.expected: Result | None = None
        self._model, self._floats = model, floats
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._calls = 0

    def __call__(self, tensors: Sequence[Tensor], run: Callable[[], Result]) -> None:
        """See one call.

        Args:
            run: gives the graph's result, and is called once.

        Raises:
            UnfaithfulError: it is not the module's.
        """
        key = tuple(t.shape for t in tensors)
        self._calls += 1
        is_new = key not in self._seen or self._calls == 2
        if not is_new or any(t.is_meta for t in (*tensors, *self._model.parameters())):
            run()
            return
        self._seen.add(key)
        given = [t.to(device_of(self._floats)) for t in tensors]
        expected = check(self._model, self.signature, given, run, self._floats)
        if self.expected is None:
            self.expected = expected
            self._try_one_sample(given, expected)

    def _try_one_sample(self, tensors: Sequence[Tensor], expected: Result) -> None:
        limits = self.signature.limits
        batch = limits.shapes[0][0] if limits.shapes else 1
        if not isinstance(batch, str) or tensors[0].shape[0] == 1:
            return
        factors = limits.batch_factors()
        one = [t[:rows] if rows else t for t, rows in zip(tensors, factors, strict=True)]
        if self._is_same(one) or _draws(self._floats):
            return
        again, changes = _first_result(self._model, self.signature, tensors)
        if not agrees(again, expected):
            raise UnfaithfulError(_two_results(self._model, changes))
        guard = Guard(f"{batch} > 1", f"{type(self._model).__name__} itself")
        self.signature = dataclasses.replace(
            self.signature, limits=Limits(limits.shapes, (*limits.guards, guard))
        )

    @torch.no_grad()
    def _is_same(self, tensors: Sequence[Tensor]) -> bool:
        """Do graph and module agree on this call?"""
        try:
            expected, _ = _first_result(self._model, self.signature, tensors)
            with same_draws():
                return agrees(self._floats(*tensors), expected)
        except Exception as refusal:  # noqa: BLE001 - whatever it is, the call is not for both
            log.debug("no single sample: %s", refusal)
            return False
