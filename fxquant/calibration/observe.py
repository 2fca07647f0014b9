"""Runs the calibration calls through an observed graph, and settles the ranges that were seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant import logs
from fxquant.calibration.calls import timesteps_of
from fxquant.errors import RecipeError
from fxquant.graph.faithful import Comparison
from fxquant.graph.nodes import attribute, module_path
from fxquant.graph.signature import Signature
from fxquant.graph.specialise import device_of
from fxquant.graph.stages import OBSERVERS
from fxquant.quant.observers import ObservedEdge
from fxquant.quant.ranges import judge, tell
from fxquant.quant.table import ActivationTable, contiguous_groups, settle


def observe(
    graph: GraphModule,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    groups: int,
    progress: bool = False,
    compare: Comparison | None = None,
) -> ActivationTable:
    """Run the calibration calls through an observed graph and settle the ranges.

    The distinct timesteps of the calls are split into `groups` contiguous groups, a table row each.

    Args:
        compare: is shown every call and a function that runs the graph on it.
    """
    timesteps = timesteps_of(signature, calls)
    distinct, rows = contiguous_groups(timesteps or [0.0], groups)
    if groups > len(distinct):
        raise RecipeError(f"timestep_groups={groups}, but {_too_few(len(set(timesteps)))}")
    lookup = ActivationTable(torch.zeros(groups, 0, 2), distinct, rows)
    device = device_of(graph)
    index, times = signature.timestep_index, list[float]()
    for call in logs.progress(calls, "calibrate", "call", show=progress):
        t = call[index].cpu() if index is not None else torch.zeros(1)
        if t.numel() == 1:
            t = t.reshape(-1).expand(call[0].shape[0])  # one for each sample
        times += t.tolist()
        group = lookup.group(t)
        inputs = [*(tensor.to(device) for tensor in call), group.to(device)]
        with torch.no_grad():
            if compare:
                compare(call, functools.partial(graph, *inputs))
            else:
                graph(*inputs)
    edges = observed_edges(graph)
    notes = judge(
        dict(zip(edge_names(graph), edges, strict=True)),
        [] if index is None else times,
        lookup.group(torch.tensor(times)).tolist(),
    )
    tell(notes)
    table = settle(edges, distinct, rows).to(device)
    table.notes = notes
    return table


def _too_few(timesteps: int) -> str:
    """Why these timesteps do not make the groups that were asked for, and what would do."""
    if not timesteps:
        return "the model has no timestep: set timestep_groups=1"
    return (
        f"the calls have {timesteps} distinct timesteps: calibrate on more of them, or set "
        f"timestep_groups={timesteps}"
    )


def observed_edges(graph: GraphModule) -> list[ObservedEdge]:
    """The graph's observers in the order of their indices."""
    count = sum(1 for n in graph.graph.nodes if n.op == "call_module")
    return [attribute(graph, f"{OBSERVERS}.{k}") for k in range(count)]


def edge_names(graph: GraphModule) -> list[str]:
    """What users know the observed edges by, in the order of their indices."""
    names: dict[int, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            index = int(str(node.target).rpartition(".")[2])
            source = getattr(node.args[0], "name", "")
            names[index] = f"the input %{source} of {module_path(node) or 'the model'}"
    return [names[index] for index in sorted(names)]
