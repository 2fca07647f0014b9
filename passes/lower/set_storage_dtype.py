"""Choose how activation integers are stored."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxquant.graph.lowered import arguments, is_op
from fxquant.graph.nodes import refresh_after
from fxquant.graph.options import Options


def set_storage_dtype(gm: GraphModule, *, options: Options) -> GraphModule:
    """Operators that write integers write them as the device multiplies them; on a GPU:

        %fq_0: u8[Bx32x8hx8w] = fxquant.quantize(%silu, %row, index=0, bits=8, dtype=u8)
    becomes
        %fq_0: i8[Bx32x8hx8w] = fxquant.quantize(%silu, %row, index=0, bits=8, dtype=i8)
    """
    written = [n for n in gm.graph.nodes if is_op(n) and _position(n) is not None]
    changed = [n for n in written if n.args[_position(n)] != options.storage_dtype]
    for node in changed:
        node.update_arg(_position(node), options.storage_dtype)
    refresh_after(gm, changed)
    return gm


def _position(node: Node) -> int | None:
    """Of the dtype of the integers that the operator writes; None if it writes floats."""
    given = arguments(node)
    name = "out_dtype" if "out_dtype" in given else "dtype"
    if given[name] not in (torch.int8, torch.uint8):
        return None
    return list(given).index(name)
