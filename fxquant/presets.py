"""What methods, efforts and tasks mean for the reconstruction: tables, and one function.

A method is a published combination of sampler, loss and order. An effort says how long to train. A
task, of EDA-DM alone, takes the published sample counts, weights, rates and iterations instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fxquant.errors import RecipeError, near
from fxquant.reconstruction.settings import Reconstruction

METHODS = ("eda_dm", "adp_dm", "pcr", "q_diffusion", "ptq4dm")
EFFORTS = ("fast", "balanced", "best")

_QDROP = 0.5  # published; with 8-bit activations and short training, dropping nothing does better
_METHODS: dict[str, Reconstruction] = {
    # arXiv 2401.04585
    "eda_dm": Reconstruction(sampler="tdac", loss="fbr"),
    # arXiv 2302.04304: weights first, then activation steps
    "q_diffusion": Reconstruction(sampler="uniform", loss="block", order="sequential"),
    # arXiv 2211.15736, in the framework of QDrop
    "ptq4dm": Reconstruction(sampler="normal", loss="block", drop=_QDROP),
}
_EFFORTS: dict[str, dict[str, Any]] = {
    "balanced": {"samples": 512, "iters": 300},
    "best": {"samples": 1024, "iters": 1000},
}
# Of 8-bit weights few roundings matter, and learned steps clip the outliers that samples need: on
# digits both cost quality at the rates that suit 4-bit weights.
_EIGHT_BIT: dict[str, Any] = {"lr_weight": 0.05, "lr_scale": 0.0}


@dataclass(frozen=True)
class Task:
    """EDA-DM's published settings for one task; rates are (8-bit weights, 4-bit weights)."""

    iters: int
    batch: int
    samples: int
    variety_weight: float
    gamma: float
    lr_weight: tuple[float, float]
    lr_scale: tuple[float, float]


TASKS: dict[str, Task] = {
    "cifar": Task(5000, 32, 1024, 1.2, 0.8, (5e-2, 5e-1), (1e-3, 5e-4)),
    "bedroom": Task(5000, 32, 1024, 1.0, 1.0, (5e-4, 1e-2), (1e-4, 5e-3)),
    "church": Task(5000, 32, 1024, 1.0, 1.0, (5e-2, 5e-2), (1e-4, 1e-4)),
    "imagenet": Task(1000, 32, 1024, 1.2, 0.8, (1e-4, 5e-1), (1e-3, 1e-4)),
    "sd": Task(1000, 2, 256, 5.0, 0.8, (5e-4, 3e-2), (1e-4, 1e-4)),
}


def reconstruction_for(
    method: str, effort: str, weight_bits: int, task: str | None = None
) -> Reconstruction | None:
    """How a method reconstructs at an effort; None for "fast".

    Args:
        task: one of TASKS. "best" takes its iterations, "balanced" a fifth of them. Its rates for
            steps are the published numbers, which there are of the step itself and here of its
            logarithm.

    Raises:
        RecipeError: the method is not available, the task is unknown or not of this method.
    """
    if method not in _METHODS:
        raise RecipeError(
            f"method {method!r} is not available in this version; these are: {', '.join(_METHODS)}"
        )
    if task is not None and task not in TASKS:
        raise RecipeError(f"unknown task {task!r}.{near(str(task), TASKS)}")
    if task is not None and method != "eda_dm":
        raise RecipeError(f"tasks are EDA-DM's; {method!r} has none")
    if effort == "fast":
        if task is not None:
            raise RecipeError(f"effort 'fast' does not reconstruct, so task={task!r} means nothing")
        return None
    base = replace(_METHODS[method], **_EFFORTS[effort])
    if task is None:
        return base if weight_bits < 8 else replace(base, **_EIGHT_BIT)
    found, few = TASKS[task], weight_bits < 8
    return replace(
        base,
        iters=found.iters if effort == "best" else found.iters // 5,
        batch=found.batch,
        samples=found.samples,
        variety_weight=found.variety_weight,
        gamma=found.gamma,
        lr_weight=found.lr_weight[few],
        lr_scale=found.lr_scale[few],
        drop=_QDROP,
    )
