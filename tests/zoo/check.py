"""Judge one case: compile, serve at other batches and sizes, save, load, serve again."""

from __future__ import annotations

import itertools
import logging
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ArtifactError, CallError, FxquantError, InvariantError, PassError
from tests.zoo.case import FAILS, ONE_SIZE, REFUSED, UNSAVED, WORKS, Case, Scene, Size, leaves

TIMESTEPS = (900.0, 500.0, 100.0, 800.0, 600.0, 400.0, 200.0, 0.0)  # of calibration calls, in turn
SERVED = 700.0
CALLS = 4  # a program records its first calls and replays the later ones
SAME = 1e-3  # a loaded model may be packed differently, and round elsewhere
PATIENCE = 240  # seconds of computing for a case
CALIBRATING = "insert_observers"  # the last pass before the calibration calls run
INTERNAL = ("bug in", "please report")


@dataclass
class Verdict:
    """What became of a case; errors are relative, L2, against the float model on the same call.

    Attributes:
        rel: of the first call at the calibrated batch and size; `again` of the fourth.
        batch, size: "yes", a named refusal, or "not tried".
        saved: "yes", or what went wrong.
        why: the message behind anything but "works".
        where: the innermost frames of a raw traceback.
    """

    name: str
    kind: str
    outcome: str = FAILS
    rel: float | None = None
    again: float | None = None
    batch: str = "not tried"
    size: str = "not tried"
    saved: str = "not tried"
    why: str = ""
    where: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class WrongError(Exception):
    """The case is judged "fails", for the reason given."""


class SlowError(BaseException):
    """A case took longer than PATIENCE; no `except Exception` on the way may swallow it."""


def judge(case: Case, recipe: str = "w8a8-fast") -> Verdict:
    """Try everything that the table tells about a case; never raises."""
    verdict = Verdict(case.name, case.kind, note=case.note)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _limited(PATIENCE), torch.no_grad():
                _try(case, recipe, verdict)
        except WrongError as failed:
            verdict.outcome, verdict.why = FAILS, f"{verdict.why} {failed}".strip()
        except SlowError:
            verdict.outcome, verdict.why = FAILS, f"took over {PATIENCE} s"
        except Exception as error:  # noqa: BLE001 - a raw traceback is a verdict
            verdict.outcome, verdict.why = FAILS, _said(error)
            verdict.where = _frames(error)
    verdict.seconds = round(time.process_time() - started, 1)
    return verdict


def _try(case: Case, recipe: str, verdict: Verdict) -> None:
    model = case.model()
    scene = Scene(case.batch, case.size, SERVED, 100, case.dtype)
    expected = _run(model, case, scene)
    compiled = _compile(case, model, recipe, verdict)
    if compiled is None:
        return
    _same(_run(model, case, scene), expected, 0.0, "compile() changed the float model")
    verdict.rel = _serve(compiled, model, case, scene, "first call")
    for number in range(2, CALLS + 1):
        later = Scene(case.batch, case.size, SERVED - number, 100 + number, case.dtype)
        verdict.again = _serve(compiled, model, case, later, f"call {number}")
    verdict.batch = _elsewhere(compiled, model, case, case.other_batch, case.size, "other batch")
    verdict.size = _elsewhere(compiled, model, case, case.batch, case.other, "other size")
    verdict.saved = _save(compiled, case, scene)
    refused = [s for s in (verdict.batch, verdict.size) if s not in ("yes", "takes one only")]
    if verdict.saved != "yes":
        verdict.outcome, verdict.why = UNSAVED, "; ".join([verdict.saved, *refused])
        return
    verdict.outcome = ONE_SIZE if refused else WORKS
    verdict.why = "; ".join(refused)


