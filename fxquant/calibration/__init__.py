"""Calibration calls: recording them from a sampler, reading a loader, plain sampling."""

from __future__ import annotations

from fxquant.calibration.recording import record
from fxquant.calibration.sampling import sample_ddim

__all__ = ["record", "sample_ddim"]
