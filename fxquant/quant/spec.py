"""How one edge is quantised: a small frozen record that turns into JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.errors import RecipeError


@dataclass(frozen=True)
class QuantSpec:
    """Quantisation of one tensor.

    Attributes:
        bits: 2 to 16.
        symmetric: zero point 0, or an integer zero point that represents 0.0 exactly.
        channel_axis: axis with a scale per index, None for one scale per tensor.
        observer: how the range is found; see fxquant.quant.observers.
        learned: the step size may be trained by reconstruction.
    """

    bits: int = 8
    symmetric: bool = False
    channel_axis: int | None = None
    observer: str = "minmax"
    learned: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise RecipeError(f"{self.bits} bits asked for; quantisers have 2 to 16")

    def __str__(self) -> str:
        granularity = "t" if self.channel_axis is None else f"c{self.channel_axis}"
        return f"{'i' if self.symmetric else 'u'}{self.bits}/{granularity}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> QuantSpec:
        """Inverse of to_json; keys that are no field (an edge's index) are left out."""
        return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})
