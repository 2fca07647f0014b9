"""Calibration calls: recording them from a sampler, reading a loader, plain sampling."""

from __future__ import annotations

from fxquant.calibration.files import load_calls, save_calls
from fxquant.calibration.recording import record
from fxquant.calibration.sampling import sample_ddim

__all__ = ["load_calls", "record", "sample_ddim", "save_calls"]
