"""Moves a bound graph to the device it runs on."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fxquant.graph.nodes import set_buffer


def place(graph: GraphModule, device: torch.device) -> None:
    """Put the graph's tensors, and what its operators make, on ``device``, in place.

    On a GPU, weights of integer convolutions get their channels innermost, as its kernels read
    them: then no other copy of them is needed.
    """
    if device.type == "cpu":
        return
    graph.to(device)
    for name, tensor in list(graph.named_buffers()):
        if tensor.ndim == 4 and tensor.dtype == torch.int8:
            set_buffer(graph, name, tensor.contiguous(memory_format=torch.channels_last))
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
    graph.recompile()
