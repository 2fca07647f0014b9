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
    targets = {str(node.target) for node in program._run.__self__.graph.nodes}  # type: ignore[attr-defined]
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
