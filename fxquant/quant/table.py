"""The activation table: scales and zero points of every quantiser, a row per group of timesteps.

[G, n, 2]. G = 1 serves every timestep alike (EDA-DM). With G > 1 the row is chosen from the
*timestep value*: that of the nearest calibrated timestep, the nearest end outside their range.
Never from a call counter: samplers with other step counts, or that repeat a timestep, just work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.quant.observers import ObservedEdge
from fxquant.quant.uniform import affine_parameters

log = logging.getLogger(__name__)
_warning = threading.Lock()  # several threads may call a model for the first time at once


class ActivationTable(nn.Module):
    """Activation parameters by timestep.

    Args:
        values: [G, n, 2] float32; [..., 0] scales, [..., 1] integer zero points.
        timesteps: [K] the calibrated timesteps, ascending. Ignored when G = 1.
        groups: [K] int64, row of each calibrated timestep.

    Attributes:
        notes: what to know about its ranges, from calibration; empty after loading.
    """

    values: Tensor
    timesteps: Tensor
    groups: Tensor
    notes: tuple[str, ...] = ()

    def __init__(
        self, values: Tensor, timesteps: Tensor | None = None, groups: Tensor | None = None
    ):
        super().__init__()
        if timesteps is None or groups is None:
            timesteps, groups = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        self.register_buffer("values", values.float())
        self.register_buffer("timesteps", timesteps.float())
        self.register_buffer("groups", groups)
        self._warned = False
        self._outside: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ActivationTable:
        return ActivationTable(self.values.clone(), self.timesteps.clone(), self.groups.clone())

    def group(self, timestep: Tensor) -> Tensor:
        """Row index of each timestep: float [B] -> int64 [B]."""
        t = timestep.float()
        if self.values.shape[0] == 1:
            return torch.zeros(t.shape, dtype=torch.int64, device=t.device)
        self._warn_outside(t)
        return self.groups[nearest(self.timesteps, t)]

    def rows(self, timestep: Tensor) -> Tensor:
        """A row per sample for fake-quant: [B] -> [B, n, 2], differentiable in `values`."""
        return self.values[self.group(timestep)]

    def row(self, group: int) -> Tensor:
        """One row for a lowered graph: [n, 2]."""
        return self.values[group]

    def _warn_outside(self, t: Tensor) -> None:
        low, high = self.timesteps[0], self.timesteps[-1]
        if self._warned or not self._is_outside(((t < low) | (t > high)).any()):
            return
        with _warning:
            if not self._warned:
                self._warned = True
                log.warning(
                    "timestep outside the calibrated range [%g, %g]; its nearest end serves. "
                    "Calibrate with the sampler you serve with to avoid this.",
                    float(low),
                    float(high),
                )

    def _is_outside(self, now: Tensor) -> bool:
        """``now``; of a GPU the answer to a call before: waiting for it would stop every step."""
        if now.device.type != "cuda":
            return bool(now)
        with torch.inference_mode(False):  # it is written again, in whatever mode
            if self._outside is None:
                self._outside = torch.zeros((), dtype=torch.bool, pin_memory=True)
            before = bool(self._outside)
            self._outside.copy_(now, non_blocking=True)
        return before


def nearest(sorted_values: Tensor, x: Tensor) -> Tensor:
    """Index of the entry nearest to each x; the lower one on a tie."""
    right = torch.searchsorted(sorted_values, x).clamp(1, max(1, len(sorted_values) - 1))
    left = right - 1
    right = right.clamp(max=len(sorted_values) - 1)
    pick_left = (x - sorted_values[left]) <= (sorted_values[right] - x)
    return torch.where(pick_left, left, right)


def contiguous_groups(timesteps: Sequence[float], count: int) -> tuple[Tensor, Tensor]:
    """Split the distinct timesteps into `count` runs of nearly equal length: ([K], [K])."""
    distinct = torch.tensor(sorted(set(timesteps)), dtype=torch.float32)
    position = torch.arange(len(distinct))
    return distinct, (position * min(count, len(distinct))) // len(distinct)


def settle(
    edges: Sequence[ObservedEdge], timesteps: Tensor | None = None, groups: Tensor | None = None
) -> ActivationTable:
    """The table that the observers' ranges imply.

    A group whose timesteps an edge never met (a branch the calls did not take) uses the nearest
    group that did.
    """
    columns = [torch.stack([_parameters(edge, g) for g in range(len(edge.rows))]) for edge in edges]
    count = int(groups.max()) + 1 if groups is not None else 1
    values = torch.stack(columns, dim=1) if columns else torch.zeros(count, 0, 2)
    return ActivationTable(values, timesteps, groups)


def _parameters(edge: ObservedEdge, group: int) -> Tensor:
    filled = [g for g, seen in enumerate(edge.seen) if seen]
    assert filled, "an observer saw nothing"
    low, high = edge.rows[min(filled, key=lambda g: abs(g - group))].range()
    scale, zero = affine_parameters(
        torch.tensor(low), torch.tensor(high), edge.spec.bits, edge.spec.symmetric
    )
    return torch.stack([scale, zero])
