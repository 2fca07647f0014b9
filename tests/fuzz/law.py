"""The law: compile to the right result, or refuse by name.

`check(source)` takes a program as `tests/fuzz/writer.py` writes it (a class Fuzzed, `call`, SIZES,
OTHER, DTYPE) and raises a `Finding` where the law does not hold.

What "near" means. The right result of a quantised model is not the float model's: how far they may
be apart depends on the module. So the *module itself* is run once more with noise of the size of
8 bit rounding on both operands of every product (`tests/fuzz/noise.py`), clipped to the ranges of
the calibration calls, and the compiled model may be 0.05 plus four times as far from the float
model as that. At the calibrated size the calls served are ones that it was calibrated with: one
sample of five tokens teaches ranges that the next exceeds by half. (Of modules compiled rightly the
error was 1.2 to 3.8 times that noise.) A plain module is allowed a rel of about 0.1; what goes
wrong when a write is lost, a position rounded or a constant frozen is almost always 0.3 and more.
"""

from __future__ import annotations

import copy
import functools
import linecache
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fxquant
from fxquant.errors import ArtifactError, CallError, FxquantError
from fxquant.passes.pipelines import PREPARE
from tests.fuzz.noise import Range, noisy, ranges_of
from tests.toy import relative_error

FILE = "fuzzed.py"
INTERNAL = ("an error in fxquant", "bug in the pass", "AssertionError", "internal error")
# Not saved on purpose, and said so when it is compiled: kernels that crash on weights of other
# shapes, which a file might name, and sizes and numbers that no graph read again could know.
UNSAVED = ("aten.lstm.", "whose size depends on values", "makes a number of a tensor's values")
GRAPH_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
BASE, SLACK = 0.05, 4.0
CALLS = 12  # to calibrate on, and to serve; those of the other size come after them


class Finding(Exception):  # noqa: N818 - what the fuzzer is after
    """The law is broken: at which stage, and how."""

    def __init__(self, stage: str, said: str):
        super().__init__(f"{stage}: {said}")
        self.stage, self.said = stage, said

    @property
    def cause(self) -> str:
        """The same for findings that are likely one: names and numbers left out."""
        text = re.sub(r"\w*\[[^ ]*\]", "", self.said.split("\n")[0])
        text = re.sub(r"%\w+|'[^']*'|\b\w*\d\w*\b|\d[\d.e+-]*|inf\b", "#", text)
        stage = re.sub(r"call \d+", "call", self.stage)
        return f"{stage}: {re.sub(r'[ #=:]+', ' ', text)[:80]}"


class Invalid(Exception):  # noqa: N818 - a generated module that no law speaks of
    """The float module itself raises, or gives NaN, or nothing at all."""


@dataclass
class Outcome:
    """What became of a module that kept the law."""

    refused: str = ""
    stage: str = ""
    worst: float = 0.0
    noise: float = 0.0
    other_refused: str = ""
    differs: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Case:
    """A program, executed."""

    source: str
    model: nn.Module
    make: Callable[..., dict[str, Any]]
    sizes: dict[str, int]
    other: dict[str, int]
    dtype: torch.dtype

    @functools.cached_property
    def ranges(self) -> dict[str, Range]:
        """Of what is multiplied in the calibration calls."""
        calls = [self.call(self.sizes, seed) for seed in range(CALLS)]
        return ranges_of([_again(self, call) for call in calls])

    @property
    def in_tuple(self) -> bool:
        return isinstance(run(copy.deepcopy(self.model), self.call(self.sizes, 0)), tuple)

    def call(self, sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
        torch.manual_seed(1000 + seed)
        call = self.make(**sizes)
        return pytree.tree_map(self._cast, call)

    def _cast(self, leaf: Any) -> Any:
        floats = isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.ndim > 2
        return leaf.to(self.dtype) if floats else leaf


def read(source: str) -> Case:
    """Execute a program; its lines show up in tracebacks."""
    lines = source.splitlines(keepends=True)
    linecache.cache[FILE] = (len(source), None, lines, FILE)
    names: dict[str, Any] = {"__name__": "fuzzed"}
    exec(compile(source, FILE, "exec"), names)
    torch.manual_seed(0)
    dtype = names.get("DTYPE", torch.float32)
    model = names["Fuzzed"]()
    _randomise(model)
    model = model.eval().to(dtype)
    return Case(source, model, names["call"], names["SIZES"], names["OTHER"], dtype)


def _randomise(model: nn.Module) -> None:
    """Fresh norms multiply by one and add zero, which would hide that an affine was lost."""
    for module in model.modules():
        names = dict(module.named_parameters(recurse=False))
        if "Norm" in type(module).__name__ and names:
            for name, parameter in names.items():
                nn.init.normal_(parameter, mean=float(name == "weight"), std=0.2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.2)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.7, 1.4)


