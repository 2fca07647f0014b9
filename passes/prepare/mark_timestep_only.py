"""Mark what depends on the timestep alone."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.graph.nodes import is_random, is_symbolic, write_note
from fxquant.graph.options import Options
from fxquant.graph.signature import TIMESTEP


def mark_timestep_only(gm: GraphModule, *, options: Options) -> GraphModule:
    """The sinusoid, the time MLP and every block's projection of it take few distinct values.

        %linear: f32[Bx64] = linear(%sinusoid, time_embedding.linear_1.weight, ...)
    becomes
        %linear: f32[Bx64] = linear(%sinusoid, time_embedding.linear_1.weight, ...)  # timestep only
    """
    marked = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name == TIMESTEP:
            marked.add(node)
        if node.op != "call_function" or is_symbolic(node) or is_random(node):
            continue
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_symbolic(n)]
        if tensors and all(n in marked for n in tensors):
            marked.add(node)
            write_note(node, timestep_only=True)
    return gm
