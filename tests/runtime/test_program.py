"""The graph as a function: the same results, and the graph's present tensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxquant.runtime import program as program_module
from fxquant.runtime.program import Program
from tests.runtime import compiled as c


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_results_are_the_graphs(recipe: str) -> None:
    model = c.toy(recipe)
    program = Program(model.graph)
    for batch in (1, 3):
        tensors = [*model.signature.flatten((), c.mixed_call(batch)), model.table.row(0)]
        with torch.no_grad():
            assert torch.equal(program.run(*tensors), model.graph(*tensors))


def test_tensors_are_read_in_each_call() -> None:
    model = c.fresh(c.toy())
    program = Program(model.graph)
    tensors = [*model.signature.flatten((), c.mixed_call(2)), model.table.row(0)]
    with torch.no_grad():
        before = program(*tensors)
        others = {k: v.flip(0) for k, v in model.graph.state_dict().items()}
        model.graph.load_state_dict(others, assign=True)
        assert not torch.equal(program(*tensors), before)
        assert torch.equal(program(*tensors), model.graph(*tensors))


def test_no_operator_is_left_that_names_a_kernel() -> None:
    model = c.toy()
    reading = Program(model.graph).reading()
    targets = {str(node.target) for node in reading.function.__self__.graph.nodes}  # type: ignore[attr-defined]
    assert not any(target.startswith("fxquant.") for target in targets)
    assert len(reading.tensors()) == sum(n.op == "get_attr" for n in model.graph.graph.nodes)


def test_a_copy_reads_its_own_graph() -> None:
    model = c.fresh(c.toy())
    program, other = copy.deepcopy((Program(model.graph), model.graph))
    assert program.graph is other
    tensors = [*model.signature.flatten((), c.mixed_call(2)), model.table.row(0)]
    with torch.no_grad():
        expected = program(*tensors)
        for tensor in model.graph.state_dict().values():
            tensor.zero_()
        assert torch.equal(program(*tensors), expected)


def test_a_changed_graph_is_read_again() -> None:
    model = c.fresh(c.toy())
    call = {**c.mixed_call(2), "timestep": 7}
    before = [c.result(model, call) for _ in range(3)]
    end = model.graph.graph.output_node()
    with model.graph.graph.inserting_before(end):
        twice = model.graph.graph.call_function(torch.mul, (end.args[0], 2))
    end.args = (twice,)
    model.graph.recompile()
    for _ in range(3):
        assert torch.equal(c.result(model, call), 2 * before[0])


def test_another_graph_in_its_place_is_run() -> None:
    model, other = c.fresh(c.toy()), c.fresh(c.toy())
    call = {**c.mixed_call(2), "timestep": 7}
    before = [c.result(model, call) for _ in range(3)]
    with torch.no_grad():
        for tensor in other.graph.state_dict().values():
            tensor.copy_(tensor.flip(0))
    model.graph = other.graph
    for _ in range(3):
        after = c.result(model, call)
        assert torch.equal(after, c.result(other, call))
        assert not torch.equal(after, before[0])


def _folded(function: Callable[..., Tensor], name: str, count: int = 4) -> Graph:
    """function(function(x, NAME0), NAME1) ..."""
    graph = Graph()
    total = graph.placeholder("x")
    for k in range(count):
        total = graph.call_function(function, (total, graph.get_attr(f"{name}{k}")))
    graph.output(total)
    return graph


def test_a_call_while_another_thread_recompiles_is_of_one_graph() -> None:
    """Graphs with weights of their own: one's function on the other's gives neither result.

    Another thread recompiles and calls before every line of a call in turn, instead of by chance.
    """
    module = GraphModule(nn.Module(), Graph())
    for k in range(4):
        module.register_buffer(f"a{k}", torch.full((1,), 1.0))
        module.register_buffer(f"b{k}", torch.full((1,), 100.0))
    graphs, x = (_folded(torch.add, "a"), _folded(torch.sub, "b")), torch.zeros(1)
    module.graph = graphs[0]
    program, lines = Program(module), 0

    def recompile_and_call() -> None:
        module.graph = graphs[1]
        assert program.run(x) == -400

    while True:
        module.graph = graphs[0]
        assert program.run(x) == 4
        result, interrupted = _interrupted(lambda: program.run(x), lines, recompile_and_call)
        assert result in (4, -400), f"before line {lines} of the call"
        if not interrupted:
            break
        lines += 1
    assert lines > 3


def _interrupted(
    call: Callable[[], Tensor], line: int, other: Callable[[], None]
) -> tuple[Tensor, bool]:
    """The result of a call before whose n-th line in program.py another thread does something, and
    whether it had as many lines."""
    passed = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal passed
        if frame.f_code.co_filename != program_module.__file__:
            return None
        if event == "line":
            if passed == line:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(other).result()
            passed += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), passed > line
    finally:
        sys.settrace(before)
