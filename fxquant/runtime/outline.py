"""A module tree without its weights: same classes, attributes and shapes, no memory, no hooks.

It is for reading. Whatever would change it, or needs a weight, is refused by name: it would have no
effect on the graph that was compiled from the module.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import FaceError

_PLACE = "_fxquant_place"
_TENSORS = ("_parameters", "_buffers")
# What hooks and torch.compile left on a module; a tree that computes nothing has no use for it.
_LEFT_OUT = {"_hf_hook", "_old_forward", "_diffusers_hook", "_compiled_call_impl"}
_MISSING = object()
REMEDY = "Do it on the float model, then compile that again: fxquant.compile(model, calls)"


class Outline(Tensor):
    """Shape, dtype and device of a tensor that is not there."""

    place: str
    _is_param: bool

    @classmethod
    def of(cls, tensor: Tensor, device: torch.device | None = None, place: str = "") -> Outline:
        """Of a tensor, as if it were on `device`."""
        made: Outline = Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=device or tensor.device
        )
        made.place = place
        if isinstance(tensor, nn.Parameter):
            made._is_param = True  # what isinstance(..., nn.Parameter) asks for
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if function is torch.ops.aten.detach.default:
            return args[0]
        flat = pytree.arg_tree_leaves(*args, **(kwargs or {}))
        place = next((x.place for x in flat if isinstance(x, Outline)), "a tensor")
        raise FaceError(_no_values(f"{function} needs the values of {place}"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("place", "_is_param"):
            raise FaceError(_no_values(f"{name!r} of {self.place} cannot be set"))
        super().__setattr__(name, value)

    def _values(self, *args: Any, **kwargs: Any) -> Any:
        raise FaceError(_no_values(f"the values of {self.place} were asked for"))

    numpy = tolist = storage = untyped_storage = data_ptr = __reduce_ex__ = _values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Outline({self.place}: {self.dtype} {list(self.shape)} on {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Outline:
        return self


def _no_values(what: str) -> str:
    return (
        f"{what}, and a compiled model keeps no float weights: its own are integers in "
        "model.graph. Do this with the float model"
    )


def outline(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """The tree of a module in eval mode, for reading only.

    Args:
        device: where its tensors claim to be, instead of where they are.
    """
    return _Copier(module, device).module(module)


def is_same(old: Any, new: Any) -> bool:
    """Would putting `new` in the place of `old` change nothing?

    The same object, an equal plain value, or an object of the same class with the same plain state,
    as two attention processors are.
    """
    if old is new:
        return True
    for kind, equal in _EQUAL:
        if isinstance(old, kind) and isinstance(new, kind):
            return equal(old, new)
    state = getattr(old, "__dict__", None)
    return type(old) is type(new) and state is not None and _same_items(state, new.__dict__)


def _differ(old: Any, new: Any) -> bool:
    return False


def _same_items(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return old.keys() == new.keys() and all(is_same(value, new[key]) for key, value in old.items())


_EQUAL: tuple[tuple[Any, Callable[[Any, Any], bool]], ...] = (
    ((Tensor, nn.Module), _differ),
    ((types.FunctionType, types.MethodType, type, functools.partial), _differ),  # identity tells
    ((bool, int, float, str), lambda old, new: type(old) is type(new) and old == new),
    (Mapping, _same_items),
    ((list, tuple), lambda old, new: len(old) == len(new) and all(map(is_same, old, new))),
)


def _refuse(place: str, what: str) -> None:
    raise FaceError(
        f"{what} of {place or 'the original'} cannot change: a compiled model's graph is fixed, "
        f"and what it shows of the original is for reading. {REMEDY}"
    )


class _Fixed:
    """What the modules of an outline have before their own class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not is_same(getattr(self, name, _MISSING), value):
            _refuse(_place(self), f"{name!r}")

    def __delattr__(self, name: str) -> None:
        _refuse(_place(self), f"{name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fixed:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FaceError(_no_values(f"{_place(self) or 'the original'} is not pickled"))


def _place(module: Any) -> str:
    return str(module.__dict__[_PLACE])


def _refusing(name: str) -> Callable[..., None]:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        _refuse(_place(self), f"{name}(): modules and tensors")

    return method


for _name in (
    "add_module", "register_module", "register_parameter", "register_buffer", "load_state_dict",
    "_apply", "register_forward_hook", "register_forward_pre_hook", "register_backward_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_state_dict_pre_hook", "register_load_state_dict_pre_hook",
):  # fmt: skip
    setattr(_Fixed, _name, _refusing(_name))


def _container(base: type, *methods: str) -> type:
    """A list or dict that refuses to change; a copy of it is a plain one."""

    def plain(self: Any, protocol: Any) -> tuple[Any, ...]:
        return base, (base(self),)

    def refusing(name: str) -> Callable[..., None]:
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            _refuse("", f"{name}(): a {base.__name__}")

        return method

    members = {"__reduce_ex__": plain} | {m: refusing(m) for m in methods}
    return type(f"Fixed{base.__name__.title()}", (base,), members)


_DICT = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "clear", "update", "setdefault")
_LIST = ("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert", "pop",
         "remove", "clear", "sort", "reverse")  # fmt: skip
_DICTS: dict[type, type] = {kind: _container(kind, *_DICT) for kind in (dict, OrderedDict)}
_FixedList = _container(list, *_LIST)


@functools.cache
def _fixed(kind: type) -> type:
    """A subclass that passes for `kind`, and whose instances do not change."""

    def body(namespace: dict[str, Any]) -> None:
        namespace |= {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__class__": property(lambda self: kind),
        }

    return types.new_class(kind.__name__, (_Fixed, kind), exec_body=body)


class _Copier:
    def __init__(self, root: nn.Module, device: torch.device | None):
        self._device = device
        self._places = {id(module): path for path, module in root.named_modules()}
        self._done: dict[int, Any] = {}

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._done:
            return self._done[id(module)]
        made: Any = object.__new__(_fixed(type(module)))  # type: ignore[arg-type]
        self._done[id(module)] = made
        blank = nn.Module().__dict__
        own = {k: v for k, v in module.__dict__.items() if k not in blank and k not in _LEFT_OUT}
        place = self._places.get(id(module), "")
        state = {**blank, "training": False, _PLACE: place}
        for kind in _TENSORS:
            state[kind] = _DICTS[dict](
                {
                    name: None if tensor is None else self._tensor(tensor, f"{place}.{name}")
                    for name, tensor in module.__dict__[kind].items()
                }
            )
        modules = module._modules.items()
        state["_modules"] = _DICTS[dict]({name: self.value(part) for name, part in modules})
        made.__dict__.update(state)
        made.__dict__.update({name: self.value(value) for name, value in own.items()})
        return made

    def _tensor(self, tensor: Tensor, place: str) -> Tensor:
        if id(tensor) not in self._done:
            self._done[id(tensor)] = Outline.of(tensor, self._device, place.removeprefix("."))
        return self._done[id(tensor)]

    def value(self, value: Any) -> Any:
        """Any attribute: tensors, modules and methods of modules are replaced, also inside plain
        containers; the rest is shared with the original."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self._tensor(value, "a tensor")
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) in _DICTS:
            return _DICTS[type(value)]({k: self.value(v) for k, v in value.items()})
        if type(value) is list:
            return _FixedList(map(self.value, value))
        return tuple(map(self.value, value)) if type(value) is tuple else value
