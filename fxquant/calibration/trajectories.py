"""Calibration samples from a sampler's trajectories, chosen while it runs.

runs = [lambda k=k: pipe(prompts[k : k + 8]) for k in range(0, 256, 8)]
calls = record_selected(pipe.unet, runs, count=256, guided=True)
qunet = fxquant.compile(pipe.unet, calls, "w4a8")

A trajectory is one image on its way from noise. The first pass makes one batch of them and compares
the UNet's middle feature maps between timesteps; the second makes all and keeps, of each
trajectory, the UNet's inputs at one timestep (EDA-DM, arXiv 2401.04585).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.calibration.choice import (
    NO_MIDDLE,
    Choice,
    as_map,
    check_sampler,
    choose,
    draw,
    middle,
    too_few,
)
from fxquant.calibration.recording import Call, never_called, watching
from fxquant.calibration.samplers import TDAC_LAMBDA
from fxquant.calibration.spill import Spill
from fxquant.errors import LoaderError
from fxquant.graph.signature import timestep_name
from fxquant.graph.structure import FlatCall
from fxquant.graph.timestep_forms import per_sample

BATCH_ROWS = 32
_BUDGET = 2**30
_MAP = "map"

See = Callable[[float, "_Rows"], None]


class SelectedCalls(Sequence[Call]):
    """UNet calls, a loader for compile, which trains on all of their samples.

    Each is a dict of forward's arguments by name with at most 32 rows, the timestep one value a
    row. Guided rows stay in halves, [unconditional; conditional].

    Attributes:
        selection: which timesteps gave how many trajectories, and why.
        folder: where the calls lie as safetensors files, mapped when read; None if in memory.
    """

    def __init__(self, selection: Choice, calls: Spill):
        self.selection = selection
        self._calls = calls

    @property
    def folder(self) -> Path | None:
        return self._calls.folder

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return self._calls[range(len(self))[index]].arguments()


def record_selected(
    model: nn.Module,
    runs: Sequence[Callable[[], object]],
    *,
    count: int = 256,
    sampler: str = "tdac",
    guided: bool = False,
    seed: int = 0,
    variety_weight: float = TDAC_LAMBDA,
    threshold: float | None = None,
    byte_budget: int = _BUDGET,
    folder: str | Path | None = None,
) -> SelectedCalls:
    """Run every one of `runs`, the first twice, and keep the inputs that calibrate best.

    Each trajectory gives one sample, more only if there are fewer trajectories than samples.
    Torch's global generator is seeded before each run, and restored; draw noise from it, or from
    generators made within the run, and the result depends on the seed alone.

    Args:
        model: the float denoiser that the runs call; it is only watched.
        runs: each makes one batch of images with a pipeline or a loop; results are dropped.
        count: N, samples to keep.
        sampler: one of fxquant.calibration.samplers.SAMPLERS.
        guided: classifier-free guidance: a call's rows are [unconditional; conditional], one pair a
            trajectory. Both of a pair are kept, 2 N rows.
        variety_weight, threshold: see `samplers.tdac`.
        byte_budget: of what is held in memory, feature maps first, then calls; what exceeds it
            goes to files.
        folder: for the calls, once they exceed the budget; a temporary one by default. It is what
            save_calls would write, and without any calls so far.

    Raises:
        RecipeError: unknown sampler, count below 1, or an option out of range.
        LoaderError: no runs, a run without calls, or one that does not follow one batch from noise
            to image over the same timesteps as the first.
        CallError: a call has arguments that are no tensors.
        SettingError: the folder already holds calls or cannot be written.
    """
    check_sampler(sampler, count)
    if not runs:
        raise LoaderError("there are no runs; give functions that each sample a batch of images")
    calls = Spill(byte_budget, folder)
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(runs),), generator=generator).tolist()
    followed = [_Run(model, f, guided, k, seeds[k]) for k, f in enumerate(runs)]
    maps = _middle_maps(followed[0], byte_budget)
    choice = choose(
        sampler,
        maps.timesteps,
        count,
        generator,
        maps.features,
        maps.why_not,
        variety_weight=variety_weight,
        threshold=threshold,
    )
    labels = torch.arange(len(choice.counts)).repeat_interleave(choice.counts)
    labels = labels[torch.randperm(count, generator=generator)]
    for run, mine in zip(followed, labels.tensor_split(len(runs)), strict=True):
        counts = torch.bincount(mine, minlength=len(choice.counts))
        for batch in _chosen(run, choice.timesteps, counts, generator):
            calls[len(calls)] = batch
    return SelectedCalls(choice, calls)


@dataclass(frozen=True)
class _Run:
    """One of the runs, and how to follow it: one batch, from noise to image."""

    model: nn.Module
    function: Callable[[], object]
    guided: bool
    number: int
    seed: int

    @property
    def halves(self) -> int:
        return 2 if self.guided else 1

    def follow(self, see: See) -> None:
        """Run it and show `see` the timestep and the rows of each call.

        Raises:
            LoaderError, CallError: see `record_selected`.
        """
        last: tuple[float, Mapping[str, Any]] | None = None

        def check(arguments: Mapping[str, Any]) -> None:
            nonlocal last
            rows = self._rows(arguments)
            t = rows.timestep
            shapes = {name: tuple(tensor.shape) for name, tensor in rows.call.tensors.items()}
            if last and t > last[0]:
                raise self._error(
                    f"the timestep rose from {last[0]:g} to {t:g}, as if a second batch began; "
                    "give each batch a run of its own"
                )
            if last and shapes != last[1]:
                raise self._error(f"the shapes changed at timestep {t:g}: {last[1]}, now {shapes}")
            last = t, shapes
            see(t, rows)

        with watching(self.model, check), _seeded(self.seed):
            self.function()
        if last is None:
            raise self._error(never_called(self.model))

    def _rows(self, arguments: Mapping[str, Any]) -> _Rows:
        """A call's tensors, the timestep one value a row."""
        call = FlatCall.of(arguments)
        name = timestep_name(call)
        if name is None:
            raise self._error("a call has no timestep, so it belongs to no step of a trajectory")
        time = torch.as_tensor(call.leaves[name])
        sample = next(iter(call.tensors.values()))
        count = len(sample)
        times = per_sample(time, sample, time.dtype)
        if len(times.unique()) > 1:
            raise self._error("the rows of a call have different timesteps")
        tensors = {n: times if n == name else call.leaves[n] for n in call.leaves}
        whole = FlatCall(
            call.skeleton,
            {n: t for n, t in tensors.items() if isinstance(t, Tensor)},
            {n: c for n, c in tensors.items() if not isinstance(c, Tensor)},
        )
        for n, tensor in whole.tensors.items():
            if tensor.ndim and len(tensor) != count and len(tensor) % count == 0 and count > 1:
                raise self._error(
                    f"{n} has shape {list(tensor.shape)}, the sample has {count} rows: which of "
                    "them belong together is not known"
                )
        if self.guided and (count % 2 or not torch.equal(*sample.chunk(2))):
            raise self._error(
                "with guided=True a call's rows are two equal halves of images, [unconditional; "
                f"conditional]; these {count} are not. Leave guided out"
            )
        return _Rows(whole, float(times[0]), count)

    def _error(self, message: str) -> LoaderError:
        return LoaderError(f"run {self.number}: {message}")


