"""What the user chooses, as one frozen record with named presets.

Names follow `[method:]bits[-effort]`: "w8a8-fast", "w4a8-fast". Methods, bit widths and efforts
are tables below; what this version cannot run yet is refused by name. Saved as JSON, a recipe
serves every model that has the layers its patterns name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fxquant.errors import RecipeError, near
from fxquant.presets import EFFORTS, METHODS, reconstruction_for
from fxquant.quant.observers import check_observer
from fxquant.reconstruction.settings import Reconstruction

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
_DTYPES = ("auto", "float32", "bfloat16")
ATTENTION = ("float", "int8")
GRANULARITIES = ("channel", "tensor")

# conv_in and conv_out have 3-9 channels on one side; the embeddings run on one row per image.
_UNETS = (
    "conv_in",
    "conv_out",
    "time_embedding.*",
    "class_embedding.*",
    "add_embedding.*",
    "encoder_hid_proj.*",
)
# The same of transformers: patches in and out, and what embeds the time and the conditions. All are
# at the top of the model: blocks, too, have a proj_out.
_TRANSFORMERS = (
    "pos_embed.proj",
    "patch_embed.*",
    "patch_embedding",
    "*_patch_embedding",
    "x_embedder",
    "x_embedder.*",
    "proj_in",
    "audio_proj_in",
    "img_in",
    "txt_in",
    "txt_in.*",
    "context_embedder",
    "context_embedder.*",
    "caption_projection.*",
    "condition_embedder.*",
    "image_embedder.*",
    "text_embedder.*",
    "y_embedder.*",
    "t_embedder.*",
    "time_embed.*",
    "time_embedder.*",
    "timestep_embedder.*",
    "time_text_embed.*",
    "time_caption_embed.*",
    "time_condition_embed.*",
    "guidance_embedder.*",
    "adaln_single.*",
    "transformer_blocks.*.norm1.emb.*",
    "norm_out.linear",
    "proj_out",
    "proj_out_[12]",
    "audio_proj_out",
    "final_layer.*",
    "out_layer.*",
)
KEEP_FLOAT = (*_UNETS, *_TRANSFORMERS)


@dataclass(frozen=True)
class Override:
    """What is different for some layers; a field left at None is as the recipe says.

    Attributes:
        pattern: fnmatch on the path of a layer or of its unit: "mid_block.*", "*.attn2.to_k".
        weight_bits, activation_bits: 2 to 16. A weight whose bits are set is searched for its
            clipping range below 8 bits, whatever the recipe's weight_observer.
        activation_symmetric: zero point fixed to 0.
        keep_float: True keeps the layers float, False quantises them whatever keep_float says.
        weight_granularity: "channel", or "tensor" for one scale over all output channels.
    """

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    activation_symmetric: bool | None = None
    keep_float: bool | None = None
    weight_granularity: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise RecipeError(f"override pattern={self.pattern!r}; give a path such as mid_block.*")
        changes = self.changes()
        for name, value in changes.items():
            if name.endswith("_bits"):
                _check_bits(name, value)
            elif name == "weight_granularity":
                _one_of(name, value, GRANULARITIES)
            else:
                _check_bool(name, value)
        if not changes:
            raise RecipeError(
                f"the override of {self.pattern!r} changes nothing; "
                f"set one of {', '.join(f.name for f in fields(self)[1:])}"
            )

    def changes(self) -> dict[str, Any]:
        """The fields that are set, without the pattern."""
        return {k: v for k, v in asdict(self).items() if k != "pattern" and v is not None}


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
        keep_float: patterns of layers that stay float, as in Override.
        attention: "float", or "int8" for both its products on integers: q, k, v and softmax weights
            of 8 bits, but where keep_float names the attention's module.
        compute_dtype: of float parts in the lowered model: "auto", "float32" or "bfloat16".
        overrides: applied in order, later ones win. A pattern of an override, or of keep_float
            unless it is a default, that matches no layer of the model is an error.
        reconstruction: how units are trained; None, for efforts above "fast", takes the preset of
            method, effort and weight bits (fxquant.presets).
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
    attention: str = "float"
    compute_dtype: str = "auto"
    overrides: tuple[Override, ...] = ()
    reconstruction: Reconstruction | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("effort", self.effort, EFFORTS)
        _one_of("weight_observer", self.weight_observer, ("absmax", "pnorm"))
        _one_of("attention", self.attention, ATTENTION)
        _one_of("compute_dtype", self.compute_dtype, _DTYPES)
        check_observer(str(self.activation_observer))
        for name in ("weight_bits", "activation_bits"):
            _check_bits(name, getattr(self, name))
        for name in ("activation_symmetric", "split_shortcut"):
            _check_bool(name, getattr(self, name))
        if not _is_int(self.timestep_groups) or self.timestep_groups < 1:
            raise RecipeError(f"timestep_groups={self.timestep_groups!r}; at least 1 is needed")
        for name, kind, items in (
            ("keep_float", str, "patterns"),
            ("overrides", Override, "Overrides"),
        ):
            object.__setattr__(self, name, _tuple_of(name, getattr(self, name), kind, items))
        self._settle_reconstruction()

    def _settle_reconstruction(self) -> None:
        preset = reconstruction_for(self.method, self.effort, self.weight_bits)
        if self.reconstruction is None:
            object.__setattr__(self, "reconstruction", preset)
        elif not isinstance(self.reconstruction, Reconstruction):
            raise RecipeError(f"reconstruction={self.reconstruction!r}; give a Reconstruction")
        elif preset is None:
            raise RecipeError(
                "effort 'fast' calibrates ranges only and takes no reconstruction; choose "
                "'balanced' or 'best'"
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
    def parse(cls, recipe: str | Path | Recipe, task: str | None = None) -> Recipe:
        """A recipe from its name or file; a Recipe is returned as it is.

        Args:
            recipe: [method:]bits[-effort], or the path of a .json file that `save` wrote.
            task: EDA-DM's published settings for one of fxquant.presets.TASKS; with a name only.

        Raises:
            RecipeError: the name does not follow the grammar, or is not available yet; the file is
                missing or not a recipe.
        """
        is_file = isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith(".json"))
        if task is not None and (is_file or isinstance(recipe, Recipe)):
            raise RecipeError(f"task={task!r} goes with a recipe's name; this one has its settings")
        if isinstance(recipe, Recipe):
            return recipe
        if is_file:
            return cls.load(recipe)
        if not isinstance(recipe, str):
            raise RecipeError(
                f"a recipe is a name such as 'w8a8-fast' or a Recipe, not a {type(recipe).__name__}"
            )
        match = re.fullmatch(r"(?:(\w+):)?(\w+?)(?:-(\w+))?", recipe)
        if not match:
            raise RecipeError(
                f"{recipe!r} is no recipe name; the form is [method:]bits[-effort], e.g. "
                "w8a8-fast, or a path that ends in .json"
            )
        method, bits, effort = match.groups()
        _one_of("bits", bits, tuple(BITS))
        weight_bits, activation_bits = BITS[bits]
        method, effort = method or "eda_dm", effort or "balanced"
        _one_of("method", method, METHODS)
        _one_of("effort", effort, EFFORTS)
        return cls(
            method=method,
            effort=effort,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            weight_observer=weight_observer_for(weight_bits),
            split_shortcut=method == "q_diffusion",
            reconstruction=reconstruction_for(method, effort, weight_bits, task),
        )

    def with_(self, **changes: Any) -> Recipe:
        """A copy with some fields changed.

        `reconstruction` may be a dict of its changes. Another method or effort brings its own.

        Raises:
            RecipeError: unknown field or bad value.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise RecipeError(f"a recipe has no field {name!r}.{near(name, known)}")
        settings = changes.get("reconstruction")
        base = self.reconstruction
        if {"method", "effort"} & set(changes):
            base = replace(self, **{**changes, "reconstruction": None}).reconstruction
            changes.setdefault("reconstruction", base)
        if isinstance(settings, Mapping):
            if base is None:
                raise RecipeError(f"recipe {self.name!r} does not reconstruct; give it an effort")
            known_settings = _known("a reconstruction", settings, Reconstruction)
            changes["reconstruction"] = replace(base, **known_settings)
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Every field as plain data; an override holds only what it changes."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        overrides = [{"pattern": o.pattern, **o.changes()} for o in self.overrides]
        settings = self.reconstruction and self.reconstruction.to_json()
        return {
            **plain,
            "keep_float": list(self.keep_float),
            "overrides": overrides,
            "reconstruction": settings,
        }

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Inverse of to_json; fields that are left out have their default.

        Raises:
            RecipeError: not an object, an unknown key, a wrong type or value.
        """
        known = _known("a recipe", data, cls)
        overrides = known.get("overrides", [])
        if isinstance(overrides, list):  # anything else is refused, and named, by Recipe
            known["overrides"] = [Override(**_known("an override", o, Override)) for o in overrides]
        if known.get("reconstruction") is not None:
            settings = _known("a reconstruction", known["reconstruction"], Reconstruction)
            known["reconstruction"] = Reconstruction(**settings)
        return cls(**known)

    def save(self, path: str | Path) -> None:
        """Write a file that `load`, `parse` and the command line's --recipe take."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a JSON file.

        Raises:
            RecipeError: no such file, not JSON, or not a recipe; the message names the file.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise RecipeError(f"no recipe could be read from {path}: {error.strerror}") from error
        except ValueError as error:
            raise RecipeError(f"recipe file {path} is not JSON: {error}") from error
        except RecipeError as error:
            raise RecipeError(f"recipe file {path}: {error}") from error


