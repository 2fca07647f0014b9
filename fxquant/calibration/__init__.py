"""Calibration calls: taking them from a sampler, choosing among them, reading a loader.

`record` keeps what a sampler run called the UNet with: all of it, or every n-th call. It is enough
to calibrate ranges, and compile can choose from it. `record_selected` runs the sampler twice and
keeps only the samples that a method such as TDAC chooses: as much variety from far less memory.
Both give a loader for compile. `denoise` and `sample_ddim` are samplers for models without a
pipeline, `save_calls` and `load_calls` keep calls on disk.
"""

from __future__ import annotations

from fxquant.calibration.files import load_calls, save_calls
from fxquant.calibration.recording import record
from fxquant.calibration.sampling import denoise, sample_ddim
from fxquant.calibration.trajectories import SelectedCalls, record_selected

__all__ = [
    "SelectedCalls",
    "denoise",
    "load_calls",
    "record",
    "record_selected",
    "sample_ddim",
    "save_calls",
]
