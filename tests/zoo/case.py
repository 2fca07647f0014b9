"""What a case is: how to build one class at its smallest, and how its pipeline calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

WORKS, ONE_SIZE, REFUSED, FAILS = "works", "works, one size", "refused", "fails"
UNSAVED = "works, not saved"  # compile() says so


@dataclass(frozen=True)
class Size:
    """What a call may vary besides its batch; a case uses what its model has."""

    height: int = 8
    width: int = 8
    frames: int = 3
    tokens: int = 6


@dataclass
class Scene:
    """One call in the making: its sizes, its timestep, and random numbers from its seed."""

    batch: int
    size: Size
    t: float
    seed: int
    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def height(self) -> int:
        return self.size.height

    @property
    def width(self) -> int:
        return self.size.width

    @property
    def frames(self) -> int:
        return self.size.frames

    @property
    def tokens(self) -> int:
        return self.size.tokens

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def batched(self, *shape: int) -> Tensor:
        return self.normal(self.batch, *shape)

    def image(self, channels: int) -> Tensor:
        return self.batched(channels, self.height, self.width)

    def video(self, channels: int) -> Tensor:
        """Channels before frames, as most of diffusers' video models have it."""
        return self.batched(channels, self.frames, self.height, self.width)

    def text(self, width: int) -> Tensor:
        return self.batched(self.tokens, width)

    def mask(self, *, kind: torch.dtype = torch.int64, tokens: int | None = None) -> Tensor:
        """A prompt's padding mask: the last sample is two tokens shorter."""
        mask = torch.ones(self.batch, tokens or self.tokens, dtype=kind)
        mask[-1, -2:] = 0
        return mask

    def scalar(self) -> Tensor:
        """The timestep as a scheduler's table gives it: 0-d int64."""
        return torch.tensor(int(self.t))

    def steps(self, scale: float = 1.0) -> Tensor:
        """One timestep for every sample, [B] in the model's dtype; `scale` makes it a fraction."""
        return torch.full((self.batch,), self.t * scale, dtype=self.dtype)

    def long_steps(self) -> Tensor:
        return torch.full((self.batch,), int(self.t))

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


Call = Callable[[Scene], Any]


@dataclass(frozen=True)
class Case:
    """One class, or one way in which a pipeline calls it.

    Attributes:
        name: the class, and after a colon the variant.
        kind: image, video, audio, prior, control or other; the goals of docs/models.md go by it.
        build: makes the model, with diffusers' own initial weights.
        call: makes the arguments of one call: a dict, or a tuple of positional ones and a dict.
        size: at which it is calibrated.
        other: another size that the class takes, None where it takes one only.
        batch, other_batch: at which it is calibrated, and another.
        tolerance: the largest relative error that counts as right.
        dtype: of the model and of what it is given.
        expect: the outcome it must have.
        note: for the table.
        quick: part of the short selection that `make test` runs.
        calls: how many it is calibrated with.
        prepare: what a pipeline does to the model before it calls it.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    call: Call
    size: Size = Size()
    other: Size | None = Size(12, 12, 4, 9)
    batch: int = 2
    other_batch: int | None = 3
    tolerance: float = 0.1
    dtype: torch.dtype = torch.float32
    expect: str = WORKS
    note: str = ""
    quick: bool = False
    calls: int = 8
    prepare: Callable[[Any], object] | None = None
    gain: float = 1.0

    def model(self) -> nn.Module:
        """Built, filled with weights that depend on nothing but the case, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().eval()
            randomise(model, self.gain)
        if self.prepare:
            self.prepare(model)
        return model if self.dtype == torch.float32 else model.to(self.dtype)

    def arguments(self, scene: Scene) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a fresh call; always the same for the same scene."""
        made = self.call(replace(scene))
        return ((), made) if isinstance(made, dict) else made


@torch.no_grad()
def randomise(model: nn.Module, gain: float = 1.0) -> None:
    """Weights of which every one matters: many classes start with zeros in their last layers."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if value.is_floating_point():
                value.copy_(_weights(module, name, value, gain))


def _weights(module: nn.Module, name: str, old: Tensor, gain: float) -> Tensor:
    fresh = torch.randn(old.shape)
    if isinstance(module, nn.Embedding):
        return fresh
    if name == "bias":
        return 0.1 * fresh
    if name == "weight" and old.ndim == 1:  # of a norm
        return 1 + 0.2 * fresh
    if name == "weight" and old.numel():
        return fresh * gain / math.sqrt(old.numel() / old.shape[0])
    if old.ndim == 0:
        return 0.5 + 0.2 * fresh
    return 0.2 * fresh  # tables, positions, gates, learned tokens


def leaves(value: Any) -> list[Tensor]:
    """Every tensor of what a model returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []
