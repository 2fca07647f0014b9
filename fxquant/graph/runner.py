"""Runs passes: clone, rewrite, clean up, check, time.

A pass is a plain function `name(gm, *, options) -> GraphModule` and may edit the clone it is
given. Clones share weight storage, so passes rebind tensors and never write into them.
"""

from __future__ import annotations

import copy
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.errors import FxquantError, InvariantError, PassError, near
from fxquant.graph.dump import dump, line
from fxquant.graph.options import Options
from fxquant.graph.stages import violations

log = logging.getLogger(__name__)

_REPORT = (
    "This is an error in fxquant, not in the model. Please report it, with the model's code or "
    "with the graph that `fxquant dump MODEL --after PASS` shows of the pass before."
)

Pass = Callable[..., GraphModule]


@dataclass(frozen=True)
class Step:
    """One line of a pipeline: the pass, the stage its result must satisfy, why it is here."""

    rewrite: Pass
    stage: str
    reason: str

    @property
    def name(self) -> str:
        return self.rewrite.__name__


@dataclass(frozen=True)
class Record:
    """What one pass did. `graph` is its result; `nodes` counts before and after."""

    name: str
    seconds: float
    nodes: tuple[int, int]
    graph: GraphModule


def clone(gm: GraphModule) -> GraphModule:
    """Same weights, own graph, own attribute containers."""
    return GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)


def run(
    pipeline: Sequence[Step],
    gm: GraphModule,
    options: Options,
    *,
    skip: Iterable[str] = (),
    stop_after: str | None = None,
    on_pass: Callable[[Record], None] | None = None,
) -> GraphModule:
    """Apply a pipeline.

    Args:
        skip: names of passes to leave out.
        stop_after: name of the last pass to run.
        on_pass: called with a Record after every pass.

    Raises:
        PassError: a pass raised, or `skip`/`stop_after` names no pass of this pipeline.
        InvariantError: the result breaks its stage's invariants.
    """
    skipped = set(skip)
    check_names(pipeline, [*skipped, *([stop_after] if stop_after else [])])
    for step in pipeline:
        if step.name in skipped:
            continue
        record = _apply(step, gm, options)
        gm = record.graph
        if on_pass:
            on_pass(record)
        if step.name == stop_after:
            break
    return gm


def check_names(pipeline: Sequence[Step], names: Iterable[str]) -> None:
    """Raise PassError for a name that no step has."""
    known = [step.name for step in pipeline]
    for name in names:
        if name not in known:
            raise PassError(f"no pass is called {name!r}.{near(name, known)}")


def _apply(step: Step, gm: GraphModule, options: Options) -> Record:
    started = time.perf_counter()
    before = len(gm.graph.nodes)
    try:
        result = step.rewrite(clone(gm), options=options)
        result.graph.eliminate_dead_code()
        result.graph.lint()
        result = GraphModule(result, result.graph, class_name=type(gm).__name__)
    except FxquantError:
        raise
    except Exception as error:
        raise PassError(_internal(step, error)) from error
    problems = violations(result, step.stage)
    if problems:
        raise InvariantError(
            f"pass {step.name} left a graph that stage '{step.stage}' forbids:\n  "
            + "\n  ".join(problems[:8])
            + f"\n{_REPORT}"
        )
    seconds = time.perf_counter() - started
    log.debug("%s: %d -> %d nodes, %.3f s", step.name, before, len(result.graph.nodes), seconds)
    return Record(step.name, seconds, (before, len(result.graph.nodes)), result)


def _internal(step: Step, error: Exception) -> str:
    """What an error says that no pass meant to raise: the pass, the node and the user's line."""
    node = _node_of(error)
    place = f" at {line(node)}" if node else ""
    source = f", from {source_line(node)}" if node and source_line(node) else ""
    return f"pass {step.name} failed{place}{source}: {type(error).__name__}: {error}\n{_REPORT}"


def _node_of(error: Exception) -> Node | None:
    """The node that the innermost of our functions was busy with."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, Node) and frame.f_globals.get("__name__", "").startswith("fxquant."):
            found = node
    return found


def source_line(node: Node) -> str:
    """'file.py:12: y = x @ w' of the model, where the tracer knows it; else ''."""
    places = re.findall(r'File "(.+?)", line (\d+).*\n +(.+)', node.meta.get("stack_trace") or "")
    return "{}:{}: {}".format(*places[-1]) if places else ""


def changed(before: GraphModule, after: GraphModule) -> bool:
    """Did a pass change anything that the dump shows? Computed, never reported by the pass."""
    return dump(before) != dump(after)
