"""Every exception fxquant raises on purpose.

    FxquantError
    ├── CaptureError        the module could not be turned into a graph
    ├── CallError           a UNet call (calibration or serving) does not fit the model
    │   └── LoaderError     the calibration loader as a whole is unusable
    ├── RecipeError         the recipe asks for something unknown or not available
    ├── PassError           a rewrite failed; names the pass and the node
    │   └── InvariantError  a rewrite finished but left a graph its stage forbids
    ├── BackendError        no kernel, or an unknown backend
    │   ├── FallbackError   strict=True met an unplanned fallback
    │   └── KernelBuildError  a kernel did not compile (in fxquant.kernels.jit)
    ├── ModelError          MODEL on the command line is not what the command needs
    ├── ArtifactError       a saved model is damaged, foreign or newer, or cannot be written
    ├── FaceError           a change that belongs to the float model was asked of a compiled one
    │   └── FaceAttributeError  neither has this attribute (an AttributeError, too)
    ├── CheckpointError     a folder of checkpoints is damaged or belongs to another run
    ├── EvaluationError     a figure was asked for that this model or installation cannot give
    └── SettingError        an environment variable or an output place cannot be used

Each message says what was wrong, where, and what to do. `assert` is only for our own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxquantError(Exception):
    """Base of all fxquant errors."""


class CaptureError(FxquantError):
    """torch.export refused the module; the message names the module path and source line."""


class CallError(FxquantError):
    """One call's arguments do not fit the captured signature."""


class LoaderError(CallError):
    """The calibration loader is empty, not iterable, or raised midway (the cause is chained)."""


class RecipeError(FxquantError):
    """Unknown or unavailable recipe, method, effort, observer or bit width."""


class PassError(FxquantError):
    """A pass raised, or a pass name is unknown."""


class InvariantError(PassError):
    """The result of a pass breaks an invariant of its stage."""


class BackendError(FxquantError):
    """Unknown backend, or an operation no kernel can run."""


class OperandError(BackendError, ValueError):
    """A kernel was given a dtype, device, shape, alignment or range that it does not have; it was
    not launched."""


class FallbackError(BackendError):
    """strict=True and something would not run as planned; the message lists all of it."""


class ModelError(FxquantError):
    """The MODEL argument names nothing that can be loaded."""


class ArtifactError(FxquantError):
    """A saved model cannot be read or written; the message names the file and the field."""


class FaceError(FxquantError):
    """A compiled model was asked for what only the module it came from can do."""


class FaceAttributeError(FaceError, AttributeError):
    """Neither a compiled model nor its original has this attribute; hasattr() says so."""


class CheckpointError(FxquantError):
    """A reconstruction cannot be resumed from, or keep checkpoints in, the folder given."""


class EvaluationError(FxquantError):
    """A figure that cannot be had: no labels, other inputs, or an optional package is missing."""


class SettingError(FxquantError):
    """FXQUANT_LOG or FXQUANT_DUMP makes no sense, or a file or folder cannot be written."""


def near(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a misspelt name, and the full list of known ones."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(options)}."
