"""QuantizedModel: the lowered graph behind the face of the module it came from."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.calibration.calls import check_values
from fxquant.errors import ArtifactError, BackendError, CallError, FaceError
from fxquant.graph.results import Result, mapped, parts
from fxquant.graph.samples import is_by_sample
from fxquant.graph.signature import Signature
from fxquant.quant.table import ActivationTable, nearest
from fxquant.recipe import Recipe
from fxquant.runtime.artifact import fingerprint, save
from fxquant.runtime.cuda_graph import CapturedSteps
from fxquant.runtime.exportable import exportable
from fxquant.runtime.face import Face, NoFace, rebuilt
from fxquant.runtime.manifest import Origin
from fxquant.runtime.ownership import own_tensors
from fxquant.runtime.program import Program
from fxquant.runtime.replay import ReplayedSteps
from fxquant.runtime.served_sizes import ServedSizes
from fxquant.runtime.summary import Summary

log = logging.getLogger(__name__)

_UNTRAINED = (
    "a compiled model is not trained: it has integer weights and no gradients. Train the float "
    "model, then compile it again: fxquant.compile(model, calls)"
)


class _Served(NamedTuple):
    """A graph's program and what calls it: replaced as one, since other threads may be serving."""

    program: Program
    steps: Callable[..., Result]