def _compile(case: Case, model: nn.Module, recipe: str, verdict: Verdict) -> nn.Module | None:
    """The compiled model; None, and the verdict filled in, where it was refused by name."""
    times = itertools.islice(itertools.cycle(TIMESTEPS), case.calls)
    scenes = [Scene(case.batch, case.size, t, seed, case.dtype) for seed, t in enumerate(times)]
    calls = [as_call(model, *case.arguments(scene)) for scene in scenes]
    passes: list[str] = []
    started = time.perf_counter()
    try:
        return fxquant.compile(
            model, calls, recipe=recipe, progress=False, on_pass=lambda r: passes.append(r.name)
        )
    except FxquantError as error:
        if isinstance(error, (PassError, InvariantError)) or _internal(error):
            verdict.where = _frames(error)
            raise WrongError(_said(error)) from error
        if CALIBRATING in passes:
            raise WrongError(
                f"refused only after calibration (last pass {passes[-1]}): {error}"
            ) from error
        verdict.outcome, verdict.why = REFUSED, _said(error)
        return None
    finally:
        verdict.compile_seconds = round(time.perf_counter() - started, 1)


def as_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A calibration call as `fxquant.calibration.record` makes it: every argument by its name."""
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _serve(compiled: nn.Module, model: nn.Module, case: Case, scene: Scene, what: str) -> float:
    """The relative error of a call.

    Raises:
        WrongError: it is too large, or the outputs are not alike.
    """
    try:
        got = _run(compiled, case, scene)
    except CallError:
        raise
    except FxquantError as error:
        raise WrongError(f"{what}: {_said(error)}") from error
    return _same(got, _run(model, case, scene), case.tolerance, what)


def _elsewhere(
    compiled: nn.Module,
    model: nn.Module,
    case: Case,
    batch: int | None,
    size: Size | None,
    what: str,
) -> str:
    """Whether it serves there: "yes", or the refusal, which names what is fixed."""
    if batch is None or size is None:
        return "takes one only"
    try:
        _serve(compiled, model, case, Scene(batch, size, SERVED, 200, case.dtype), what)
    except CallError as error:
        return f"{what}: {_said(error)}"
    except WrongError:
        raise
    except Exception as error:
        raise WrongError(f"{what}: {_said(error)} at {' < '.join(_frames(error))}") from error
    return "yes"


def _save(compiled: Any, case: Case, scene: Scene) -> str:
    """ "yes", or the refusal that compile() announced."""
    expected = _run(compiled, case, scene)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save_pretrained(folder)
            loaded = fxquant.load(folder)
            got = _run(loaded, case, scene)
        except Exception as error:
            if isinstance(error, ArtifactError) and compiled.origin.problem:
                return _said(error)
            where = "" if isinstance(error, FxquantError) else f" at {' < '.join(_frames(error))}"
            raise WrongError(f"saving and loading: {_said(error)}{where}") from error
        _same(got, expected, SAME, "the loaded model")
    return "yes"


def _run(model: nn.Module, case: Case, scene: Scene) -> list[Tensor]:
    args, kwargs = case.arguments(scene)
    return leaves(model(*args, **kwargs))


def _same(got: list[Tensor], expected: list[Tensor], tolerance: float, what: str) -> float:
    """The relative L2 error over all outputs together."""
    shapes, wanted = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
    if shapes != wanted:
        raise WrongError(f"{what}: outputs of shapes {shapes}, expected {wanted}")
    flat, right = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (got, expected))
    error = float((flat - right).norm() / right.norm())
    if not error <= tolerance:
        worst = [
            round(float((g.double() - e.double()).norm() / e.double().norm()), 4)
            for g, e in zip(got, expected, strict=True)
        ]
        raise WrongError(f"{what}: rel {error:.4g} (allowed {tolerance:g}), by output {worst[:6]}")
    return round(error, 5)


def _internal(error: BaseException) -> bool:
    return any(sign in str(error) for sign in INTERNAL)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _frames(error: BaseException) -> list[str]:
    """The innermost frames of the error that first went wrong, and fxquant's own innermost one."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    frames = [
        f"{f.filename.split('site-packages/')[-1].split('/wt/')[-1]}:{f.lineno} {f.name}"
        for f in traceback.extract_tb(root.__traceback__)
    ]
    ours = [f for f in frames if "fxquant/" in f or "passes/" in f or "kernels/" in f][-2:]
    return [*(["root: " + _said(root)[:300]] if root is not error else []), *ours, *frames[-2:]]


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise SlowError

    old: Callable[..., object] | int | None = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the machine may have other things to do
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def quiet() -> None:
    """Less of what diffusers and torch say about models as small as these."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
