"""Name the kernel that runs each operator."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import arguments, is_op
from fxquant.graph.options import Options
from fxquant.kernels.dispatch import Choice, Config, TensorInfo, choose


def select_kernels(gm: GraphModule, *, options: Options) -> GraphModule:
    """The last argument of every fxquant operator.

        %conv2d: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16, )
    becomes
        %conv2d: bf16[...] = fxquant.conv2d(%fq_0, ..., bf16, onednn)
    """
    for node in gm.graph.nodes:
        if is_op(node):
            node.update_arg(len(node.args) - 1, choice(node, options).kernel)
    return gm


def choice(node: Node, options: Options) -> Choice:
    """The kernel for a node on the options' machine, and why not the ones before it."""
    return choose(config(node, options), options.backend)


def config(node: Node, options: Options) -> Config:
    """What kernels may ask about a call: tensors by name, the other arguments, the machine."""
    tensors: dict[str, TensorInfo] = {}
    plain = {}
    for name, value in arguments(node).items():
        if isinstance(value, Node):
            tensors[name] = _info(value.meta["val"])
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Node):
            tensors[name] = _info(value[0].meta["val"])
        else:
            plain[name] = value
    op = str(node.target).split(".")[1]
    return Config(op, tensors, plain, options.machine)


def _info(value: Tensor) -> TensorInfo:
    return TensorInfo(value.dtype, tuple(s if isinstance(s, int) else None for s in value.shape))


def fallbacks(gm: GraphModule, options: Options) -> dict[str, str]:
    """Nodes that run slower than planned, with the reason: the reference instead of a kernel."""
    slow: dict[str, str] = {}
    for node in gm.graph.nodes:
        if is_op(node) and options.backend != "reference":
            chosen = choice(node, options)
            if chosen.kernel == "reference" and chosen.reasons:
                slow[node.name] = "; ".join(
                    f"not {kernel}: {why}" for kernel, why in chosen.reasons
                )
    return slow
