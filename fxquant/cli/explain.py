"""Say for every operator which kernels were considered and which was taken, or why it is float.

Nothing is calibrated and no weights are read: the plan is a function of architecture, recipe and
machine. Multiply-accumulates are those of one image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.calibration.calls import read_calls
from fxquant.calibration.example import example_call
from fxquant.cli.model import add_model_arguments, load_model
from fxquant.cli.output import show_json, show_table
from fxquant.compiler import check_backend
from fxquant.errors import ModelError, near
from fxquant.evaluate.coverage import Row, coverage, macs, parameters, sizes
from fxquant.graph import runner
from fxquant.graph.capture import capture_flat
from fxquant.graph.explain import MOVES, TAKEN, Explanation, explain, fallbacks, refuse
from fxquant.graph.options import Options
from fxquant.kernels.machine import PRESETS, Machine, detect
from fxquant.passes import pipelines
from fxquant.recipe import Recipe

EXAMPLE = "fxquant explain digits mid_block.resnets.0 --recipe w4a8-fast"
_NAMES = 4  # examples of nodes in a row that stands for many


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "node", metavar="NODE", nargs="?", help="only this node, or a module path and what is in it"
    )
    parser.add_argument("--backend", default="auto", help="as in compile(), default %(default)s")
    parser.add_argument(
        "--machine",
        choices=PRESETS,
        metavar="NAME",
        help=f"explain for another machine: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default cuda for a machine named after its GPU"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with status 2 if anything would fall back"
    )
    parser.add_argument("--nodes", action="store_true", help="a line for every node")
    parser.add_argument("--json", action="store_true", help="one JSON object: everything")


def run(options: argparse.Namespace) -> int:
    recipe, backend = Recipe.parse(options.recipe), check_backend(options.backend)
    device = options.device or ("cuda" if (options.machine or "").startswith("cuda") else "cpu")
    machine = Machine.named(options.machine) if options.machine else detect(device)
    plan = make_plan(load_model(options.model), Options(recipe, machine, backend, device))
    if options.strict:
        refuse(plan.fallbacks)
    chosen = _chosen(plan, options.node, options.model)
    if options.json:
        show_json(_plain(plan, chosen))
    elif options.node:
        for node in chosen:
            _show_node(plan, node)
    else:
        where = options.machine or "this machine"
        print(f"{options.model}, recipe {recipe.name}, backend {backend}, on {where}")
        _show(plan, options.nodes)
    return 0


@dataclass(frozen=True)
class Plan:
    """What compile() would make of a model, without having calibrated it."""

    options: Options
    nodes: Mapping[Node, Explanation]
    parameters: Mapping[Node, int]
    macs: Mapping[Node, int]
    coverage: list[Row]
    fallbacks: Mapping[str, str]


def make_plan(model: nn.Module, options: Options) -> Plan:
    """Run every pass on the model's shapes. The model is left without values, on the meta device.

    Raises:
        CaptureError, RecipeError: as in compile().
    """
    model = model.to("meta")
    signature, calls = read_calls([example_call(model, batch=1)], model)
    graph: GraphModule = capture_flat(model, signature, calls[0]).graph_module
    return plan_of(runner.run(pipelines.ALL, graph, options), calls[0], options)


def plan_of(graph: GraphModule, tensors: Sequence[Tensor], options: Options) -> Plan:
    """The plan in a bound graph; `tensors` are the inputs of one call."""
    shapes = sizes(graph, tensors)
    return Plan(
        options,
        explain(graph, options),
        parameters(graph),
        {node: macs(node, shapes) for node in graph.graph.nodes},
        coverage(graph, tensors),
        fallbacks(graph, options),
    )


def _chosen(plan: Plan, name: str | None, model: str) -> list[Node]:
    """All nodes, or those that NODE names.

    Raises:
        ModelError: it names none.
    """
    if not name:
        return list(plan.nodes)
    wanted = name.removeprefix("%")
    found = [n for n in plan.nodes if n.name == wanted]
    inside = [n for n, e in plan.nodes.items() if f"{e.module}.".startswith(f"{wanted}.")]
    found = found or [n for n in inside if _is_operator(plan.nodes[n])]
    if not found:
        known = {e.node for e in plan.nodes.values()} | {e.module for e in plan.nodes.values()}
        hint = near(wanted, known).partition(" Known:")[0]
        raise ModelError(
            f"{model} has no node or module {name!r} after lowering.{hint} "
            f"`fxquant explain {model} --nodes` lists them"
        )
    return found


def _is_operator(explained: Explanation) -> bool:
    return explained.op not in ("input", "output", "get_attr")


def _plain(plan: Plan, nodes: Iterable[Node]) -> dict[str, object]:
    machine = plan.options.machine
    return {
        "recipe": plan.options.recipe.to_json(),
        "backend": plan.options.backend,
        "machine": {
            k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(machine).items()
        },
        "coverage": [asdict(row) for row in plan.coverage],
        "fallbacks": dict(plan.fallbacks),
        "nodes": [
            {
                **asdict(plan.nodes[n]),
                "considered": [
                    {"kernel": kernel, "verdict": verdict}
                    for kernel, verdict in plan.nodes[n].considered.items()
                ],
                "parameters": plan.parameters.get(n, 0),
                "macs": plan.macs[n],
            }
            for n in nodes
        ],
    }


def _show(plan: Plan, every_node: bool) -> None:
    if every_node:
        _show_nodes(plan)
    else:
        _show_groups(plan)
    total = max(1, sum(row.macs for row in plan.coverage))
    show_table(
        "coverage, multiply-accumulates (MACs) of one image",
        ("precision", "operators", "parameters", "MACs", "share"),
        [
            (r.precision, str(r.operators), f"{r.parameters:,}", f"{r.macs:,}",
             f"{100 * r.macs / total:.1f} %")
            for r in plan.coverage
        ],
    )  # fmt: skip
    slow = len(plan.fallbacks)
    print(
        f"{slow} operators fall back to a slower path than planned; --strict lists them"
        if slow
        else "nothing falls back to a slower path than planned"
    )


def _show_groups(plan: Plan) -> None:
    """Operators with equal answers in one row."""
    kernels: dict[tuple[str, ...], list[Explanation]] = {}
    floats: dict[tuple[str, ...], list[Explanation]] = {}
    for e in filter(_is_operator, plan.nodes.values()):
        if e.kernel:
            kernels.setdefault((e.op, e.kernel, _rejected(e)), []).append(e)
        else:
            floats.setdefault((e.op, str(e.reason).partition("; this one")[0]), []).append(e)
    show_table(
        "operators with a choice of kernels",
        ("operator", "kernel", "better ones, and why not", "number"),
        [(*key, str(len(group))) for key, group in kernels.items()],
        left=3,
    )
    show_table(
        "what stays as it is",
        ("operator", "why", "nodes", "number"),
        [(*key, _some(group), str(len(group))) for key, group in floats.items()],
        left=3,
    )


def _show_nodes(plan: Plan) -> None:
    """One line a node, to be searched: precision, name, kernel, module, why."""
    for e in filter(_is_operator, plan.nodes.values()):
        why = e.reason or _rejected(e)
        place = e.module or "(root)"
        print(f"{e.precision:14} %{e.node}  {e.op} {e.kernel or ''}  {place}  {why}")


def _rejected(explained: Explanation) -> str:
    """The kernels that would have been better, with their reasons."""
    reasons = []
    for kernel, verdict in explained.considered.items():
        if verdict == TAKEN:
            break
        reasons.append(f"{kernel}: {verdict}")
    return "; ".join(reasons) or "it is the best"


def _some(group: list[Explanation]) -> str:
    names = [e.node for e in group[:_NAMES]]
    return ", ".join(names) + (" ..." if len(group) > _NAMES else "")


def _show_node(plan: Plan, node: Node) -> None:
    e = plan.nodes[node]
    print(e.text)
    print(f"  module {e.module or '(root)'}")
    if e.precision != MOVES:
        print(
            f"  precision {e.precision}, {plan.parameters.get(node, 0):,} parameters, "
            f"{plan.macs[node]:,} multiply-accumulates an image"
        )
    for kernel, verdict in e.considered.items():
        print(f"  kernel {kernel}: {verdict}")
    if e.reason:
        print(f"  {e.reason}")