def run(model: nn.Module, call: dict[str, Any]) -> Any:
    """A call's result, on a copy of the call (modules write into their arguments), seeded."""
    torch.manual_seed(7)
    with torch.no_grad():
        result: Any = model(**copy.deepcopy(call))
    return result


def only_tensor(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def expected(case: Case, sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Any], Tensor]:
    """A call, and what the float module makes of it.

    Raises:
        Invalid: the module cannot do it, or what comes is not finite or is nothing.
    """
    call = case.call(sizes, seed)
    try:
        result = only_tensor(run(copy.deepcopy(case.model), call))
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    if not torch.isfinite(result).all() or not result.any() or result.abs().max() > 1e4:
        raise Invalid("the result is not finite, zero or huge")
    return call, result


@dataclass
class Compiled:
    """A compiled model, and the prepared float graph that it was made from."""

    model: Any
    float_graph: GraphModule

    def float_run(self, call: dict[str, Any]) -> Tensor:
        """The float graph on a call. The one place that knows how a call reaches a graph."""
        tensors = self.model.signature.flatten((), copy.deepcopy(call))
        torch.manual_seed(7)
        with torch.no_grad():
            return self.float_graph(*tensors)


def compiled_from(model: nn.Module, calls: list[dict[str, Any]]) -> Compiled:
    """Compile, and keep the graph that the last pass of PREPARE made."""
    graphs: dict[str, GraphModule] = {}
    quantised = fxquant.compile(
        model,
        calls,
        recipe="w8a8-fast",
        progress=False,
        on_pass=lambda record: graphs.update({record.name: record.graph}),
    )
    return Compiled(quantised, graphs[PREPARE[-1].name])


def check(source: str) -> Outcome:
    """Hold a program against the law.

    Raises:
        Finding: it is broken.
        Invalid: the program is no module that the law speaks of.
    """
    logger = logging.getLogger("fxquant")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return _checked(read(source))
    finally:
        logger.setLevel(level)


def _checked(case: Case) -> Outcome:
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    calibration = [expected(case, case.sizes, seed)[0] for seed in range(CALLS)]
    outcome = Outcome()
    try:
        both = _attempt("compile", lambda: compiled_from(case.model, copy.deepcopy(calibration)))
        compiled = both.model
        _check_unchanged(case, before)
        _check_graph(case, both, outcome)
        _check_served(case, compiled, "serve", outcome)
        compiled.load_state_dict({k: v.clone() for k, v in compiled.state_dict().items()})
        _check_served(case, compiled, "serve after load_state_dict", outcome, calls=3)
        _write_in_place(compiled)
        _check_served(case, compiled, "serve after weights were copied", outcome, calls=3)
        _check_saved(case, compiled, outcome)
        if outcome.differs and not outcome.other_refused:
            raise Finding("float graph", outcome.differs)
    except Refused as refusal:
        outcome.refused, outcome.stage = str(refusal), refusal.stage
        _check_named(case, refusal)
    return outcome


class Refused(Exception):  # noqa: N818 - allowed by the law, if it says what and where
    """An FxquantError was raised."""

    def __init__(self, stage: str, error: FxquantError):
        super().__init__(f"{type(error).__name__}: {error}")
        self.stage, self.error = stage, error


