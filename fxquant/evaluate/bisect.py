"""Where the error to the float model comes from: which pass, which unit, which timestep.

Errors are relative L2, ||x - float|| / ||float||, on equal inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.errors import PassError
from fxquant.evaluate.metrics import relative_l2
from fxquant.graph.nodes import attribute, note
from fxquant.graph.results import joined
from fxquant.graph.runner import Record
from fxquant.logs import progress
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.quant.table import ActivationTable


@dataclass(frozen=True)
class AfterPass:
    """The model's error after one pass, and by how much that is more than before the pass."""

    name: str
    error: float
    jump: float


def errors_after_passes(
    records: Sequence[Record],
    truth: Tensor,
    tensors: Sequence[Tensor],
    table: ActivationTable,
    group: int = 0,
    show: bool = False,
) -> list[AfterPass]:
    """Run every graph between passes on one call.

    Args:
        records: of capture and the passes, in order.
        truth: the float model's output on the call.
        tensors: the call's flat inputs, all of timesteps that use row `group` of the table.

    Raises:
        PassError: the graph that a pass left does not run; names the pass.
    """
    lines: list[AfterPass] = []
    for record in progress(records, "passes", "pass", show=show):
        error = relative_l2(_output(record, tensors, table, group), truth)
        before = lines[-1].error if lines else 0.0
        lines.append(AfterPass(record.name, error, error - before))
    return lines


def _output(
    record: Record, tensors: Sequence[Tensor], table: ActivationTable, group: int
) -> Tensor:
    try:
        with torch.no_grad():
            return joined(record.graph(*tensors, *_extra(record.graph, tensors, table, group)))
    except Exception as error:
        raise PassError(
            f"the graph that {record.name} left does not run: {type(error).__name__}: {error}. "
            f"`fxquant diff MODEL --after {record.name}` shows what the pass did"
        ) from error


def _extra(
    gm: GraphModule, tensors: Sequence[Tensor], table: ActivationTable, group: int
) -> list[Tensor]:
    """What the graph takes besides the call's tensors, which depends on its stage."""
    last = [n.name for n in gm.graph.nodes if n.op == "placeholder"][len(tensors) :]
    values = {"group": torch.full((tensors[0].shape[0],), group), "row": table.row(group)}
    return [values[name] for name in last]


@dataclass(frozen=True)
class UnitError:
    """Error at the output of one unit.

    Attributes:
        path, kind: module path and class of the unit.
        cumulative: everything up to here is fake-quantised.
        isolated: only this unit is, on float inputs.
    """

    path: str
    kind: str
    cumulative: float
    isolated: float


def unit_errors(fake: GraphModule, tensors: Sequence[Tensor], row: Tensor) -> list[UnitError]:
    """The error of every unit's output, in execution order.

    Args:
        fake: the fake-quant graph after group_units.
        tensors: flat inputs of one call.
        row: [n, 2] activation parameters.
    """
    units = _units(fake)
    keep = {n for unit in units for n in (*unit.inputs, *unit.outputs)}
    exact = run_simulated(fake, (*tensors, row), keep, quantise=False)
    simulated = run_simulated(fake, (*tensors, row), keep, quantise=True)
    lines = []
    for unit in units:
        truth = _joined(exact, unit.outputs)
        alone = _joined(_run_unit(fake, unit, exact), unit.outputs)
        cumulative = relative_l2(_joined(simulated, unit.outputs), truth)
        lines.append(UnitError(unit.path, unit.kind, cumulative, relative_l2(alone, truth)))
    return lines


@dataclass(frozen=True)
class _Unit:
    path: str
    kind: str
    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]


def _units(gm: GraphModule) -> list[_Unit]:
    members: dict[tuple[str, str], list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and (unit := note(node, "unit")):
            members.setdefault((unit[0], unit[1]), []).append(node)
    position = {node: k for k, node in enumerate(gm.graph.nodes)}
    finished = sorted(members.items(), key=lambda item: position[item[1][-1]])
    return [_unit(path, kind, nodes) for (path, kind), nodes in finished]


def _unit(path: str, kind: str, nodes: list[Node]) -> _Unit:
    inside = set(nodes)
    read = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
    inputs = [n for n in read if n.op != "get_attr"]
    outputs = [n for n in nodes if isinstance(n.meta["val"], Tensor) and set(n.users) - inside]
    return _Unit(path, kind, nodes, inputs, outputs)


def run_simulated(
    gm: GraphModule,
    inputs: Sequence[Tensor],
    keep: set[Node],
    quantise: bool,
    reduce: Callable[[Any], Any] = lambda value: value,
) -> dict[Node, Any]:
    """`reduce` of the values of the nodes in `keep`.

    `quantise=False` makes the float model of a fake-quant graph.
    """
    runner = _Simulated(gm, keep, quantise, reduce)
    with torch.no_grad():
        runner.run(*inputs)
    return runner.kept


class _Simulated(Interpreter):
    def __init__(
        self, gm: GraphModule, keep: set[Node], quantise: bool, reduce: Callable[[Any], Any]
    ):
        super().__init__(gm)
        self.keep, self.quantise, self.reduce = keep, quantise, reduce
        self.kept: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        if not self.quantise and n.target in (fake_quantize, fake_quantize_weight):
            value = self.env[n.args[0]]  # type: ignore[index]
        else:
            value = super().run_node(n)
        if n in self.keep:
            self.kept[n] = self.reduce(value)
        return value


def _run_unit(gm: GraphModule, unit: _Unit, values: dict[Node, Any]) -> dict[Node, Any]:
    """Values of the unit's nodes, quantised, on the given values of its inputs."""
    made = {n: values[n] for n in unit.inputs}

    def value(node: Node) -> Any:
        return attribute(gm, str(node.target)) if node.op == "get_attr" else made[node]

    with torch.no_grad():
        for node in unit.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            assert callable(node.target)
            made[node] = node.target(*args, **kwargs)
    return made


def _joined(values: dict[Node, Any], nodes: Sequence[Node]) -> Tensor:
    return torch.cat([values[n].reshape(-1) for n in nodes])


def activation_ranges(fake: GraphModule, tensors: Sequence[Tensor], row: Tensor) -> Tensor:
    """[n, 2] lowest and highest float value that each quantiser would meet in this call."""
    quantisers = _quantisers(fake)
    found = torch.zeros(row.shape[0], 2)
    ranges = run_simulated(fake, (*tensors, row), set(quantisers), False, torch.aminmax)
    for node, (low, high) in ranges.items():
        found[quantisers[node]] = torch.stack([low, high])
    return found


def quantiser_units(fake: GraphModule) -> list[str]:
    """The unit's path of each quantiser, by index."""
    paths = {k: str((note(n, "unit") or [n.name])[0]) for n, k in _quantisers(fake).items()}
    return [paths[k] for k in range(len(paths))]


def _quantisers(fake: GraphModule) -> dict[Node, int]:
    """The fake-quant nodes of activations and their indices."""
    found = {}
    for node in fake.graph.nodes:
        if node.target is fake_quantize:
            found[node] = node.args[2]
    return found
