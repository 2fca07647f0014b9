"""UNet calls on disk: a folder with one safetensors file per call.

save_calls(record(pipe.unet, lambda: pipe(prompts), every=5), "calls")     # in Python, once
fxquant quantize path/to/model --calib calls --out quantised               # on the command line

Tensors are named as in a Signature: "sample", "timestep", "added_cond_kwargs.text_embeds". How they
nest, and the arguments that are no tensors, are in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.errors import LoaderError, SettingError
from fxquant.graph.signature import TIMESTEP
from fxquant.graph.structure import (
    FlatCall,
    Skeleton,
    constant_from_json,
    constant_to_json,
    from_json,
    nested_by_names,
    put_together,
    to_json,
)

_NESTING, _CONSTANTS = "nesting", "constants"


def save_calls(calls: Iterable[Mapping[str, Any]], folder: str | Path) -> None:
    """Write calls, dicts of forward's arguments, as folder/0000.safetensors and so on.

    Raises:
        SettingError: the folder cannot be written.
    """
    folder = made(folder)
    for number, call in enumerate(calls):
        given = {k: v for k, v in call.items() if k != "return_dict"}
        write_call(folder, number, FlatCall.of(_with_tensor_timestep(given)))


def load_calls(folder: str | Path) -> list[dict[str, Any]]:
    """The calls of a folder, in the order of its file names.

    Raises:
        LoaderError: no folder, no .safetensors file in it, or a damaged one.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise LoaderError(
            f"{folder} holds no .safetensors file; fxquant.calibration.save_calls writes one per "
            "call that fxquant.calibration.record took"
        )
    return [read_call(file).arguments() for file in files]


def made(folder: str | Path) -> Path:
    """The folder, which now exists.

    Raises:
        SettingError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return Path(folder)


def write_call(folder: Path, number: int, call: FlatCall) -> Path:
    """One call's file in an existing folder; returns its path.

    Raises:
        SettingError: the folder cannot be written.
    """
    file = folder / f"{number:04d}.safetensors"
    whole = {name: tensor.contiguous() for name, tensor in call.tensors.items()}
    constants = {name: constant_to_json(value) for name, value in call.constants.items()}
    metadata = {_NESTING: json.dumps(to_json(call.skeleton)), _CONSTANTS: json.dumps(constants)}
    try:
        save_file(whole, file, metadata)
    except (SafetensorError, OSError) as error:
        raise _unwritable(folder, error) from error
    return file


def read_call(file: Path) -> FlatCall:
    """One call, its tensors mapped: pages are read when they are needed.

    Raises:
        LoaderError: no such file, or a damaged one.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        return _call(tensors, metadata)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LoaderError(f"{file} is damaged: {error}; write it again") from error


def _call(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> FlatCall:
    if _NESTING not in metadata:  # written by hand, or before there was any
        return FlatCall(nested_by_names(tensors), tensors, {})
    skeleton = from_json(json.loads(metadata[_NESTING]))
    constants = json.loads(metadata[_CONSTANTS])
    if not isinstance(skeleton, Skeleton) or not isinstance(constants, dict):
        raise ValueError("its metadata are no call's")
    call = FlatCall(skeleton, tensors, {k: constant_from_json(v) for k, v in constants.items()})
    put_together(skeleton, call.leaves)  # a KeyError where a leaf is missing
    return call


def _with_tensor_timestep(call: Mapping[str, Any]) -> dict[str, Any]:
    """A timestep given as a number is a tensor like all others."""
    return {
        k: torch.tensor(v) if k == TIMESTEP and isinstance(v, (int, float)) else v
        for k, v in call.items()
    }


def _unwritable(folder: str | Path, error: Exception) -> SettingError:
    return SettingError(f"{folder}: no calls can be written there ({error})")
