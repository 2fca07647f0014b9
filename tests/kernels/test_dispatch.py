"""Which kernel is taken, and what is said of those that are not."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxquant.kernels import ops, reference
from fxquant.kernels.dispatch import BACKENDS, KERNELS, Config, TensorInfo, choose, run
from fxquant.kernels.machine import LEVELS, PRESETS, Machine
from tests.kernels import cases

VNNI = Machine.named("x86-vnni")
AMX = Machine("x86_64", LEVELS["vnni"] | {"amx_int8"}, "c++")


def layer(
    op: str = "linear", machine: Machine = VNNI, device: str = "cpu", **options: Any
) -> Config:
    dtype = options.pop("x", torch.uint8)
    known = {"weight_bits": 8, "groups": 1, "activation": "none", "out_dtype": torch.float32}
    tensors = {"x": TensorInfo(dtype, (None, 64, None, None))}
    return Config(op, tensors, known | options, machine, device)


def producer(op: str = "quantize", machine: Machine = VNNI, **options: Any) -> Config:
    dtype = options.pop("x", torch.bfloat16)
    name = {"cat_quantize": "xs", "add_quantize": "a"}.get(op, "x")
    tensors = {name: TensorInfo(dtype, (None, 64))}
    return Config(op, tensors, {"dtype": torch.uint8} | options, machine)


def attention(
    dtype: torch.dtype = torch.bfloat16,
    out: torch.dtype = torch.bfloat16,
    machine: Machine = VNNI,
) -> Config:
    tensors = {name: TensorInfo(dtype, (None, 8, None, 40)) for name in "qkv"}
    return Config("attention", tensors, {"out_dtype": out}, machine)


def test_the_best_kernel_needs_no_reasons() -> None:
    for config, kernel in ((layer(), "gemm"), (producer(), "fused"), (attention(), "fused")):
        choice = choose(config)
        assert (choice.kernel, choice.reasons) == (kernel, ())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (layer(machine=Machine.named("x86-vnni-no-compiler")), "no C++ compiler"),
        (layer(machine=Machine.named("arm64")), "compiled for x86_64, this is arm64"),
        (layer(out_dtype=torch.float16), "does not write torch.float16"),
        (layer(machine=AMX), "has AMX, which oneDNN uses"),
        (attention(machine=Machine.named("x86-vnni-no-compiler")), "no C++ compiler"),
        (attention(torch.float16), "uint8, all of one dtype, not torch.float16"),
        (layer(device="cuda"), "the tensors are on cuda"),
        (layer(weight_bits=4), "5 to 8 bits, not 4"),
        (layer(x=torch.int8), "uint8, not torch.int8"),
        (layer("conv2d", groups=4), "no grouped convolution (4 groups)"),
        (producer(machine=Machine.named("x86-vnni-no-compiler")), "no C++ compiler"),
        (producer(machine=Machine.named("arm64")), "compiled for x86_64, this is arm64"),
        (producer(x=torch.float16), "not torch.float16"),
        (producer("cat_quantize", x=torch.float16), "not torch.float16"),
        (producer("add_quantize", x=torch.float16), "not torch.float16"),
        (producer(dtype=torch.float16), "does not write torch.float16"),
    ],
)
def test_the_best_kernel_says_why_not(config: Config, sentence: str) -> None:
    choice = choose(config)
    assert choice.reasons[0][0] == KERNELS[config.op][0].name
    assert sentence in choice.reasons[0][1]
    assert choice.kernel != choice.reasons[0][0]


def test_onednn_needs_vnni() -> None:
    config = layer(machine=Machine("x86_64", LEVELS["avx512"]))
    choice = choose(config)
    assert "no VNNI" in dict(choice.reasons)["onednn"]
    assert choice.kernel == "reference"


def test_torch_attends_where_ours_does_not() -> None:
    none = Machine.named("x86-vnni-no-compiler")
    for config in (attention(), attention(torch.uint8), attention(out=torch.uint8)):
        assert choose(replace(config, machine=none)).kernel == "sdpa"


def test_every_kernel_is_reachable() -> None:
    machines = (VNNI, Machine.named("x86-vnni-no-compiler"))
    configs = [
        layer(op, machine, weight_bits=bits)
        for op in ("linear", "conv2d")
        for bits in (4, 8)
        for machine in machines
    ]
    configs += [producer(op) for op in cases.PRODUCERS]
    configs += [attention(machine=machine) for machine in machines]
    gpus = [Machine.named(name) for name in PRESETS if name.startswith("cuda")]
    configs += [
        layer(op, gpu, "cuda", weight_bits=bits, x_bits=x_bits, x=torch.int8)
        for op in ("linear", "conv2d")
        for bits, x_bits in ((8, 8), (4, 8), (4, 4))
        for gpu in gpus
    ]
    configs += [
        replace(producer(op, gpu, dtype=torch.int8), device="cuda")
        for op in cases.PRODUCERS
        for gpu in gpus
    ]
    reached = {(c.op, choose(c, backend).kernel) for c in configs for backend in BACKENDS}
    assert reached == {(k.op, k.name) for kernels in KERNELS.values() for k in kernels}


def test_backends() -> None:
    assert choose(layer(), "x86").kernel == "gemm"
    choice = choose(layer(), "reference")
    assert choice.kernel == "reference"
    assert "the reference backend was asked for" in choice.reasons[0][1]
    assert choose(attention(torch.float16, torch.float16), "x86").kernel == "sdpa"
    assert choose(attention(), "reference").kernel == "reference"
    with pytest.raises(
        ValueError, match="unknown backend 'tpu'; there are auto, x86, cuda, reference"
    ):
        choose(layer(), "tpu")


def test_the_reference_runs_on_every_machine() -> None:
    for machine in PRESETS.values():
        for op in KERNELS:
            assert choose(Config(op, {}, {}, machine), "reference").kernel == "reference"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown op 'lineer'; there are quantize, linear"):
        choose(layer("lineer"))
    with pytest.raises(ValueError, match="linear has no kernel 'x'; there are gemm, gemm_int4"):
        run("linear", "x")


def test_every_kernel_takes_the_arguments_of_its_schema() -> None:
    for op, schema in ops.SCHEMAS.items():
        names = [a.name for a in torch._C.parse_schema(op + schema).arguments][:-1]
        for kernel in KERNELS[op]:
            assert list(inspect.signature(kernel.run).parameters) == names
    assert run("linear", "reference") is reference.linear