@dataclass(frozen=True)
class _Rows:
    """A call whose tensors have a row for each image, or none: tables that all images share."""

    call: FlatCall
    timestep: float
    count: int

    def chosen(self, rows: Tensor) -> FlatCall:
        """CPU copies [halves, n, ...] of those rows; shared tensors whole."""
        tensors = {
            name: tensor.detach()[rows.to(tensor.device)].cpu()
            if self.has_rows(tensor)
            else tensor.detach().to("cpu", copy=True)
            for name, tensor in self.call.tensors.items()
        }
        return FlatCall(self.call.skeleton, tensors, self.call.constants)

    def has_rows(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self.count


@dataclass(frozen=True)
class _Maps:
    """The middle feature maps of one batch of trajectories, by timestep."""

    timesteps: Sequence[float]
    maps: Spill
    why_not: str | None

    def features(self) -> list[Tensor]:
        return [self.maps[k].tensors[_MAP] for k in range(len(self.timesteps))]


def _middle_maps(run: _Run, byte_budget: int) -> _Maps:
    """Pass 1. Of several calls at one timestep, as PNDM makes them, the last one counts."""
    modules = dict(run.model.named_modules())
    path = middle(modules)
    maps, steps, rows = Spill(byte_budget), dict[float, int](), 0
    now = 0

    def see(t: float, seen: _Rows) -> None:
        nonlocal now, rows
        now = steps.setdefault(t, len(steps))
        rows = seen.count

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        value = as_map(output[0] if isinstance(output, tuple) else output)
        maps[now] = FlatCall.of({_MAP: value})

    handle = modules[path].register_forward_hook(keep) if path else None
    try:
        run.follow(see)
    finally:
        if handle:
            handle.remove()
    return _Maps(list(steps), maps, too_few(rows) if path else NO_MIDDLE)


def _chosen(
    run: _Run, timesteps: Sequence[float], counts: Tensor, generator: torch.Generator
) -> Iterator[FlatCall]:
    """Pass 2: calls of `counts` trajectories by timestep, with at most BATCH_ROWS rows each."""
    places: list[list[int]] = []
    kept: dict[float, FlatCall] = {}
    shared: set[str] = set()

    def see(t: float, seen: _Rows) -> None:
        trajectories = seen.count // run.halves
        if not places:
            places.extend(draw([trajectories] * len(timesteps), counts, generator))
        mine = places[timesteps.index(t)] if t in timesteps else []
        if mine:
            rows = torch.tensor([[p + h * trajectories for p in mine] for h in range(run.halves)])
            kept[t] = seen.chosen(rows)
            shared.update(n for n, v in seen.call.tensors.items() if not seen.has_rows(v))

    run.follow(see)
    wanted = [t for t, n in zip(timesteps, counts.tolist(), strict=True) if n]
    missing = [t for t in wanted if t not in kept]
    if missing:
        raise LoaderError(
            f"run {run.number} never called the model at timestep {missing[0]:g}, which run 0 did; "
            "every run needs the same scheduler and number of steps"
        )
    for alike in _alike([kept[t] for t in wanted], shared):
        yield from _batches(alike, BATCH_ROWS // run.halves, shared)


def _alike(parts: Iterable[FlatCall], shared: Collection[str]) -> list[list[FlatCall]]:
    """Runs of calls whose images share the same tensors and constants."""
    found: list[list[FlatCall]] = []
    for part in parts:
        if found and _shares(found[-1][0], part, shared):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _shares(one: FlatCall, other: FlatCall, shared: Collection[str]) -> bool:
    tensors = all(torch.equal(one.tensors[n], other.tensors[n]) for n in shared)
    return tensors and one.constants == other.constants


def _batches(parts: Sequence[FlatCall], size: int, shared: Collection[str]) -> Iterator[FlatCall]:
    """Tensors [halves, n, ...] become batches [halves * m, ...] with m <= size."""
    first = parts[0]
    names = [name for name in first.tensors if name not in shared]
    whole = {name: torch.cat([part.tensors[name] for part in parts], 1) for name in names}
    for start in range(0, whole[names[0]].shape[1], size):
        cut = {n: t[:, start : start + size].flatten(0, 1) for n, t in whole.items()}
        yield FlatCall(first.skeleton, first.tensors | cut, first.constants)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
