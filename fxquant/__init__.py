"""fxquant: diffusion models with real int8 and int4 arithmetic, from one call.

qunet = fxquant.compile(unet, calib_loader, recipe="w8a8-fast")
"""

from __future__ import annotations

from fxquant._version import __version__
from fxquant.compiler import compile, load  # noqa: A004 - the names users expect
from fxquant.recipe import Recipe
from fxquant.runtime.model import QuantizedModel

__all__ = ["QuantizedModel", "Recipe", "__version__", "compile", "load"]
