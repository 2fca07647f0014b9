"""The model classes of the installed diffusers that denoise, found by looking for them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import diffusers
from diffusers.models.modeling_utils import ModelMixin

ROOT = Path(diffusers.__file__).parent
FOLDERS = ("models/unets", "models/transformers", "models/controlnets")
FILES = (  # of pipelines that have a denoiser of their own
    "models/adapter.py",
    "pipelines/audioldm2/modeling_audioldm2.py",
    "pipelines/deprecated/versatile_diffusion/modeling_text_unet.py",
    "pipelines/deprecated/unidiffuser/modeling_uvit.py",
    "pipelines/deprecated/wuerstchen/modeling_wuerstchen_prior.py",
    "pipelines/deprecated/wuerstchen/modeling_wuerstchen_diffnext.py",
)
LEFT_OUT = {
    "AudioLDM2ProjectionModel": "projects prompts, once for an image",
    "ControlNetXSAdapter": "has no forward: it goes into UNetControlNetXSModel",
    "CosmosControlNetModel": "its forward needs torchvision, which is not installed",
    "MotionAdapter": "has no forward: it goes into UNetMotionModel",
    "MultiAdapter": "adds up T2IAdapters",
    "MultiControlNetUnionModel": "a loop over ControlNetUnionModel, as MultiControlNetModel is one",
}


def denoisers() -> set[str]:
    """Names of every class that a case must be called after."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    return {name for file in (*files, *(ROOT / file for file in FILES)) for name in _models(file)}


def _models(file: Path) -> set[str]:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts))
    return {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, ModelMixin)
        and value.__module__ == module.__name__
    }
