"""The face of a compiled model: what the original answered, the compiled model answers.

Pipelines ask a denoiser for more than calls: `unet.add_embedding.linear_1.in_features`,
`unet.encoder_hid_proj`, `transformer.cache_context("cond")`, `unet.attn_processors`. A face is the
original's module tree without weights (`fxquant.runtime.outline`), held beside the model's modules:
not a part of its state_dict(), parameters() or modules(). What reads, answers; what would change
the module says where to do that instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fxquant.errors import FaceAttributeError, FaceError
from fxquant.runtime.outline import REMEDY, is_same, outline

_MISSING = object()

# These change what the module computes, and would read files or look for packages first.
_CHANGES = frozenset({
    "load_lora_adapter", "load_attn_procs", "save_lora_adapter", "save_attn_procs",
    "_load_ip_adapter_weights", "_load_ip_adapter_loras", "add_adapter", "set_adapter",
    "set_adapters", "enable_adapters", "disable_adapters", "delete_adapters", "enable_lora",
    "disable_lora", "fuse_lora", "unfuse_lora", "unload_lora", "enable_lora_hotswap",
    "enable_freeu", "enable_cache", "enable_parallelism", "dequantize",
})  # fmt: skip
# These choose how the float module computes the same, or where it keeps its weights.
_NEEDLESS = frozenset({
    "enable_gradient_checkpointing", "set_attention_slice", "set_attention_backend",
    "enable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers",
    "enable_npu_flash_attention", "set_use_npu_flash_attention", "enable_xla_flash_attention",
    "set_use_xla_flash_attention", "enable_layerwise_casting", "enable_group_offload",
    "enable_forward_chunking", "fuse_qkv_projections", "compile_repeated_blocks",
})  # fmt: skip
# And these take that back.
_UNDONE = frozenset({
    "disable_gradient_checkpointing", "disable_xformers_memory_efficient_attention",
    "disable_npu_flash_attention", "disable_xla_flash_attention", "disable_forward_chunking",
    "reset_attention_backend", "_reset_stateful_cache",
})  # fmt: skip


class Face:
    """A face that is there: `root` is the original's outline."""

    def __init__(self, root: nn.Module):
        self.root = root

    @property
    def kind(self) -> str:
        return self.root.__class__.__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Face:
        return self  # it never changes

    def answer(self, name: str, model: nn.Module) -> Any:
        """What the original has under a name that `model`, compiled from it, lacks.

        Raises:
            FaceAttributeError: nothing.
        """
        try:
            found = getattr(self.root, name)
        except FaceError:
            raise
        except AttributeError as error:
            raise FaceAttributeError(
                f"{type(model).__name__} has no attribute {name!r}, nor has the {self.kind} that "
                "it was compiled from"
            ) from error
        if name in _ANSWERS:
            return _ANSWERS[name](found, model)
        return self._method(name, found) if _is_method(found, self.root) else found

    def check_assignment(self, name: str, value: Any) -> bool:
        """Is `name` the original's, so that assigning to the compiled model changes nothing?

        Raises:
            FaceError: it is, and `value` is another than it has.
        """
        if name not in _all_names(self.root):
            return False
        if not is_same(getattr(self.root, name, _MISSING), value):
            raise FaceError(
                f"{name!r} belongs to the {self.kind} that this model was compiled from, whose "
                f"graph is fixed: setting it here would have no effect. {REMEDY}"
            )
        return True

    def _method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        if name in _NEEDLESS:
            return _raising(name, _needless(name, self.kind))
        if name == "push_to_hub":
            return _raising(name, "write a folder with save_pretrained(folder) and upload that")
        if name in _CHANGES:
            return _raising(name, _change(name, self.kind))

        @functools.wraps(method)
        def reading(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except FaceError as error:
                raise FaceError(
                    f"{self.kind}.{name}() cannot run on a compiled model: {error}"
                ) from error

        return reading


class NoFace:
    """Of a model whose original is not known, which answers nothing."""

    def __init__(self, reason: str):
        self._reason = reason

    def answer(self, name: str, model: nn.Module) -> Any:
        raise FaceAttributeError(
            f"{type(model).__name__} has no attribute {name!r}. The original may have had it, but "
            f"{self._reason}"
        )

    def check_assignment(self, name: str, value: Any) -> bool:
        return False


def face_of(model: nn.Module) -> Face | NoFace:
    """The face of a float model, which it does not keep."""
    try:
        return Face(outline(model))
    except Exception as error:  # noqa: BLE001 - users' classes, which may do anything when subclassed
        return NoFace(f"its modules could not be outlined: {type(error).__name__}: {error}")


def rebuilt(
    original: type[nn.Module] | None, config: Any, dtype: torch.dtype, device: torch.device
) -> Face | NoFace:
    """The face of a saved model: its class made again from its config, on the meta device.

    It is a fresh module's: adapters and processors that the original was given are not in it.
    """
    if original is None or not hasattr(original, "from_config"):
        return NoFace(
            "a saved model brings its face along only if a class of this diffusers was compiled"
        )
    if not isinstance(config, Mapping):
        return NoFace(f"it was saved without a config, and {original.__name__} is made from one")
    try:
        with torch.device("meta"):
            made: nn.Module = original.from_config(dict(config))
            return Face(outline(nn.Module.to(made, dtype), device))
    except Exception as error:  # noqa: BLE001 - the constructors of eighty classes, and their code
        return NoFace(
            f"{original.__name__} could not be made again from the saved config: "
            f"{type(error).__name__}: {error}"
        )


def _all_names(root: nn.Module) -> set[str]:
    return {*vars(root), *root._modules, *root._parameters, *root._buffers, *dir(type(root))}


def _is_method(value: Any, root: nn.Module) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is root


def _change(name: str, kind: str) -> str:
    return (
        f"{kind}.{name}() would change the module, and a compiled model's graph is fixed. {REMEDY}"
    )


def _needless(name: str, kind: str) -> str:
    return (
        f"{kind}.{name}() saves memory or time of the float module; a compiled model keeps integer "
        "weights and computes with kernels of its own. Leave the call out, or call it on the other "
        "parts of a pipeline (pipe.vae, pipe.text_encoder)"
    )


def _raising(name: str, message: str) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> None:
        raise FaceError(message)

    method.__name__ = name
    return method


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing to undo."""


def _no_cache(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    """A compiled model caches nothing between calls."""
    return nullcontext()


_ANSWERS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "is_gradient_checkpointing": lambda found, model: False,
    "cache_context": lambda found, model: _no_cache,
    "get_memory_footprint": lambda found, model: types.MethodType(found.__func__, model),
    **{name: (lambda found, model: _nothing) for name in _UNDONE},
}