class QuantizedModel(nn.Module):
    """A compiled model: same arguments, outputs, config and dtype as the original.

    Calls may have any batch size, and any height and width that the original takes; several threads
    may call at once. Weights are int8 or packed int4 buffers. The precision is the recipe's: asking
    for another dtype with `.to()` changes nothing and says so.

    What it lacks, its face answers (`fxquant.runtime.face`): the original's submodules, attributes
    and methods that read. Methods and assignments that would change the original are refused.

    Attributes:
        graph: the lowered fx.GraphModule; it takes the flat tensors of `signature` and a table row.
        table: activation scales and zero points by timestep.
        config: the original's config, if it had one.
        summary: what compile() did; print it.
        origin: what saving it needs to know.
        fingerprint: of the graph that saving writes.
        check_inputs: refuse NaN, which integers would turn into plausible numbers, and infinity in
            the sample and the timestep. Off unless set: on a GPU every step would wait for it.

    Args:
        owned: the tensors belong to this model alone and need not be copied.
        face: the original's; by default made again from class and config when it is asked for.
    """

    original: ClassVar[type[nn.Module] | None] = None

    def __init__(
        self,
        graph: GraphModule,
        table: ActivationTable,
        signature: Signature,
        *,
        recipe: Recipe,
        summary: Summary,
        config: Any = None,
        output: type[Any] | None = None,
        origin: Origin | None = None,
        owned: bool = False,
        face: Face | NoFace | None = None,
    ):
        super().__init__()
        self.graph = graph
        self.table = table
        self.signature = signature
        self.recipe = recipe
        self.summary = summary
        self.config = config
        self.origin = origin
        self.fingerprint = fingerprint(graph)
        self.check_inputs = False
        self._output = output
        if not owned:
            own_tensors(self)
        self._served = self._uncaptured()
        self._served_sizes = ServedSizes()
        self._said_untrained = False
        self.eval()
        self._face: Face | NoFace | None = face

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_face" not in self.__dict__:
                raise
        return self._seen().answer(name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_internal_dict":  # where diffusers writes a config
            name = "config"
        if self._is_own(name) or not self._seen().check_assignment(name, value):
            super().__setattr__(name, value)

    def _is_own(self, name: str) -> bool:
        """Is this the compiled model's, not its face's?"""
        state = self.__dict__
        parts = ("_modules", "_buffers", "_parameters")
        held = name in state or any(name in state[part] for part in parts)
        return held or "_face" not in state or hasattr(type(self), name)

    def _seen(self) -> Face | NoFace:
        if self._face is None:
            self._face = rebuilt(self.original, self.config, self.dtype, self.device)
        return self._face

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __copy__(self) -> QuantizedModel:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArtifactError(
            "a compiled model is not pickled, nor is it written by torch.save: its kernels were "
            "chosen for this machine. model.save_pretrained(folder) writes it as data, and "
            "fxquant.load(folder) reads it on any machine; torch.save(model.state_dict(), file) "
            "keeps the tensors alone"
        )

    def train(self, mode: bool = True) -> QuantizedModel:
        """Stay in eval mode, and say so once: train() of an enclosing module comes here, too."""
        if mode and not self._said_untrained:
            self._said_untrained = True
            log.warning("%s; train() changes nothing", _UNTRAINED)
        return super().train(mode=False)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedModel:
        """Stay without gradients.

        Raises:
            FaceError: they were asked for.
        """
        if requires_grad:
            raise FaceError(_UNTRAINED)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of inputs and outputs, the original's."""
        return self.signature.dtype

    @property
    def device(self) -> torch.device:
        return self.table.values.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward.

        Raises:
            CallError: arguments, or sizes, other than those the model was captured with; or NaN,
                with `check_inputs`.
            FaceError: torch.export calls; see `exportable`.
        """
        if torch.compiler.is_exporting():
            raise FaceError(
                "torch.export cannot name this model's tensors, which begin with 'graph', a word "
                "of its own: export model.exportable() instead, with the same arguments, or use "
                "that in the module that you export"
            )
        return self.serve(*args, **kwargs)

    @torch.no_grad()
    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` returns."""
        tensors = self.signature.flatten(args, kwargs)
        if self.check_inputs:
            check_values(self.signature, tensors)
        alike = self.signature.has_one_timestep(args, kwargs)
        for name, tensor in zip(self.signature.names, tensors, strict=True):
            if tensor.device != self.device:
                raise CallError(f"{name} is on {tensor.device}, the model on {self.device}")
        result = self._served_sizes.run(
            lambda: self.run(tensors, alike), self.signature.names, tensors
        )
        return self._returned(result, self.signature.return_dict(args, kwargs))

    def _returned(self, result: Result, return_dict: bool) -> Any:
        """What the original returns around its tensors."""
        returned = self.signature.returned(result)
        if self._output is None:
            return returned
        if self.signature.takes_return_dict:
            fields = returned if isinstance(returned, tuple) else (returned,)
            return self._output(*fields) if return_dict else returned
        return self._output(**returned)

    def run(self, tensors: Sequence[Tensor], alike: bool = False) -> Result:
        """The graph on flat tensors; samples whose timesteps use different rows run apart.

        Args:
            alike: all samples have one timestep. Then the row is chosen where the table is, and
                nothing waits for a GPU.
        """
        index = self.signature.timestep_index
        if self.table.values.shape[0] == 1 or index is None:
            return self._step(tensors, self.table.row(0))
        if torch.compiler.is_exporting():
            return self._step(tensors, self._exported_row(tensors[index], alike))
        if alike:
            return self._step(tensors, self.table.rows(tensors[index].reshape(-1)[:1])[0])
        groups = self.table.group(tensors[index].reshape(-1))
        result: Result | None = None
        for group in groups.unique().tolist():
            chosen = groups == group
            if bool(chosen.all()):
                return self._step(tensors, self.table.row(group))
            part = self._step(self._samples(tensors, chosen), self.table.row(group))
            if result is None:
                result = mapped(lambda t: t.new_empty(len(groups), *t.shape[1:]), part)
            for whole, rows in zip(parts(result), parts(part), strict=True):
                whole[chosen] = rows
        assert result is not None
        return result

    def _samples(self, tensors: Sequence[Tensor], chosen: Tensor) -> list[Tensor]:
        """The inputs of some samples of a call, a mask [B]; tables without a batch are for all."""
        factors = self.signature.limits.batch_factors()
        is_split = factors[0] and all(factor <= 1 for factor in factors)
        if not is_split or not is_by_sample(self.graph.graph):
            raise CallError(
                "the samples of this call have timesteps with different activation ranges, and "
                "what this model takes or returns cannot be split by sample; call it for each "
                "timestep alone"
            )
        return [t[chosen] if f else t for t, f in zip(tensors, factors, strict=True)]

    def _exported_row(self, timestep: Tensor, alike: bool) -> Tensor:
        """The row as an exported program looks it up: without a word outside the known range."""
        if not alike:
            raise CallError(
                "torch.export takes one timestep for a whole batch where the table has several "
                "rows: samples whose timesteps use different rows run apart, and how many parts "
                "there are depends on the values. Export with a 0-d timestep, or a model compiled "
                "with timestep_groups=1"
            )
        table = self.table
        return table.values[table.groups[nearest(table.timesteps, timestep[:1].float())]][0]

    def _step(self, tensors: Sequence[Tensor], row: Tensor) -> Result:
        served = self._served
        if served.program.graph is not self.graph:
            served = self._served = self._uncaptured()
        return served.steps(*tensors, row)

    def _uncaptured(self) -> _Served:
        program = Program(self.graph)
        on_cpu = self.device.type == "cpu"
        return _Served(program, ReplayedSteps(program) if on_cpu else program)

    def capture_steps(self) -> QuantizedModel:
        """From now on run steps as CUDA graphs, captured at the first call with each shape.

        A step then costs one launch instead of a thousand. Another graph put in place is not
        captured until this is called again. Returns the model itself.

        Raises:
            BackendError: the model is not on a GPU.
        """
        if self.device.type != "cuda":
            raise BackendError(f"CUDA graphs need a GPU; this model runs on {self.device}")
        program = Program(self.graph)
        self._served = _Served(program, CapturedSteps(program))
        return self

    def exportable(self) -> nn.Module:
        """This model for torch.export.export(model.exportable(), args, kwargs).

        It holds the model itself, not a copy. The exported program calls fxquant's operators, so
        what loads it imports fxquant first.
        """
        return exportable(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model for `fxquant.load`: weights and table as they are, the graph as data.

        A model that was saved there before is replaced at a single stroke: whatever happens
        meanwhile, the folder holds the old one or the new one.

        Raises:
            ArtifactError: the folder cannot be written, the disk is full (what was there stays),
                the graph was edited, or calls what is not safe to run from a file: operators that
                are not ATen's or fxquant's own, that write to their arguments, or whose kernels
                trust what they are given. Compiling such a model says so (`summary.unsaved`).
        """
        save(self, folder)

    def to(self, *args: Any, **kwargs: Any) -> QuantizedModel:
        """Stay: the kernels were chosen for this device and the precision is the recipe's.

        Raises:
            BackendError: another device type was asked for.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        other = device is not None and device.index not in (None, self.device.index)
        if device is not None and (device.type != self.device.type or other):
            raise BackendError(
                f"this model's kernels were chosen for {self.device}; to serve on "
                f"{device}, move the float model there and compile it again"
            )
        if dtype is not None and dtype != self.dtype:
            log.warning("a compiled model keeps its precision; .to(%s) changes nothing", dtype)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """What .half() and .cuda() call, and .to() of an enclosing module: stay, as `to` says."""
        changed = fn(torch.empty(1, dtype=self.dtype, device=self.device))
        return self.to(changed.device, changed.dtype)


@functools.cache
def class_for(original: type[nn.Module]) -> type[QuantizedModel]:
    """QuantizedModel with the original's forward signature, which pipelines inspect."""

    def forward(self: QuantizedModel, *args: Any, **kwargs: Any) -> Any:
        return QuantizedModel.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    return type(
        f"Quantized{original.__name__}",
        (QuantizedModel,),
        {"forward": forward, "original": original, "__module__": __name__},
    )
