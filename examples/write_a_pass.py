"""How to write a pass, start to end: the rewrite, its place in the pipeline, its test.

    python examples/write_a_pass.py

The example removes a negation of a negation. A pass is a plain function that edits the graph it is
given (the runner hands it a clone), inserts nodes with fxquant.graph.nodes.call so that they carry
an example value, and says in its docstring, in dump syntax, what it does. In the project it would
live in passes/prepare/strip_double_negation.py with a test and a golden of that name; its Step goes
into a tuple of passes/pipelines.py.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.capture import capture
from fxquant.graph.dump import diff, dump
from fxquant.graph.nodes import aten, calls, replace
from fxquant.graph.options import Options
from fxquant.graph.runner import Step, run
from fxquant.passes import pipelines


def strip_double_negation(gm: GraphModule, *, options: Options) -> GraphModule:
    """-(-x) is x.

        %neg: f32[Bx4] = neg(%sample)
        %neg_1: f32[Bx4] = neg(%neg)
        %exp: f32[Bx4] = exp(%neg_1)
    becomes
        %exp: f32[Bx4] = exp(%sample)
    """
    for node in calls(gm, aten.neg.default):
        inner = node.args[0]
        if isinstance(inner, Node) and inner.target is aten.neg.default:
            original = inner.args[0]
            assert isinstance(original, Node)
            replace(node, original)
    return gm


PIPELINE = (
    *pipelines.PREPARE,
    Step(strip_double_negation, "prepared", "after the no-ops, which may have stood between them"),
)


class Model(torch.nn.Module):
    """Negates twice."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.neg(torch.neg(sample)))


def main() -> str:
    """Returns what the pass changed, as a diff of two dumps."""
    sample = torch.randn(2, 4)
    options = Options()
    before = run(pipelines.PREPARE, capture(Model(), (sample,)).graph_module, options)
    after = run(PIPELINE, capture(Model(), (sample,)).graph_module, options)
    assert torch.equal(before(sample), after(sample))  # the test: same result ...
    changes = diff(dump(before), dump(after))  # ... and the golden: this text, kept in a file
    print(changes)
    return changes


if __name__ == "__main__":
    main()
