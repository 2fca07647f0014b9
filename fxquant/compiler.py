"""compile(): the whole story, in order; load(): its last chapter, for a saved model."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import logs
from fxquant.calibration.calls import read_calls, timesteps_of
from fxquant.calibration.observe import observe
from fxquant.calibration.trajectories import SelectedCalls
from fxquant.errors import (
    ArtifactError,
    BackendError,
    CallError,
    CaptureError,
    PassError,
    near,
)
from fxquant.graph import runner
from fxquant.graph.capture import DifferentWaysError, capture_calls, check_module, formed
from fxquant.graph.dumps import CAPTURE, OnPass, dumping
from fxquant.graph.explain import fallbacks, refuse
from fxquant.graph.faithful import Comparison, same_draws
from fxquant.graph.faithful import error as error_of
from fxquant.graph.finite import check_finite
from fxquant.graph.options import Options
from fxquant.graph.results import Result
from fxquant.graph.runner import Record
from fxquant.graph.signature import Signature
from fxquant.graph.specialise import device_of
from fxquant.graph.switches import warn_of_switches
from fxquant.graph.unwrap import unwrap
from fxquant.kernels.cuda import build
from fxquant.kernels.dispatch import BACKENDS
from fxquant.kernels.machine import Machine, detect
from fxquant.passes import pipelines
from fxquant.quant.table import ActivationTable
from fxquant.recipe import Recipe
from fxquant.reconstruction.checkpoint import UnitReport
from fxquant.reconstruction.training import Training, train
from fxquant.runtime.artifact import origin_of, read
from fxquant.runtime.face import face_of
from fxquant.runtime.model import QuantizedModel, class_for
from fxquant.runtime.outputs import output_class, output_for
from fxquant.runtime.pack import pack_weights
from fxquant.runtime.placement import place
from fxquant.runtime.summary import Summary, size_in_bytes, summarise

log = logging.getLogger(__name__)

_LARGE_ERROR = 0.5


def compile(  # noqa: A001 - the name users expect, as in torch.compile
    model: nn.Module,
    calib_loader: Iterable[Any],
    recipe: str | Path | Recipe = "w8a8-fast",
    backend: str = "auto",
    progress: bool = True,
    seed: int = 0,
    strict: bool = False,
    on_pass: OnPass | None = None,
    dynamic: bool = True,
    iters: int | None = None,
    time_budget: float | None = None,
    memory_budget: int | None = None,
    resume: str | Path | None = None,
) -> QuantizedModel:
    """Quantise a diffusers UNet to integer arithmetic.

    Args:
        model: a UNet2DModel, UNet2DConditionModel or any module torch.export takes; unchanged. What
            is returned runs where the model is.
        calib_loader: an iterable of UNet calls, dicts or tuples of forward's arguments: a
            DataLoader, a list, a generator, or what fxquant.calibration.record took from a
            sampler run. Calls that cover the timesteps and conditions you will serve work best.
        recipe: a name, [method:]bits[-effort], a Recipe, or the path of a recipe file (.json).
        backend: "auto", or one kernel family: "x86", "cuda", "reference".
        progress: show bars for what takes over two seconds, if standard error is a terminal.
        seed: of everything random during calibration and reconstruction.
        strict: refuse instead of running anything on a slower path than planned.
        on_pass: called with a record of every pass, for dumps.
        dynamic: False for a model that only takes the sizes of the calibration calls, batch
            included. By default every size is free that the module itself leaves free.
        iters: optimiser steps of every unit, instead of the recipe's.
        time_budget: seconds for the reconstruction; iterations are cut short to meet it.
        memory_budget: bytes of cached activations that the reconstruction holds in memory; the
            rest goes to temporary files. By default a quarter of the machine's memory.
        resume: a folder that keeps every finished unit. Interrupted, the same call goes on from
            there and ends with the same model, to the bit if machine, threads and versions are
            the same and there is no time_budget.

    Returns:
        A module with the same signature, config and dtype. `print(result.summary)` tells what
        became integer, what stayed float and why, and which kernels run it.

    Raises:
        CaptureError, CallError, LoaderError, RecipeError, BackendError, FallbackError,
            CheckpointError: see fxquant.errors.
    """
    training = Training(iters, time_budget, memory_budget, resume)
    recipe = training.apply(Recipe.parse(recipe))
    check_module(model)
    model = unwrap(model)
    device = device_of(model)
    options = Options(recipe, detect(str(device)), check_backend(backend), device.type, progress)
    logs.configure()
    warn_of_switches(model)
    on_pass = dumping(on_pass)
    clock = logs.Clock()
    signature, calls = read_calls(calib_loader, model)
    with _seeded(seed, device):
        quantised = fake_quantise(model, signature, calls, options, clock, on_pass, dynamic)
    signature = quantised.signature
    calls = [signature.reformed(call) for call in calls]
    units: tuple[UnitReport, ...] = ()
    notes = quantised.table.notes
    if recipe.reconstruction:
        with clock("reconstruct"):
            done = train(
                quantised.graph,
                quantised.table,
                signature,
                calls,
                recipe,
                training,
                seed=seed,
                selected=isinstance(calib_loader, SelectedCalls),
                show=progress,
            )
        quantised = dataclasses.replace(quantised, graph=done.graph, table=done.table)
        units = done.units
    with clock("lower"):
        lowered = runner.run(pipelines.LOWER, quantised.graph, options, on_pass=on_pass)
    with clock("bind"):
        bound, slow = bind(lowered, options, strict, on_pass)
        place(bound, device)
    original: Any = type(model)
    origin = origin_of(
        lowered, bound, original, signature, len(calls), timesteps_of(signature, calls)
    )
    if origin.problem:
        log.warning("this model will serve, but save_pretrained will refuse it: %s", origin.problem)
    sizes = size_in_bytes(model)
    compiled = class_for(original)(
        bound,
        quantised.table,
        signature,
        recipe=recipe,
        summary=summarise(
            bound, sizes, recipe.name, slow, clock.seconds, units, notes, unsaved=origin.problem
        ),
        config=getattr(model, "config", None),
        output=quantised.output or output_class(original, signature),
        origin=origin,
        face=face_of(model),
    )
    if quantised.expected is not None:
        with clock("try"):
            compiled.summary = _tried(compiled, calls[0], quantised.expected)
    return compiled


def _tried(model: QuantizedModel, call: Sequence[Tensor], expected: Result) -> Summary:
    """The summary with the error that the model really has, on the first calibration call."""
    with same_draws():
        result = model.run([tensor.to(model.device) for tensor in call])
    found = error_of(result, expected)
    if not found <= _LARGE_ERROR:
        log.warning(
            "on the first calibration call the compiled model's relative error is %.2g: what it "
            "computes is hardly the module's result. `fxquant bisect` shows where it comes from; "
            "more bits, keep_float for the worst layers or timestep_groups make it smaller",
            found,
        )
    return dataclasses.replace(model.summary, error=found)


@torch.inference_mode(mode=False)  # kernels ask weights how often they changed
def load(
    folder: str | Path,
    backend: str = "auto",
    strict: bool = False,
    on_pass: OnPass | None = None,
    device: str | torch.device = "cpu",
) -> QuantizedModel:
    """A model that `QuantizedModel.save_pretrained` wrote, fitted to this machine.

    Nothing in the folder is executed or unpickled. Integer weights are mapped, packed for their
    kernels one by one, and left in the file: do not write into the files while the model lives
    (saving there is fine, it replaces them).

    Args:
        folder: where it was saved; on any machine, for any backend.
        backend, strict, on_pass: as for `compile`.
        device: where it will run: "cpu", "cuda", "cuda:1".

    Raises:
        ArtifactError: not a saved model, or damaged, foreign or newer; names the file and field.
        BackendError, FallbackError: see `compile`; or there is no such device.
    """
    check_backend(backend)
    device = check_device(device)
    logs.configure()
    on_pass = dumping(on_pass)
    clock = logs.Clock()
    with clock("read"):
        saved = read(folder)
    options = Options(saved.recipe, detect(str(device)), backend, device.type)
    with clock("bind"):
        try:
            bound, slow = bind(saved.graph, options, strict, on_pass)
        except PassError as error:
            raise ArtifactError(f"{folder}: the graph cannot be bound: {error}") from error
    with clock("pack weights"):
        place(bound, device)
        pack_weights(bound, saved.release)
    original: Any = saved.original
    return (class_for(original) if original else QuantizedModel)(
        bound,
        saved.table.to(device),
        saved.signature,
        recipe=saved.recipe,
        summary=summarise(bound, saved.bytes_before, saved.recipe.name, slow, clock.seconds),
        config=saved.config,
        output=output_class(original, saved.signature) if original else output_for(saved.signature),
        origin=saved.origin,
        owned=True,
    )


def bind(
    lowered: GraphModule, options: Options, strict: bool = False, on_pass: OnPass | None = None
) -> tuple[GraphModule, dict[str, str]]:
    """Fit a lowered graph to a machine: the dtype of float parts and a kernel for every operator.

    Returns:
        The graph that runs, and its unplanned fallbacks: why, by node name.

    Raises:
        FallbackError: `strict` and there are such fallbacks.
    """
    bound = runner.run(pipelines.BIND, lowered, options, on_pass=on_pass)
    slow = fallbacks(bound, options)
    if options.device == "cuda":
        _note_missing_kernels(options.machine)
    if strict:
        refuse(slow)
    return bound, slow


def _note_missing_kernels(machine: Machine) -> None:
    """One notice for a GPU whose kernels are not built, or do not exist."""
    if machine.cuda and not machine.cuda_kernels:
        how = f"`{build.command(machine.cuda)}` builds them; then start again."
        log.warning(
            "no kernels are built for this GPU: slower ones of PyTorch are used. %s",
            build.why_not(machine.cuda) or how,
        )


@dataclass(frozen=True)
class FakeQuantised:
    """The simulated model: a float graph that takes flat tensors and rows of the table.

    Attributes:
        signature: with the sizes and the form of timestep that the graph takes.
        output: the class of what the module returns, None for tensors, tuples, lists and dicts.
        expected: the module's own result for the first call.
    """

    graph: GraphModule
    table: ActivationTable
    signature: Signature
    output: type[Any] | None = None
    expected: Result | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Result:
        """Run it; every sample uses the row of its own timestep."""
        index = self.signature.timestep_index
        rows = self.table.row(0) if index is None else self.table.rows(tensors[index])
        return self.graph(*tensors, rows)


def fake_quantise(
    model: nn.Module,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    options: Options,
    clock: logs.Clock | None = None,
    on_pass: OnPass | None = None,
    dynamic: bool = True,
) -> FakeQuantised:
    """capture, prepare, annotate, observe, fake-quant, group.

    The float graph is run beside the module, and a form of the timestep with which it computes
    something else is not the one that the module takes.

    Args:
        signature, calls: as `read_calls` gives them.
        on_pass: gets a record of capture, too.
    """
    clock = clock or logs.Clock()
    check_finite(model)
    failure: CaptureError | CallError | None = None
    for form in formed(signature):
        try:
            given = [form.reformed(call) for call in calls]
            observed = _observed(model, form, given, options, clock, on_pass, dynamic)
        except (CaptureError, CallError) as error:
            if isinstance(error, DifferentWaysError) and str(error) == str(failure):
                break  # it has nothing to do with the timestep
            failure = failure or error
            continue
        with clock("quantise weights"):
            graph = runner.run(pipelines.FAKE_QUANT, observed.graph, options, on_pass=on_pass)
        return dataclasses.replace(observed, graph=graph)
    assert failure is not None
    raise failure


def _observed(
    model: nn.Module,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    options: Options,
    clock: logs.Clock,
    on_pass: OnPass | None,
    dynamic: bool,
) -> FakeQuantised:
    """The observed graph instead of the fake-quantised one, and the ranges that were seen."""
    with clock("capture"):
        started = time.perf_counter()
        device = device_of(model)
        captured = capture_calls(
            model, signature, [[t.to(device) for t in call] for call in calls], dynamic
        )
        seconds = time.perf_counter() - started
        graph = captured.graph_module
        if on_pass:
            on_pass(Record(CAPTURE, seconds, (0, len(graph.graph.nodes)), graph))
        floats = runner.run(pipelines.PREPARE, graph, options, on_pass=on_pass)
        graph = runner.run(pipelines.OBSERVE, floats, options, on_pass=on_pass)
    with clock("calibrate"):
        compare = Comparison(model, captured.signature, floats)
        recipe = options.recipe
        table = observe(
            graph, captured.signature, calls, recipe.timestep_groups, options.progress, compare
        )
    return FakeQuantised(graph, table, compare.signature, captured.output, compare.expected)


def check_backend(backend: str) -> str:
    """Raises BackendError for an unknown backend."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}.{near(backend, BACKENDS)}")
    return backend


def check_device(device: str | torch.device) -> torch.device:
    """Raises BackendError for a device that is not there, or that nothing here runs on."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"device={device!r} is not a device: {error}") from error
    if found.type not in ("cpu", "cuda"):
        raise BackendError(f"models run on cpu and cuda, not on {found.type}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device={str(device)!r}: PyTorch sees {torch.cuda.device_count()} GPUs here. "
            "`fxquant doctor` shows the machine; a CPU build of PyTorch sees none"
        )
    index = torch.cuda.current_device() if found.type == "cuda" and found.index is None else None
    return torch.device("cuda", index) if index is not None else found


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
