"""The order of passes. A new pass goes into one of these tuples, with a half-line reason.

Up to LOWER nothing depends on the machine; BIND fits the lowered graph to one, at compile time and
again whenever a saved model is loaded.
"""

from __future__ import annotations

from fxquant.graph.runner import Step
from fxquant.passes.lower.fuse_epilogues import fuse_epilogues
from fxquant.passes.lower.fuse_producers import fuse_producers
from fxquant.passes.lower.fuse_requantize import fuse_requantize
from fxquant.passes.lower.integer_layers import integer_layers
from fxquant.passes.lower.select_kernels import select_kernels
from fxquant.passes.lower.set_compute_dtype import set_compute_dtype
from fxquant.passes.lower.set_storage_dtype import set_storage_dtype
from fxquant.passes.prepare.convolutions_to_conv2d import convolutions_to_conv2d
from fxquant.passes.prepare.fold_constants import fold_constants
from fxquant.passes.prepare.fold_weights import fold_weights
from fxquant.passes.prepare.functionalize import functionalize
from fxquant.passes.prepare.mark_timestep_only import mark_timestep_only
from fxquant.passes.prepare.merge_layers import merge_layers
from fxquant.passes.prepare.pin_draws import pin_draws
from fxquant.passes.prepare.products_to_linear import products_to_linear
from fxquant.passes.prepare.samples_first import samples_first
from fxquant.passes.prepare.strip_noops import strip_noops
from fxquant.passes.quantize.annotate import annotate
from fxquant.passes.quantize.group_units import group_units
from fxquant.passes.quantize.insert_observers import insert_observers
from fxquant.passes.quantize.observers_to_fake_quant import observers_to_fake_quant
from fxquant.passes.quantize.own_weights import own_weights
from fxquant.passes.quantize.split_shortcut import split_shortcut

PREPARE = (
    Step(functionalize, "captured", "first: nothing after it has to think about writes"),
    Step(strip_noops, "prepared", "later passes match fewer shapes of the same thing"),
    Step(pin_draws, "prepared", "before anything moves: draws follow the captured memory order"),
    Step(merge_layers, "prepared", "before constants become buffers, each with a name of its own"),
    Step(convolutions_to_conv2d, "prepared", "kernels know one kind of convolution"),
    Step(products_to_linear, "prepared", "and one product with a weight"),
    Step(samples_first, "prepared", "quantisers and units count samples on the first axis"),
    Step(fold_weights, "prepared", "what the two above made of weights, and what models do"),
    Step(fold_constants, "prepared", "what needs no input is computed once"),
    Step(mark_timestep_only, "prepared", "these values repeat for every image of a step"),
)
OBSERVE = (
    Step(split_shortcut, "prepared", "before specs: each half gets its own"),
    Step(annotate, "annotated", "decide everything before touching anything"),
    Step(own_weights, "annotated", "when it is known which weights will be integers"),
    Step(insert_observers, "observed", "ranges come from running calibration samples"),
)
FAKE_QUANT = (
    Step(observers_to_fake_quant, "fake_quantized", "ranges are known: simulate the integers"),
    Step(group_units, "grouped", "last, when every node that belongs to a unit exists"),
)
LOWER = (
    Step(integer_layers, "lowered", "real integers first: all fusions match fxquant operators"),
    Step(fuse_epilogues, "lowered", "before producers: an add taken by a layer is none of theirs"),
    Step(fuse_producers, "lowered", "norms and activations write integers"),
    Step(
        fuse_requantize,
        "lowered",
        "what is still quantised after a product is the product's output",
    ),
)
BIND = (
    Step(set_compute_dtype, "lowered", "when it is settled what stays float"),
    Step(set_storage_dtype, "lowered", "the device decides how its integers lie in memory"),
    Step(select_kernels, "lowered", "last: kernels are chosen by final shapes and dtypes"),
)
ALL = (*PREPARE, *OBSERVE, *FAKE_QUANT, *LOWER, *BIND)
