"""Wrappers come off; modules that cannot be compiled as they are say so before calibration."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from torch import nn

import fxquant
from fxquant.calibration import record
from fxquant.errors import CaptureError
from fxquant.graph.unwrap import unwrap, unwrapped
from tests.runtime import compiled as c


class Packed(nn.Parameter):
    """Some library's quantised weight: it computes in a way of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Tagged(nn.Parameter):
    """A user's own kind of parameter, which computes like any other."""


def jit_compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap", [jit_compiled, nn.DataParallel, lambda model: nn.DataParallel(jit_compiled(model))]
)
def test_wrappers_come_off(
    wrap: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = c.mite()
    wrapped = wrap(model)
    with caplog.at_level(logging.INFO, "fxquant"):
        assert unwrap(wrapped) is model
    assert "compiling the Mite inside the" in caplog.text
    assert unwrapped(model) is model


@pytest.mark.parametrize("wrap", [jit_compiled, nn.DataParallel])
def test_a_wrapped_module_is_recorded_and_compiled_like_the_module(wrap: Any) -> None:
    model = c.mite()
    wrapped = wrap(model)
    calls = record(wrapped, lambda: [wrapped(x["sample"], x["timestep"]) for x in c.mite_calls()])
    assert list(calls[0]) == ["sample", "timestep"]
    made = fxquant.compile(wrapped, calls, c.float32(), progress=False)
    assert type(made).__name__ == "QuantizedMite"
    assert torch.equal(c.result(made, calls[1]), c.result(c.shared_mite(), calls[1]))


@pytest.mark.parametrize("part", ["", "conv"])
def test_modules_compiled_in_place_are_compiled(part: str) -> None:
    model = c.mite()
    model.get_submodule(part).compile(backend="eager")
    call = c.mite_calls()[1]
    made = c.compile_mite(c.float32(), model)
    assert torch.equal(c.result(made, call), c.result(c.shared_mite(), call))


def hooked_by_accelerate() -> nn.Module:
    model = c.mite()
    model.conv._hf_hook = SimpleNamespace()  # type: ignore[assignment]
    return model


def cast_layer_by_layer() -> nn.Module:
    model = copy.deepcopy(c.text_conditional()[0])
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model


def offloaded() -> nn.Module:
    model = copy.deepcopy(c.text_conditional()[0])
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    return model


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def cached() -> nn.Module:
    model = flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return model


def on_meta(part: str = "") -> nn.Module:
    model = c.mite()
    model.get_submodule(part).to("meta")
    return model


def packed() -> nn.Module:
    model = c.mite()
    model.conv.weight = Packed(model.conv.weight.detach())
    return model


def lazy() -> nn.Module:
    model = c.mite()
    model.conv = nn.LazyConv2d(16, 3, padding=1)
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(nn.Conv2d(4, 4, 3), (torch.zeros(1, 4, 8, 8),))


def sharded() -> nn.Module:
    model = c.mite()
    model.conv = type("FullyShardedDataParallel", (nn.Module,), {})()
    return model


def quantised() -> nn.Module:
    model = c.mite()
    model.hf_quantizer = SimpleNamespace()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (hooked_by_accelerate, r"moves the weights or inputs of conv \(Conv2d\).*remove_all_hooks"),
        (
            cast_layer_by_layer,
            r"layerwise_casting hook .* conv_in \(Conv2d\).*without enable_layer",
        ),
        (offloaded, r"diffusers' \w+ hook .*load it again without enable_group_offload\(\)"),
        (cached, r"diffusers' fbc_\w+ hook .*disable_cache\(\)"),
        (on_meta, r"conv_in\.weight is on the meta device"),
        (lambda: on_meta("norm"), r"norm\.weight is on the meta device.*Load the weights"),
        (lambda: c.mite().to(torch.float8_e4m3fn), r"float8_e4m3fn.*model\.to\(torch\.bfloat16\)"),
        (packed, r"conv\.weight is a Packed, sharded or quantised.*plain weights"),
        (lazy, r"conv\.weight is not initialised.*Call the module once"),
        (scripted, r"it is TorchScript"),
        (sharded, r"conv \(FullySharded.*a part of the weights"),
        (quantised, r"quantised it already.*without quantization_config"),
        (c.shared_mite, r"\(root\) \(QuantizedMite\) is a compiled model already"),
        (lambda: jit_compiled(c.shared_mite()), r"is a compiled model already"),
    ],
)
def test_what_cannot_be_compiled_as_it_is_says_so_before_calibration(
    make: Callable[[], nn.Module], words: str
) -> None:
    def never() -> Any:
        yield pytest.fail("the loader was read")

    model = make()
    with pytest.raises(CaptureError, match=r"cannot be compiled as it is: (?s:.*)" + words):
        fxquant.compile(model, never(), progress=False)


def test_the_remedies_help() -> None:
    cached_model: Any = cached()
    cached_model.disable_cache()
    assert unwrap(cached_model) is cached_model
    half = c.mite().to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert c.compile_mite(model=half).dtype == torch.bfloat16


def test_a_kind_of_parameter_that_computes_like_any_other_is_taken() -> None:
    model = c.mite()
    model.conv.weight = Tagged(model.conv.weight.detach())
    assert unwrap(model) is model


def test_a_hook_of_the_user_is_compiled_with_the_module() -> None:
    model = c.mite()
    model.register_forward_hook(lambda module, args, output: (output[0] * 2,))
    call = c.mite_calls()[1]
    made = c.compile_mite(c.float32(), model)
    expected = c.result(model, call)
    assert (c.result(made, call) - expected).norm() < 0.05 * expected.norm()
