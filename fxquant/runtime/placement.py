"""Moves a bound graph to the device it runs on."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fxquant.graph.lowered import LAYERS, arguments
from fxquant.graph.nodes import attribute, set_buffer


def place(graph: GraphModule, device: torch.device) -> None:
    """Put the graph's tensors, and what its operators make, on ``device``, in place.

    On a GPU, weights of integer convolutions get their channels innermost, as its kernels read
    them: then no other copy of them is needed.
    """
    if device.type == "cpu":
        return
    graph.to(device)
    for name in [name for name, _ in graph.named_buffers()]:  # one copy at a time
        tensor = attribute(graph, name)
        if tensor.ndim == 4 and tensor.dtype == torch.int8:
            set_buffer(graph, name, tensor.contiguous(memory_format=torch.channels_last))
    for node in graph.graph.nodes:  # kernels read biases in float32, and would convert each time
        bias = arguments(node)["bias"] if node.target in LAYERS else None
        if bias is not None:
            set_buffer(graph, str(bias.target), attribute(graph, str(bias.target)).float())
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
    graph.recompile()
    torch.cuda.synchronize(device)  # calls may come on any stream
