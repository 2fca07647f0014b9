"""Reconstruction: unit by unit, make the quantised model's results those of the float model.

For each unit in execution order: its inputs are computed twice, by the quantised prefix (units
before it already trained) and by the float model; its float results are the targets; it is
optimised; its weights are put on the integer grid.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.bind import bound, folded
from fxquant.graph.interpret import Watched
from fxquant.graph.nodes import attribute, is_random, note, set_buffer
from fxquant.graph.runner import clone, source_line
from fxquant.graph.samples import has_samples
from fxquant.graph.specialise import device_of, specialise
from fxquant.logs import progress
from fxquant.quant.adaround import Rounding
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.quant.table import ActivationTable
from fxquant.reconstruction.cache import Cache, row_bytes
from fxquant.reconstruction.checkpoint import Checkpoints, Trained, UnitReport
from fxquant.reconstruction.optimise import (
    OnIter,
    UnitData,
    UnitGraphs,
    dropped_fake_quantize,
    optimise,
)
from fxquant.reconstruction.settings import Reconstruction
from fxquant.reconstruction.stream import Samples, Stream, for_each
from fxquant.reconstruction.subgraph import Unit, all_units, extract

log = logging.getLogger(__name__)

_INNER_SHARE = 0.25  # of the memory budget, for the targets of a unit's inner layers
_UNIT_SEEDS = 10_007


@dataclass(frozen=True)
class Reconstructed:
    """What came of it.

    Attributes:
        graph: with weights on the integer grid.
        table: with learned steps.
        units: what training did to each.
        cached_bytes: the most activations that were held in memory at a time.
    """

    graph: GraphModule
    table: ActivationTable
    units: tuple[UnitReport, ...]
    cached_bytes: int


def reconstruct(
    graph: GraphModule,
    table: ActivationTable,
    samples: Samples,
    settings: Reconstruction,
    *,
    seed: int = 0,
    memory_budget: int | None = None,
    time_budget: float | None = None,
    checkpoints: Checkpoints | None = None,
    show: bool = False,
) -> Reconstructed:
    """Train every unit of a fake-quant graph.

    Args:
        graph: after group_units; not changed.
        table: calibrated activation parameters; not changed.
        samples: what the units are trained on.
        seed: each unit draws from a generator of its own, seeded with this and its number.
        memory_budget: bytes of cached activations held in memory, the rest goes to temporary
            files, beside the checkpoints if there are any; by default `default_budget()`.
        time_budget: seconds for all units; iterations are cut short to meet it.
        checkpoints: written after every unit; units that it holds already are not trained again.
        show: a progress bar with the time left.
    """
    budget = default_budget() if memory_budget is None else memory_budget
    with Cache(budget, checkpoints.folder if checkpoints else None) as cache:
        run = _Run(graph, samples, settings, cache)
        values, reports = table.values.clone().to(device_of(graph)), list[UnitReport]()
        clock = None if time_budget is None else _TimeBudget(time_budget, run.costs(values))
        with progress(what="reconstruct", unit="it", total=run.iterations, show=show) as bar:
            for number, unit in enumerate(run.units):
                run.advance(unit, values)
                finished = checkpoints.read(number, unit.path) if checkpoints else None
                if finished is None:
                    seconds = clock.share(number) if clock else None
                    with _seeded((seed * _UNIT_SEEDS + number) % 2**63, values.device):
                        finished = run.train(unit, values, seconds, bar.update)
                    if checkpoints:
                        checkpoints.write(number, finished)
                else:
                    bar.update(finished.report.iters)
                values = finished.table.to(values.device)
                run.bind(finished.tensors)
                reports.append(finished.report)
                log.info("%s", finished.report)
        learned = ActivationTable(values.to(table.values.device), table.timesteps, table.groups)
        return Reconstructed(run.rebound(graph), learned, tuple(reports), cache.peak)


class _Run:
    """The two models side by side, advanced together, and how a unit of theirs is trained."""

    def __init__(
        self, graph: GraphModule, samples: Samples, settings: Reconstruction, cache: Cache
    ):
        self.samples, self.settings, self.cache = samples, settings, cache
        self.trained = folded(specialise(bound(graph, samples.shared), samples.tensors))
        self.units, others = all_units(self.trained, by_layer=settings.loss == "layer")
        _tell(self.trained, others)
        self.float_graph = bypassed(self.trained)
        self.quantised = Stream(self.trained, samples, cache, settings.batch)
        self.floats = Stream(self.float_graph, samples, cache, settings.batch)
        self._learned: dict[str, Tensor] = {}

    @property
    def iterations(self) -> int:
        """Optimiser steps of all units."""
        phases = 1 if self.settings.order == "joint" else 2
        return len(self.units) * phases * self.settings.iters

    def advance(self, unit: Unit, table: Tensor) -> None:
        """Compute the unit's inputs in both models."""
        names = [n.name for n in unit.inputs]
        self.quantised.advance(names, table)
        self.floats.advance(names, table)

    def train(self, unit: Unit, table: Tensor, seconds: float | None, on_iter: OnIter) -> Trained:
        """Optimise the unit, whose inputs the streams hold."""
        weights = [self._rounding(node) for node in unit.weights]
        graphs = UnitGraphs(
            extract(self.trained, unit, dropped_fake_quantize, self.settings.drop),
            extract(self.trained, unit, fake_quantize),
            extract(self.trained, unit, None),
        )
        targets = _Targets(self, unit, graphs.floats, table)
        data = UnitData(
            [self.quantised[n.name] for n in unit.inputs],
            [self.floats[n.name] for n in unit.inputs],
            [_is_mixed(n) for n in unit.inputs],
            targets,
            self.samples.rows,
            len(unit.outputs),
        )
        result = optimise(
            graphs, data, weights, table, unit.quantisers, self.settings,
            seconds=seconds, on_iter=on_iter,
        )  # fmt: skip
        names = [_name(n.args[0]) for n in unit.weights]
        # Contiguous like those read from a checkpoint: the layout decides a convolution's last bit.
        tensors = {n: w.contiguous() for n, w in zip(names, result.weights, strict=True)}
        targets.drop()
        report = UnitReport(
            unit.path,
            unit.kind,
            result.loss_before,
            result.loss_after,
            result.settled,
            result.iters,
            result.seconds,
        )
        return Trained(tensors, result.table, report)

    def float_weights(self, unit: Unit) -> list[Tensor]:
        """The unit's weights in the float model."""
        return [attribute(self.float_graph, _name(n.args[0])).detach() for n in unit.weights]

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the quantised model what a unit learned."""
        for name, value in tensors.items():
            self._learned[name] = value.to(attribute(self.trained, name))
            set_buffer(self.trained, name, self._learned[name])

    def rebound(self, graph: GraphModule) -> GraphModule:
        """A clone of the graph with all that was learned."""
        result = clone(graph)
        for name, value in self._learned.items():
            set_buffer(result, name, value)
        return result

    def costs(self, table: Tensor) -> list[float]:
        """Seconds that a batch takes in each unit of the float model, measured once."""
        owner = {n.name: k for k, unit in enumerate(self.units) for n in unit.nodes}
        seconds = [0.0] * len(self.units)
        last = time.perf_counter()

        def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
            nonlocal last
            now = time.perf_counter()
            if node.name in owner:
                seconds[owner[node.name]] += now - last
            last = now

        index = torch.arange(min(self.settings.batch, len(self.samples)))
        tensors = [t[index].to(table.device) for t in self.samples.tensors]
        with torch.no_grad():
            Watched(self.float_graph, see).run(*tensors, table[self.samples.rows[index]])
        return seconds

    def _rounding(self, node: Node) -> Rounding:
        weight, scale, bits = node.args
        assert isinstance(bits, int)
        value = attribute(self.float_graph, _name(weight))
        return Rounding.of(value, attribute(self.trained, _name(scale)), bits)


class _Targets:
    """The float model's results of a unit: outputs cached; inner layers cached where they fit.

    The rule for inner layers reads the budget and not the memory in use, so that an interrupted
    run decides alike when it resumes.
    """

    def __init__(self, run: _Run, unit: Unit, floats: GraphModule, table: Tensor):
        self._run, self._unit, self._floats, self._table = run, unit, floats, table
        self._weights = run.float_weights(unit)
        self._outputs = len(unit.outputs)
        batch = torch.arange(min(run.settings.batch, len(run.samples)))
        probe = self._compute(batch)
        inner = sum(row_bytes(t, len(batch)) for t in probe[self._outputs :]) * len(run.samples)
        self._whole = run.settings.loss != "fbr" or inner <= _INNER_SHARE * run.cache.budget
        kept = len(probe) if run.settings.loss == "fbr" and self._whole else self._outputs
        self._shared = [not has_samples(n) for n in (*unit.outputs, *unit.inner)]
        self._stored = [
            run.cache.new(len(run.samples), value, len(batch), is_shared)
            for value, is_shared in zip(
                self._by_sample(probe[:kept], batch), self._shared, strict=False
            )
        ]
        for index in torch.arange(len(run.samples)).split(run.settings.batch):
            values = self._by_sample(self._compute(index)[:kept], index)
            for stored, value in zip(self._stored, values, strict=True):
                stored.write(int(index[0]), value)

    def __call__(self, index: Tensor, outputs_only: bool = False) -> list[Tensor]:
        kept = self._stored[: self._outputs] if outputs_only else self._stored
        found = [stored[index].to(self._table.device) for stored in kept]
        if self._whole or outputs_only:
            return found
        return [*found, *self._compute(index)[self._outputs :]]

    def _by_sample(self, values: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        return [
            for_each(value, len(index)) if is_shared else value
            for value, is_shared in zip(values, self._shared, strict=False)
        ]

    def drop(self) -> None:
        """Give the memory back."""
        for stored in self._stored:
            self._run.cache.drop(stored)

    @torch.no_grad()
    def _compute(self, index: Tensor) -> Sequence[Tensor]:
        device = self._table.device
        inputs = [self._run.floats[n.name][index].to(device) for n in self._unit.inputs]
        row = self._table[self._run.samples.rows[index].to(device)]
        return self._floats(*inputs, row, *self._weights)


class _TimeBudget:
    """Shares of a time budget by what units cost; time that one leaves goes to those after it."""

    def __init__(self, seconds: float, costs: Sequence[float]):
        self._end = time.perf_counter() + seconds
        self._costs = [max(1e-9, cost) for cost in costs]

    def share(self, number: int) -> float:
        """Seconds for this unit, caching included in what is left to the others."""
        left = max(0.0, self._end - time.perf_counter())
        return left * self._costs[number] / sum(self._costs[number:])


def bypassed(graph: GraphModule) -> GraphModule:
    """The float model: the fake-quant graph without its fake-quant nodes."""
    gm = clone(graph)
    for node in list(gm.graph.nodes):
        if node.target in (fake_quantize, fake_quantize_weight):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _tell(graph: GraphModule, others: Sequence[Unit]) -> None:
    """What the user should know before it starts."""
    if others:
        log.warning(
            "not reconstructed, their weights are rounded to nearest: %s. They read or compute "
            "what all samples of a batch have together, and units are trained sample by sample",
            ", ".join(unit.path or unit.kind for unit in others),
        )
    drawing = [node for node in graph.graph.nodes if is_random(node)]
    if drawing:
        log.warning(
            "the model draws random numbers (%s), and the reconstruction compares units of its "
            "quantised and its float version with different draws: what follows them is trained "
            "on noise. An effort of 'fast' does without",
            ", ".join(source_line(node) or f"%{node.name}" for node in drawing[:3]),
        )


def _is_mixed(node: Node) -> bool:
    """Feature maps are; what depends on the timestep alone, vectors and model inputs are not."""
    feature = node.op != "placeholder" and node.meta["val"].ndim > 2
    return feature and not note(node, "timestep_only")


def _name(attribute_node: Any) -> str:
    """The dotted name that a get_attr node reads."""
    assert isinstance(attribute_node, Node)
    return str(attribute_node.target)


def default_budget() -> int:
    """A quarter of the memory of the machine, or of the container that this runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) // 4 if text.isdecimal() else total // 4


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
