"""Name the kernel that runs each operator."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.graph.explain import choice
from fxquant.graph.lowered import is_op
from fxquant.graph.options import Options


def select_kernels(gm: GraphModule, *, options: Options) -> GraphModule:
    """The last argument of every fxquant operator.

        %conv2d: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16, )
    becomes
        %conv2d: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16, gemm)
    """
    for node in gm.graph.nodes:
        if is_op(node):
            node.update_arg(len(node.args) - 1, choice(node, options).kernel)
    return gm
