"""PyTorch itself: eager, compiled, and its own int8 (PT2E for x86, lowered by Inductor)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import as_dtype, build, reset_peak, run, timed
from numpy.typing import NDArray
from served import Arrays, Row, Served, Settings, added
from torch import Tensor, nn


def fp32(settings: Settings, place: Path) -> Served:
    """As diffusers runs it."""
    torch.set_num_threads(settings.threads)
    return _eager(build(settings.arch), settings)


def bf16(settings: Settings, place: Path) -> Served:
    """Weights and activations in bfloat16."""
    torch.set_num_threads(settings.threads)
    return _eager(_bfloat16(settings.arch), settings)


def bf16_compiled(settings: Settings, place: Path) -> Served:
    """torch.compile with freezing, which packs the weights; compiled in the first step."""
    torch.set_num_threads(settings.threads)
    _inductor(place)
    model = torch.compile(_bfloat16(settings.arch))
    return _eager(model, settings)


def pt2e_int8(settings: Settings, place: Path) -> Served:
    """torchao's X86InductorQuantizer, what it leaves in bfloat16; lowered in the first step."""
    torch.set_num_threads(settings.threads)
    _inductor(place)
    calls = settings.calibration()
    converted, seconds = timed(lambda: _converted(build(settings.arch), calls))
    tensors = tensors_of(settings.timed())
    model = torch.compile(converted)
    reset_peak()
    autocast = torch.autocast("cpu", torch.bfloat16)
    return served(lambda: model(*tensors), {"convert": seconds}, autocast)


def _eager(model: Callable[..., Any], settings: Settings) -> Served:
    call = nested(settings.timed())
    if isinstance(model, nn.Module):
        call = as_dtype(call, next(model.parameters()).dtype)
    reset_peak()
    return served(lambda: run(model, call))


def _bfloat16(arch: str) -> nn.Module:
    return nn.Module.to(build(arch), torch.bfloat16)  # diffusers' own `to` only warns more


def _inductor(place: Path) -> None:
    """Its cache empty, so that the first step takes what it takes on a new machine."""
    shutil.rmtree(place, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
    import torch._inductor.config as config

    config.freezing = True


def served(
    function: Callable[[], Tensor],
    seconds: dict[str, float] | None = None,
    within: AbstractContextManager[Any] | None = None,
) -> Served:
    """A function of tensors as a system."""
    context = within or nullcontext()

    def step() -> NDArray[Any]:
        with torch.no_grad(), context:
            return function().float().numpy()

    return Served(step, lambda: _profile(step), seconds or {})


def _profile(step: Callable[[], object]) -> list[Row]:
    """Time that each operator spent by itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    return added([(e.key, e.count, e.self_cpu_time_total / 1e6) for e in record.key_averages()])


# Tracers take flat tensors


class Flat(nn.Module):
    """The model as a function of the tensors of a call, in its order."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        call = nest(dict(zip(self.names, tensors, strict=True)))
        return self.model(**call, return_dict=False)[0]


def flat(arch: str, call: Arrays) -> Flat:
    """The float32 model for calls like this one."""
    return Flat(build(arch), tuple(call)).eval()


def tensors_of(call: Arrays) -> tuple[Tensor, ...]:
    """The arrays of a call."""
    return tuple(map(torch.from_numpy, call.values()))


def nested(call: Arrays) -> dict[str, Any]:
    """The call as diffusers takes it."""
    return nest({name: torch.from_numpy(value) for name, value in call.items()})


def nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """OUTER.INNER as dictionaries."""
    call: dict[str, Any] = {}
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if inner:
            call.setdefault(outer, {})[inner] = tensor
        else:
            call[outer] = tensor
    return call


# PT2E


@torch.no_grad()
def _converted(model: nn.Module, calls: list[Arrays]) -> nn.Module:
    """Exported, calibrated, with quantise and dequantise around what becomes int8."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    module = Flat(model, tuple(calls[0])).eval()
    graph: Any = torch.export.export(module, tensors_of(calls[0])).module(check_guards=False)
    del model, module
    _drop_assertions(graph)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(graph, quantizer)
    _drop_integer_observers(observed)
    for call in calls:
        observed(*tensors_of(call))
    converted: Any = convert_pt2e(observed)
    _drop_assertions(converted)
    _drop_unused_weights(converted)
    return converted


def _drop_assertions(module: torch.fx.GraphModule) -> None:
    """Checks of dtypes that export leaves: under autocast they do not hold."""
    for node in list(module.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            module.graph.erase_node(node)
    module.recompile()


def _drop_integer_observers(module: torch.fx.GraphModule) -> None:
    """The quantizer also observes timesteps and labels, of which there is no histogram."""
    for node in list(module.graph.nodes):
        seen = node.args[0].meta.get("val") if node.op == "call_module" and node.args else None
        if isinstance(seen, Tensor) and not seen.is_floating_point():
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def _drop_unused_weights(module: torch.fx.GraphModule) -> None:
    """The float32 originals of int8 weights, which conversion leaves in the module."""
    names = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    weights = dict(module.named_parameters(remove_duplicate=False))
    used = {id(weight) for name, weight in weights.items() if name in names}
    for weight in weights.values():
        if id(weight) not in used:
            weight.data = torch.empty(0)
