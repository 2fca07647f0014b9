"""Group nodes into the units that are reconstructed, explained and compared together."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from fxquant.graph.edges import edge_source, edges, layout_chain
from fxquant.graph.nodes import is_layer, write_note
from fxquant.graph.options import Options
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.reconstruction.units import pieces, unit_of


def group_units(gm: GraphModule, *, options: Options) -> GraphModule:
    """Residual blocks, transformer blocks, attentions; a layer outside of them is its own unit.

    Fake-quant nodes, and the layout operators between them and their reader, join the reader. What
    leaves its unit and comes back is cut into convex pieces: path, path:2, ...

        # conv1  Conv2d
          %conv2d: f32[...] = conv2d(%fq_0:u8/t, ...)
    becomes
        # unit down_blocks.0.resnets.0  ResnetBlock2D
          %conv2d: f32[...] = conv2d(%fq_0:u8/t, ...)
    """
    units = _members(gm)
    numbers = pieces(gm, units)
    for node, (path, kind) in units.items():
        number = numbers[node]
        write_note(node, unit=[f"{path}:{number + 1}" if number else path, kind])
    return gm


def _members(gm: GraphModule) -> dict[Node, tuple[str, str]]:
    """The unit of each node that belongs to one."""
    found: dict[Node, tuple[str, str]] = {}
    for node in gm.graph.nodes:
        unit = unit_of(node)
        if unit and node.op == "call_function":
            found[node] = (unit[0], unit[1])
    for reader in gm.graph.nodes:
        if reader in found:
            found |= dict.fromkeys(_quantisers(reader), found[reader])
    return found


def _quantisers(reader: Node) -> Iterator[Node]:
    """The fake-quant nodes of what it reads, and the layout operators behind them."""
    for edge in edges(reader):
        source = edge_source(edge)
        if source.target is fake_quantize:
            yield from (source, *layout_chain(edge))
    if is_layer(reader):
        weight = reader.args[1]
        if isinstance(weight, Node) and weight.target is fake_quantize_weight:
            yield weight
