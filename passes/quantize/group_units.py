"""Group nodes into the units that are reconstructed, explained and compared together."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxquant.graph.edges import edge_source, edges, layout_chain
from fxquant.graph.nodes import is_layer, write_note
from fxquant.graph.options import Options
from fxquant.quant.fake_quant import fake_quantize, fake_quantize_weight
from fxquant.reconstruction.units import unit_of


def group_units(gm: GraphModule, *, options: Options) -> GraphModule:
    """Residual blocks, transformer blocks, attentions; a layer outside of them is its own unit.

    Fake-quant nodes, and the layout operators between them and their reader, join the reader.

        # conv1  Conv2d
          %conv2d: f32[...] = conv2d(%fq_0:u8/t, ...)
    becomes
        # unit down_blocks.0.resnets.0  ResnetBlock2D
          %conv2d: f32[...] = conv2d(%fq_0:u8/t, ...)
    """
    for node in gm.graph.nodes:
        unit = unit_of(node)
        if unit and node.op == "call_function":
            write_note(node, unit=unit)
    for reader in gm.graph.nodes:
        unit = unit_of(reader)
        for edge in edges(reader):
            source = edge_source(edge)
            if source.target is fake_quantize:
                for node in (source, *layout_chain(edge)):
                    write_note(node, unit=unit)
        if is_layer(reader):
            weight = reader.args[1]
            if isinstance(weight, Node) and weight.target is fake_quantize_weight:
                write_note(weight, unit=unit)
    return gm
