"""The graph as a function: the same results, and the graph's present tensors."""

from __future__ import annotations

import copy

import pytest
import torch

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
    program = Program(model.graph)
    targets = {str(node.target) for node in program.function.__self__.graph.nodes}  # type: ignore[attr-defined]
    assert not any(target.startswith("fxquant.") for target in targets)
    assert len(program.tensors()) == sum(n.op == "get_attr" for n in model.graph.graph.nodes)


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
