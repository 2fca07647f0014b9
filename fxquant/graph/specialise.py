"""Size computations replaced by the sizes of given inputs, so that a graph can be cut anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.errors import CaptureError
from fxquant.graph.interpret import Watched
from fxquant.graph.nodes import aten, is_symbolic
from fxquant.graph.runner import clone
from fxquant.graph.segment import inputs_of

_BATCHES = (2, 3)


def specialise(gm: GraphModule, tensors: Sequence[Tensor]) -> GraphModule:
    """A clone for inputs of these sizes and any batch.

    A captured graph asks intermediate values for their sizes; a part of it that only needs such a
    size would have to keep the whole value. Here every size is a number, or a multiple of the
    batch of the first input.

    Args:
        tensors: graph inputs [B, ...]; only their shapes and dtypes are read.

    Raises:
        CaptureError: a size that is neither constant nor proportional to the batch.
    """
    gm = clone(gm)
    small, large = (_sizes(gm, tensors, batch) for batch in _BATCHES)
    first = inputs_of(gm)[0]
    with gm.graph.inserting_after(inputs_of(gm)[-1]):
        batch = gm.graph.call_function(aten.sym_size.int, (first, 0))
    batch.meta = {"val": first.meta["val"].shape[0]}
    for node in small:
        _substitute(gm, node, batch, small[node], large[node])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _sizes(gm: GraphModule, tensors: Sequence[Tensor], batch: int) -> dict[Node, int]:
    """The values of all size computations at a batch; nothing else is computed."""
    found: dict[Node, int] = {}

    def see(node: Node, value: Any, env: dict[Node, Any]) -> None:
        if is_symbolic(node):
            found[node] = value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with device_of(gm):
            inputs = [torch.empty(batch, *t.shape[1:], dtype=t.dtype) for t in tensors]
            rest = inputs_of(gm)[len(tensors) :]  # the row
            rest_inputs = [torch.empty(tuple(n.meta["val"].shape)) for n in rest]
        Watched(gm, see).run(*inputs, *rest_inputs)
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a graph's or model's weights are."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def _substitute(gm: GraphModule, node: Node, batch: Node, small: int, large: int) -> None:
    value: Any = small
    if small != large:
        factor, rest = divmod(small, _BATCHES[0])
        if rest or factor * _BATCHES[1] != large:
            raise CaptureError(f"%{node.name} is neither constant nor a multiple of the batch")
        with gm.graph.inserting_after(batch):
            value = batch if factor == 1 else gm.graph.call_function(_times, (batch, factor))
        value.meta = {"val": node.meta["val"]}
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)


def _times(batch: int, factor: int) -> int:
    return batch * factor