def weight_observer_for(bits: int) -> str:
    """8-bit weights lose nothing by covering their maximum; 4-bit ones gain from clipping it."""
    return "absmax" if bits >= 8 else "pnorm"


def names() -> list[str]:
    """Every name of the grammar, whether or not this version can run it."""
    return [f"{m}:{b}-{e}".removeprefix("eda_dm:") for m in METHODS for b in BITS for e in EFFORTS]


def _known(
    what: str, data: Any, record: type[Recipe | Override | Reconstruction]
) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        RecipeError: not an object, a key that is no field, or no pattern.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{what} is a JSON object, not {data!r}")
    known = [f.name for f in fields(record)]
    for name in data:
        if name not in known:
            raise RecipeError(f"{what} has no field {name!r}.{near(str(name), known)}")
    if record is Override and "pattern" not in data:
        raise RecipeError(f"{what} needs a pattern: {dict(data)!r}")
    return dict(data)


def _one_of(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"unknown {field} {value!r}.{near(str(value), known)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(name: str, bits: Any) -> None:
    if not _is_int(bits) or not 2 <= bits <= 16:
        raise RecipeError(f"{name}={bits!r}; quantisers have 2 to 16 bits")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name}={value!r}; it is true or false")


def _tuple_of(name: str, value: Any, kind: type, items: str) -> tuple[Any, ...]:
    """The value of a list field; a string, too, is a sequence of strings: its letters."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, kind) for v in value):
        raise RecipeError(f"{name}={value!r}; give a tuple of {items}")
    return tuple(value)
