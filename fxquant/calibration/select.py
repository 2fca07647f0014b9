"""Chooses the samples of a loader's calls that reconstruction trains on.

Calls are taken apart into samples and grouped by timestep. TDAC compares feature maps of the *same*
trajectories at every step, so samples are paired by their position within each timestep: the first
sample of every timestep is taken for one trajectory, the second for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.calibration.choice import (
    FEWEST_PAIRS,
    NO_MIDDLE,
    Choice,
    as_map,
    check_sampler,
    choose,
    draw,
    middle,
    too_few,
)
from fxquant.calibration.samplers import TDAC_LAMBDA
from fxquant.errors import LoaderError
from fxquant.graph.bind import bound
from fxquant.graph.nodes import is_symbolic, note
from fxquant.graph.segment import inputs_of, segment
from fxquant.graph.signature import Signature
from fxquant.graph.specialise import device_of

RECORDED = "recorded"
_MOST_PAIRS = 64
_FEATURE_BYTES = 2**30  # of all steps' maps together


@dataclass(frozen=True, kw_only=True)
class Selection(Choice):
    """A choice, and what was chosen.

    Attributes:
        tensors: the graph's flat inputs with a row for each sample, [N, ...], noisiest first.
        times: timesteps, [N] float, zeros for a model without a timestep.
        sampler: "recorded" where the calls had been selected before.
        shared: the other inputs, which all samples have together, by position.
    """

    tensors: tuple[Tensor, ...]
    times: Tensor
    shared: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Unbatched:
    """All calls' samples.

    Attributes:
        tensors: along one batch dimension, the inputs that have one.
        times: timesteps, [N] float.
        shared: the inputs that are the same tensor in all calls, by position.
    """

    tensors: tuple[Tensor, ...]
    times: Tensor
    shared: dict[int, Tensor]


def select(
    floats: GraphModule,
    signature: Signature,
    calls: Sequence[Sequence[Tensor]],
    sampler: str,
    count: int,
    *,
    seed: int = 0,
    variety_weight: float = TDAC_LAMBDA,
    threshold: float | None = None,
    selected: bool = False,
) -> Selection:
    """Choose `count` samples of the calls, or all there are if those are fewer.

    A timestep that is asked for more samples than it has gives some of them again.

    Args:
        floats: the float graph, for TDAC's feature maps. Inputs after the signature's are unused.
        calls: flat tensors in graph order, as `read_calls` gives them.
        sampler: one of SAMPLERS. TDAC falls back to "uniform", and warns, where samples cannot be
            paired; `Selection.reason` says why.
        variety_weight, threshold: see `samplers.tdac`.
        selected: the calls are record_selected's: take all of them as they are.

    Raises:
        RecipeError: unknown sampler, count below 1, or an option out of range.
        LoaderError: the calls differ in resolution or prompt length.
    """
    check_sampler(sampler, count)
    all_ = unbatched(signature, calls)
    tensors, times = all_.tensors, all_.times
    steps = rows_by_step(times)
    if selected:
        counts = torch.tensor([len(rows) for rows in steps.values()])
        reason = "the samples were already selected by record_selected"
        return Selection(RECORDED, reason, tuple(steps), counts, **vars(all_))
    generator = torch.Generator().manual_seed(seed)
    rows = list(steps.values())
    floats = bound(floats, all_.shared)
    node = middle_node(floats)
    choice = choose(
        sampler,
        tuple(steps),
        min(count, len(tensors[0])),
        generator,
        lambda: step_features(floats, node, tensors, rows) if node else [],
        why_not_paired(rows) if node else NO_MIDDLE,
        variety_weight=variety_weight,
        threshold=threshold,
    )
    drawn = draw([len(r) for r in rows], choice.counts, generator)
    chosen = torch.tensor([r[p] for r, places in zip(rows, drawn, strict=True) for p in places])
    return Selection(
        **vars(choice),
        tensors=tuple(t[chosen] for t in tensors),
        times=times[chosen],
        shared=all_.shared,
    )


def unbatched(signature: Signature, calls: Sequence[Sequence[Tensor]]) -> Unbatched:
    """The calls taken apart into samples.

    Tables of positions and the like, which no sample has to itself, are shared if all calls have
    the same.

    Raises:
        LoaderError: the calls differ in resolution or prompt length, or an input has neither a row
            for each sample nor one value for all, or the model takes one batch size only.
    """
    names, limits = signature.names, signature.limits
    if limits.shapes and limits.shapes[0] and isinstance(limits.shapes[0][0], int):
        raise LoaderError(
            f"the model takes batches of {limits.shapes[0][0]} only (dynamic=False, or its own "
            "code), and reconstruction trains on batches of other sizes. Leave the sizes free, or "
            "compile with an effort of 'fast'"
        )
    by_sample = [factor == 1 for factor in limits.batch_factors()] or [True] * len(names)
    if signature.timestep_index is not None and signature.inputs[signature.timestep_index].rank:
        by_sample[signature.timestep_index] = True  # the signature makes it so
    shareable = limits.apart_from_batch() or [False] * len(names)
    tensors, shared = dict[int, Tensor](), dict[int, Tensor]()
    for k, column in enumerate(zip(*calls, strict=True)):
        if by_sample[k]:
            _check_shapes(names[k], column)
            tensors[k] = torch.cat(column)
        elif shareable[k] and all(torch.equal(column[0], other) for other in column[1:]):
            shared[k] = column[0]
        else:
            raise LoaderError(
                f"{names[k]} has no row of its own for each sample, nor is it the same for all, "
                "and reconstruction trains on batches of samples. Compile with an effort of "
                f"'fast', or give the module {names[k]} beforehand and leave it out of the calls"
            )
    times = tensors.get(-1 if signature.timestep_index is None else signature.timestep_index)
    rows = tuple(tensors.values())
    return Unbatched(rows, torch.zeros(len(rows[0])) if times is None else times, shared)


def _check_shapes(name: str, column: Sequence[Tensor]) -> None:
    shapes = sorted({tuple(t.shape[1:]) for t in column})
    if len(shapes) > 1:
        raise LoaderError(
            f"the calibration calls differ in the shape of {name}: a sample has "
            f"{' or '.join(map(str, shapes))}. Reconstruction trains on batches of samples: "
            "give calls of one resolution and prompt length, or an effort of 'fast'"
        )


def rows_by_step(times: Tensor) -> dict[float, list[int]]:
    """Sample indices of each timestep, noisiest (largest timestep) first."""
    steps: dict[float, list[int]] = {}
    for row, t in enumerate(times.tolist()):
        steps.setdefault(float(t), []).append(row)
    return {t: steps[t] for t in sorted(steps, reverse=True)}


def why_not_paired(steps: Sequence[Sequence[int]]) -> str | None:
    """Why samples cannot be followed through the steps; None where they can."""
    counts = [len(rows) for rows in steps]
    if min(counts) != max(counts):
        return f"timesteps have {min(counts)} to {max(counts)} samples, so these have no partners"
    return too_few(counts[0])


@torch.no_grad()
def step_features(
    floats: GraphModule, node: Node, tensors: Sequence[Tensor], steps: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The node's value, a map [B, C, ...] per step, for the same B trajectories at every step."""
    head = segment(floats, [node.name])
    unused = [None] * (len(inputs_of(floats)) - len(tensors))
    device = device_of(floats)

    def maps(rows: Sequence[int]) -> Tensor:
        parts = torch.tensor(rows).split(FEWEST_PAIRS)
        values = [head(*(t[part].to(device) for t in tensors), *unused)[0] for part in parts]
        return torch.cat([as_map(value) for value in values])

    first = maps(steps[0][:FEWEST_PAIRS])
    affordable = _FEATURE_BYTES // (len(steps) * first[:1].nbytes)
    pairs = min(_MOST_PAIRS, max(FEWEST_PAIRS, affordable))
    return [maps(rows[:pairs]) for rows in steps]


def middle_node(floats: GraphModule) -> Node | None:
    """The node whose value leaves the middle block; None for a model without one."""
    inside: dict[str, Node] = {}  # the last node of each module
    for node in floats.graph.nodes:
        if node.op == "call_function" and not is_symbolic(node):
            inside.update((path, node) for path, _ in note(node, "stack") or ())
    path = middle(inside)
    return inside[path] if path else None