def _attempt(stage: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except FxquantError as error:
        raise Refused(stage, error) from error
    except Exception as error:
        raise Finding(stage, f"raw {type(error).__name__}: {error}") from error


def _check_named(case: Case, refusal: Refused) -> None:
    """A refusal says which operator or argument, and where; and is no internal error."""
    said = str(refusal)
    if any(word in said for word in INTERNAL):
        raise Finding(refusal.stage, f"internal: {said}") from refusal.error
    if isinstance(refusal.error, CallError):
        arguments = set(case.make(**case.sizes))
        if any(re.search(rf"\b{name}\b", said) for name in arguments):
            return
    code = (line.strip() for line in case.source.splitlines())
    lines = [line for line in code if len(line) > 12 and line in said]
    if not lines and not re.search(rf"{re.escape(FILE)}\D{{0,9}}\d+", said):
        raise Finding(refusal.stage, f"names no line: {said}") from refusal.error


def _check_unchanged(case: Case, before: dict[str, Tensor]) -> None:
    after = case.model.state_dict()
    if any(not torch.equal(before[k], after[k]) for k in before):
        raise Finding("compile", "the original's weights changed")
    if case.model.training or set(after) != set(before):
        raise Finding("compile", "the original changed")


def _check_graph(case: Case, compiled: Compiled, outcome: Outcome) -> None:
    """The prepared float graph equals the module, at both sizes, to float rounding."""
    for name, sizes in (("calibrated", case.sizes), ("other", case.other)):
        try:
            call, wanted = expected(case, sizes, 2 * CALLS)
            result = compiled.float_run(call)
        except Invalid:
            continue
        except Exception as error:  # other sizes are judged where they are served
            if name == "calibrated":
                raise Finding("float graph", f"raw {type(error).__name__}: {error}") from error
            outcome.notes.append(f"float graph: {type(error).__name__}: {error}")
            continue
        error = _rel(result, wanted)
        if not error <= GRAPH_TOLERANCE[case.dtype]:
            outcome.differs = f"differs from the module at the {name} size: rel {error:.2g}"
            if name == "calibrated":
                raise Finding("float graph", outcome.differs)


def _rel(result: Tensor, wanted: Tensor) -> float:
    """Relative L2 error; infinite for another shape or for NaN."""
    if result.shape != wanted.shape or not torch.isfinite(result).all():
        return math.inf
    return relative_error(result, wanted)


def _check_served(
    case: Case, compiled: nn.Module, stage: str, outcome: Outcome, calls: int = 5
) -> None:
    """Calls in a row at the calibrated size, at another one, and at the first again."""
    plan = [("calibrated", case.sizes)] * calls
    plan += [("other", case.other)] * calls + [("calibrated", case.sizes)]
    for number, (name, sizes) in enumerate(plan):
        if outcome.other_refused and name == "other":
            continue
        try:
            call, wanted = expected(case, sizes, number % CALLS + CALLS * (name == "other"))
        except Invalid:
            continue
        where = f"{stage}, call {number} ({name} size)"
        try:
            result = _attempt(stage, lambda c=call: run(compiled, c))
        except Refused as refusal:
            if name == "calibrated":
                raise
            _check_named(case, refusal)
            outcome.other_refused = str(refusal)
            continue
        if isinstance(result, tuple) != case.in_tuple:
            raise Finding(stage, f"returns a {type(result).__name__}; the module does not")
        result = only_tensor(result)
        if result.shape != wanted.shape or result.dtype != wanted.dtype:
            got = f"{result.dtype}{list(result.shape)}"
            raise Finding(where, f"gives {got}, not {wanted.dtype}{list(wanted.shape)}")
        error = _rel(result, wanted)
        if not error <= BASE:
            noise = noisy(_again(case, call), wanted, case.ranges)
            if not error <= BASE + SLACK * noise:
                raise Finding(where, f"rel {error:.2g}, allowed {BASE + SLACK * noise:.2g}")
            outcome.noise = max(outcome.noise, noise)
        outcome.worst = max(outcome.worst, error)


def _again(case: Case, call: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: only_tensor(run(copy.deepcopy(case.model), call))


def _write_in_place(compiled: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*compiled.parameters(), *compiled.buffers()]:
            tensor.copy_(tensor.clone())


def _check_saved(case: Case, compiled: Any, outcome: Outcome) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        try:
            compiled.save_pretrained(place)
            loaded = fxquant.load(place)
        except ArtifactError as error:
            if compiled.summary.unsaved and any(reason in str(error) for reason in UNSAVED):
                outcome.notes.append(f"not saved: {error}")
                return
            raise Finding("save", f"{type(error).__name__}: {error}") from error
        except Exception as error:
            raise Finding("save", f"{type(error).__name__}: {error}") from error
        _check_served(case, loaded, "serve loaded", outcome, calls=3)
        loaded.load_state_dict({k: v.clone() for k, v in loaded.state_dict().items()})
        _check_served(case, loaded, "serve loaded after load_state_dict", outcome, calls=2)
