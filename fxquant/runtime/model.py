"""QuantizedModel: the lowered graph behind the face of the module it came from."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import BackendError, CallError
from fxquant.graph.signature import Signature
from fxquant.quant.table import ActivationTable
from fxquant.recipe import Recipe
from fxquant.runtime.artifact import save
from fxquant.runtime.cuda_graph import CapturedSteps
from fxquant.runtime.manifest import Origin
from fxquant.runtime.program import Program
from fxquant.runtime.replay import ReplayedSteps
from fxquant.runtime.summary import Summary

log = logging.getLogger(__name__)


@dataclass
class DenoiserOutput(BaseOutput):
    """What a module without an output class of its own returns for return_dict=True."""

    sample: Tensor


class _Served(NamedTuple):
    """A graph's program and what calls it: replaced as one, since other threads may be serving."""

    program: Program
    steps: Callable[..., Tensor]


class QuantizedModel(nn.Module):
    """A compiled model: same arguments, outputs, config and dtype as the original.

    Calls may have any batch size, and any height and width that the original takes; several threads
    may call at once. Weights are int8 or packed int4 buffers. The precision is the recipe's: asking
    for another dtype with `.to()` changes nothing and says so.

    Attributes:
        graph: the lowered fx.GraphModule; it takes the flat tensors of `signature` and a table row.
        table: activation scales and zero points by timestep.
        config: the original's config, if it had one.
        summary: what compile() did; print it.
        origin: what saving it needs to know.

    Args:
        owned: the tensors belong to this model alone and need not be copied.
    """

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
    ):
        super().__init__()
        self.graph = graph
        self.table = table
        self.signature = signature
        self.recipe = recipe
        self.summary = summary
        self.config = config
        self.origin = origin
        self._output = output
        if not owned:
            _own_tensors(self)
        self._served = self._uncaptured()
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of inputs and outputs, the original's."""
        return self.signature.dtype

    @property
    def device(self) -> torch.device:
        return self.table.values.device

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward.

        Raises:
            CallError: arguments, or sizes, other than those the model was captured with.
        """
        tensors = self.signature.flatten(args, kwargs)
        alike = self.signature.has_one_timestep(args, kwargs)
        for name, tensor in zip(self.signature.names, tensors, strict=True):
            if tensor.device != self.device:
                raise CallError(f"{name} is on {tensor.device}, the model on {self.device}")
        result = self.run(tensors, alike)
        return self._returned(result, self.signature.return_dict(args, kwargs))

    def _returned(self, result: Tensor, return_dict: bool) -> Any:
        """What the original returns around its tensor."""
        returned = self.signature.returned(result)
        if self._output is None:
            return returned
        if self.signature.takes_return_dict:
            return self._output(result) if return_dict else returned
        return self._output(**returned)

    def run(self, tensors: Sequence[Tensor], alike: bool = False) -> Tensor:
        """The graph on flat tensors; samples whose timesteps use different rows run apart.

        Args:
            alike: all samples have one timestep. Then the row is chosen where the table is, and
                nothing waits for a GPU.
        """
        index = self.signature.timestep_index
        if self.table.values.shape[0] == 1 or index is None:
            return self._step(tensors, self.table.row(0))
        if alike:
            return self._step(tensors, self.table.rows(tensors[index].reshape(-1)[:1])[0])
        groups = self.table.group(tensors[index].reshape(-1))
        result: Tensor | None = None
        for group in groups.unique().tolist():
            chosen = groups == group
            if bool(chosen.all()):
                return self._step(tensors, self.table.row(group))
            part = self._step(self._samples(tensors, chosen), self.table.row(group))
            if result is None:
                result = part.new_empty(groups.shape[0], *part.shape[1:])
            result[chosen] = part
        assert result is not None
        return result

    def _samples(self, tensors: Sequence[Tensor], chosen: Tensor) -> list[Tensor]:
        """The inputs of some samples of a call, a mask [B]; tables without a batch are for all."""
        factors = self.signature.limits.batch_factors()
        if any(factor > 1 for factor in factors) or not factors[0]:
            raise CallError(
                "the samples of this call have timesteps with different activation ranges, and "
                "this model's inputs cannot be split by sample; call it for each timestep alone"
            )
        return [t[chosen] if f else t for t, f in zip(tensors, factors, strict=True)]

    def _step(self, tensors: Sequence[Tensor], row: Tensor) -> Tensor:
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model for `fxquant.load`: weights and table as they are, the graph as data.

        A model that was saved there before is replaced at a single stroke: whatever happens
        meanwhile, the folder holds the old one or the new one.

        Raises:
            ArtifactError: the folder cannot be written, the disk is full (what was there stays), or
                the graph has an operator that the saved form does not know.
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


def _own_tensors(module: nn.Module) -> None:
    """Replace tensors that may be shared by copies without gradients.

    Layers that stayed float still hold the original model's own parameters; and tensors made in
    inference mode count no changes, so that kernels could not tell when to pack them again. Integer
    weights were made by lowering, for this model alone: copying them would only cost memory.
    """
    copies: dict[int, Tensor] = {}  # tied tensors stay tied

    @torch.no_grad()
    def copy(tensor: Tensor) -> Tensor:
        new = tensor.detach().clone()
        return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new

    with torch.inference_mode(mode=False):
        for part in module.modules():
            owners: list[Any] = [part._parameters, part._buffers]
            for tensors in owners:
                for name, tensor in tensors.items():
                    if tensor is not None and not _is_integer_weight(tensor):
                        if id(tensor) not in copies:
                            copies[id(tensor)] = copy(tensor)
                        tensors[name] = copies[id(tensor)]


def _is_integer_weight(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.uint8) and not tensor.is_inference()


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
        {"forward": forward, "__module__": __name__},
    )


def output_class(original: type[nn.Module]) -> type[Any] | None:
    """The dataclass that forward's annotation promises, a plain one if it takes return_dict."""
    parameters = inspect.signature(original.forward).parameters
    if "return_dict" not in parameters:
        return None
    promised = _annotated_return(original.forward)
    for candidate in (promised, *typing.get_args(promised)):
        if inspect.isclass(candidate) and is_dataclass(candidate):
            return candidate
    return DenoiserOutput


def output_for(signature: Signature) -> type[Any] | None:
    """The output class of a model whose original class is not known."""
    return DenoiserOutput if signature.takes_return_dict else None


def _annotated_return(function: Callable[..., Any]) -> Any:
    try:
        return typing.get_type_hints(function).get("return")
    except NameError:  # an annotation that only type checkers can resolve
        return None
