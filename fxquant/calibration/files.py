"""UNet calls on disk: a folder with one safetensors file per call.

save_calls(record(pipe.unet, lambda: pipe(prompts), every=5), "calls")     # in Python, once
fxquant quantize path/to/model --calib calls --out quantised               # on the command line

Tensors are named as in a Signature: "sample", "timestep", "added_cond_kwargs.text_embeds".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.errors import LoaderError, SettingError
from fxquant.graph.signature import flat_tensors, nested


def save_calls(calls: Iterable[Mapping[str, Any]], folder: str | Path) -> None:
    """Write calls, dicts of forward's arguments, as folder/0000.safetensors and so on.

    Raises:
        SettingError: the folder cannot be written.
    """
    folder = made(folder)
    for number, call in enumerate(calls):
        write_tensors(folder, number, flat_tensors(_given(call)))


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
    return [nested(read_tensors(file)) for file in files]


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


def write_tensors(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> Path:
    """One call's file in an existing folder; returns its path.

    Raises:
        SettingError: the folder cannot be written.
    """
    file = folder / f"{number:04d}.safetensors"
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, file)
    except (SafetensorError, OSError) as error:
        raise _unwritable(folder, error) from error
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """One call's tensors, mapped: pages are read when they are needed.

    Raises:
        LoaderError: no such file, or a damaged one.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoaderError(f"{file} is damaged: {error}; write it again") from error


def _unwritable(folder: str | Path, error: Exception) -> SettingError:
    return SettingError(f"{folder}: no calls can be written there ({error})")


def _given(call: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in call.items() if v is not None and k != "return_dict"}
