"""What the user chooses, as one frozen record with named presets.

Names follow `[method:]bits[-effort]`: "w8a8-fast", "w4a8-fast". Methods, bit widths and efforts
are tables below; what this version cannot run yet is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fxquant.errors import RecipeError, near
from fxquant.quant.observers import check_observer

METHODS = ("eda_dm", "adp_dm", "pcr", "q_diffusion", "ptq4dm")
EFFORTS = ("fast", "balanced", "best")
BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
_AVAILABLE = {("eda_dm", "fast")}
_DTYPES = ("auto", "float32", "bfloat16")

# conv_in and conv_out have 3-9 channels on one side; the embeddings run on one row per image.
KEEP_FLOAT = (
    "conv_in",
    "conv_out",
    "time_embedding.*",
    "class_embedding.*",
    "add_embedding.*",
    "encoder_hid_proj.*",
)


@dataclass(frozen=True)
class Recipe:
    """How to quantise a model.

    Attributes:
        method: published method whose ingredients are used.
        effort: "fast" calibrates ranges only; "balanced" and "best" also reconstruct.
        weight_bits, activation_bits: 2 to 16; kernels exist for 8-bit activations.
        weight_observer: "absmax", or "pnorm" for a search of the clipping range.
        activation_observer: one of fxquant.quant.observers.OBSERVERS.
        activation_symmetric: zero point fixed to 0.
        timestep_groups: rows of the activation table.
        split_shortcut: give h and skip of a residual block's 1x1 shortcut a range each.
        keep_float: module path patterns (fnmatch) of layers that stay float.
        compute_dtype: of float parts in the lowered model: "auto", "float32" or "bfloat16".
    """

    method: str = "eda_dm"
    effort: str = "fast"
    weight_bits: int = 8
    activation_bits: int = 8
    weight_observer: str = "absmax"
    activation_observer: str = "minmax"
    activation_symmetric: bool = False
    timestep_groups: int = 1
    split_shortcut: bool = False
    keep_float: tuple[str, ...] = KEEP_FLOAT
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("effort", self.effort, EFFORTS)
        _one_of("weight_observer", self.weight_observer, ("absmax", "pnorm"))
        _one_of("compute_dtype", self.compute_dtype, _DTYPES)
        check_observer(self.activation_observer)
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not 2 <= bits <= 16:
                raise RecipeError(f"{name}={bits!r}; quantisers have 2 to 16 bits")
        if not isinstance(self.timestep_groups, int) or self.timestep_groups < 1:
            raise RecipeError(f"timestep_groups={self.timestep_groups!r}; at least 1 is needed")
        patterns: Any = self.keep_float
        if isinstance(patterns, str):  # it would be taken as a sequence of one-letter patterns
            raise RecipeError(f"keep_float={patterns!r}; give a tuple of patterns")
        object.__setattr__(self, "keep_float", tuple(patterns))
        if (self.method, self.effort) not in _AVAILABLE:
            raise RecipeError(
                f"recipe {self.name!r} needs block reconstruction by {self.method}, which this version "
                f"does not have yet; {self.bits_name + '-fast'!r} calibrates without it"
            )

    @property
    def bits_name(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def name(self) -> str:
        prefix = "" if self.method == "eda_dm" else f"{self.method}:"
        suffix = "" if self.effort == "balanced" else f"-{self.effort}"
        return f"{prefix}{self.bits_name}{suffix}"

    @classmethod
    def parse(cls, recipe: str | Recipe) -> Recipe:
        """A recipe from its name; a Recipe is returned as it is.

        Raises:
            RecipeError: the name does not follow the grammar, or is not available yet.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, str):
            raise RecipeError(
                f"a recipe is a name such as 'w8a8-fast' or a Recipe, not a {type(recipe).__name__}"
            )
        match = re.fullmatch(r"(?:(\w+):)?(\w+?)(?:-(\w+))?", recipe)
        if not match:
            raise RecipeError(
                f"{recipe!r} is no recipe name; the form is [method:]bits[-effort], e.g. w8a8-fast"
            )
        method, bits, effort = match.groups()
        _one_of("bits", bits, tuple(BITS))
        weight_bits, activation_bits = BITS[bits]
        return cls(
            method=method or "eda_dm",
            effort=effort or "balanced",
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            # 8-bit weights lose nothing by covering their maximum; 4-bit ones gain from clipping it
            weight_observer="absmax" if weight_bits >= 8 else "pnorm",
        )

    def with_(self, **changes: Any) -> Recipe:
        """A copy with some fields changed.

        Raises:
            RecipeError: unknown field or bad value.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise RecipeError(f"a recipe has no field {name!r}.{near(name, known)}")
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep_float": list(self.keep_float)}


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"unknown {field} {value!r}.{near(value, known)}")
