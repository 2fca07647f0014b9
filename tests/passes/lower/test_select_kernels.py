"""select_kernels names a kernel for every operator, as a function of the machine."""

from __future__ import annotations

from dataclasses import replace

from fxquant.graph.explain import fallbacks
from fxquant.graph.lowered import arguments, is_op
from fxquant.kernels.machine import Machine
from fxquant.passes.lower.select_kernels import select_kernels
from tests.toy import golden, story


def chosen(gm):
    return {n.name: arguments(n)["kernel"] for n in gm.graph.nodes if is_op(n)}


def test_vnni_machine_uses_native_kernels_everywhere():
    assert "reference" not in chosen(story()["select_kernels"]).values()
    assert not fallbacks(story()["select_kernels"], story().options)


def test_without_a_compiler_and_vnni_layers_fall_back_and_say_why():
    machine = replace(Machine.named("x86-avx2"), compiler=None)
    options = replace(story().options, machine=machine)
    gm = select_kernels(story()["set_compute_dtype"], options=options)
    slow = fallbacks(gm, options)
    assert chosen(gm)["add_1"] == "reference"
    assert "no C++ compiler" in slow["add_1"]
    assert "VNNI" in slow["add_1"]


def test_reference_backend_is_a_choice_not_a_fallback():
    options = replace(story().options, backend="reference")
    gm = select_kernels(story()["set_compute_dtype"], options=options)
    assert set(chosen(gm).values()) <= {"reference", "sdpa"}
    assert not fallbacks(gm, options)


def test_golden():
    golden(
        __file__,
        story()["select_kernels"],
        "down_resnet",
        "transformer.transformer_blocks.0",
        "up_resnet",
    )
