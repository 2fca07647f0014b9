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
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, call in enumerate(calls):
            tensors = flat_tensors(_given(call))
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, folder / f"{number:04d}.safetensors")
    except OSError as error:
        raise SettingError(f"{folder}: no calls can be written there ({error})") from error


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
    return [nested(_read(file)) for file in files]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoaderError(f"{file} is damaged: {error}; write it again") from error


def _given(call: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in call.items() if v is not None and k != "return_dict"}
