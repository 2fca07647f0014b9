"""What observers saw that the user should know, edge by edge: told once, after calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from fxquant.errors import CallError
from fxquant.quant.observers import ObservedEdge
from fxquant.quant.table import contiguous_groups

log = logging.getLogger(__name__)

FACTOR = 24.0
"""A range so many times as wide as a timestep's values leaves them ten of its 8-bit levels; between
the timesteps of ordinary UNets widths differ up to eightfold."""
_HARMLESS = 12.0  # what the remedy should leave
_MOST = 3  # edges that a sentence names


def judge(
    edges: Mapping[str, ObservedEdge], timesteps: Sequence[float], rows: Sequence[int]
) -> tuple[str, ...]:
    """Sentences about edges that were not finite, or that one range does not serve.

    Args:
        edges: by the name that users know them by.
        timesteps: of every sample, in the order of the calls; empty for a model without one.
        rows: the table's row of every sample.

    Raises:
        CallError: an edge never had a finite value.
    """
    unseen = [name for name, edge in edges.items() if not any(edge.seen)]
    if unseen:
        raise CallError(
            f"{_named(unseen)} held no finite number in any calibration call; no range can be "
            "taken. Run the float model on these calls: NaN or infinity comes out of it, or "
            "attention whose tokens are all masked"
        )
    said = (_not_finite(edges), _uneven(edges, timesteps, rows))
    return tuple(sentence for sentence in said if sentence)


def tell(sentences: Sequence[str]) -> None:
    """As warnings."""
    for sentence in sentences:
        log.warning("%s", sentence)


def _not_finite(edges: Mapping[str, ObservedEdge]) -> str:
    found = sorted(
        (edge.dropped, edge.values, name) for name, edge in edges.items() if edge.dropped
    )
    if not found:
        return ""
    counts = [f"{name} ({dropped:,} of {values:,})" for dropped, values, name in found[::-1]]
    return (
        f"NaN or infinity in calibration: {_named(counts)}. Ranges were taken from the finite "
        "values; what becomes of the others when serving is not defined"
    )


def _uneven(
    edges: Mapping[str, ObservedEdge], timesteps: Sequence[float], rows: Sequence[int]
) -> str:
    """About edges whose range is far wider than the values of some timestep."""
    factors = {name: _factor(edge, timesteps, rows) for name, edge in edges.items()}
    wide = sorted(((f, name) for name, f in factors.items() if f > FACTOR), reverse=True)
    if not wide:
        return ""
    worst = [f"{name} ({factor:.0f}x)" for factor, name in wide]
    return (
        "values differ widely between timesteps that share one range: it is many times as wide as "
        f"the values of some timestep at {_named(worst)}, which are served with few levels. "
        + _remedy([edges[name] for _, name in wide], timesteps, max(rows) + 1)
    )


def _remedy(edges: Sequence[ObservedEdge], timesteps: Sequence[float], now: int) -> str:
    """The fewest groups that help, as far as the calls tell."""
    distinct = len(set(timesteps))
    for count in _doubled(now, distinct):
        known, groups = contiguous_groups(timesteps, count)
        rows = groups[torch.searchsorted(known, torch.tensor(timesteps))].tolist()
        left = max(_factor(edge, timesteps, rows, settled=False) for edge in edges)
        if left <= _HARMLESS or count == distinct:
            return (
                f"Recipe.with_(timestep_groups={count}) gives timesteps ranges of their own, at "
                f"most {left:.0f}x too wide; calibrate on calls that cover them"
            )
    return "Calibrate on more timesteps, with a group for each few of them (timestep_groups)"


def _doubled(now: int, most: int) -> list[int]:
    """Numbers of groups to try: two, four, eight times as many, ..., and the most."""
    powers = range(1, 64)
    return [*(now << k for k in powers if now << k < most), *([most] if most > now else [])]


def _factor(
    edge: ObservedEdge, timesteps: Sequence[float], rows: Sequence[int], settled: bool = True
) -> float:
    """How much wider a row's range is than the values of one of its timesteps, at most.

    The range is the observer's or, unless ``settled``, what all of the row's values would need.
    """
    by_timestep: dict[tuple[int, float], float] = {}
    for width, timestep, row in zip(edge.widths, timesteps, rows, strict=False):
        by_timestep[row, timestep] = max(width, by_timestep.get((row, timestep), 0.0))
    least, most = dict[int, float](), dict[int, float]()
    for (row, _), width in by_timestep.items():
        if width > 0:  # constant zero is represented in any range
            least[row] = min(width, least.get(row, width))
            most[row] = max(width, most.get(row, width))
    ranges = {row: _width(edge, row) for row in least} if settled else most
    return max((ranges[row] / width for row, width in least.items()), default=1.0)


def _width(edge: ObservedEdge, row: int) -> float:
    low, high = edge.rows[row].range()
    return max(high, 0.0) - min(low, 0.0)


def _named(names: Sequence[str]) -> str:
    """A few of them."""
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
