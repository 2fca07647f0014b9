"""The systems that gpu_unet.py compares, by name; run as a script, the process that serves one.

Every process draws the same random weights on the GPU from the same seed.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import as_dtype, example, installed, run, timed, unet_of
from torch import Tensor, nn
from workers import NotMeasured, answer

FP32, FP16 = "fp32 eager", "fp16 eager"
_ROUND = 0.25  # seconds that a round takes at least, in whole steps
_MOST_STEPS = 20
_NOT_INT8 = ("time_emb", "time_embedding", "add_embedding")  # rows too few for torch._int_mm


@dataclass(frozen=True)
class Settings:
    """What is measured: a step of ``batch`` samples of ``size`` x ``size`` latents."""

    arch: str
    batch: int
    size: int | None
    calls: int
    device: str = "cuda"

    def model(self) -> nn.Module:
        """In float32 and channels_last."""
        torch.manual_seed(0)
        if self.arch == "digits":
            from fxquant import assets

            model: nn.Module = assets.load_digits_unet().to(self.device)
        else:
            with torch.device(self.device):
                model = unet_of(self.arch)
        return model.eval().to(memory_format=torch.channels_last)

    def half(self) -> nn.Module:
        """The model in float16."""
        return nn.Module.to(self.model(), torch.float16)  # diffusers' own `to` only warns more

    def call(self, model: nn.Module, seed: int) -> dict[str, Any]:
        return example(model, self.batch, self.size, seed)

    def timed_call(self, model: nn.Module) -> dict[str, Any]:
        """One that nothing was calibrated with."""
        return self.call(model, self.calls)


@dataclass(frozen=True)
class Served:
    """A system in this process: its step, and what else there is to say of it."""

    step: Callable[[], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        load: makes it ready in this process.
        packages: what must be installed.
        alone: it measures on the GPU while it compiles, so that nothing else may run.
    """

    load: Callable[[Settings], Served]
    packages: tuple[str, ...] = ()
    alone: bool = False


def eager(settings: Settings, dtype: torch.dtype) -> Served:
    """As diffusers runs it, channels_last."""
    torch.backends.cudnn.benchmark = True
    model = settings.model() if dtype == torch.float32 else settings.half()
    call = as_dtype(settings.timed_call(model), dtype)
    return Served(lambda: run(model, call))


def compiled(settings: Settings) -> Served:
    """Compiled in the first step, CUDA graphs included."""
    model = settings.half()
    return _max_autotune(model, as_dtype(settings.timed_call(model), torch.float16))


def torchao_int8(settings: Settings) -> Served:
    """Linears in int8, activations quantised on the way; the rest float16; compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = settings.half()
    call = as_dtype(settings.timed_call(model), torch.float16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=_may_be_int8)
    return _max_autotune(model, call)


def _may_be_int8(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not any(part in name for part in _NOT_INT8)


def _max_autotune(model: nn.Module, call: dict[str, Any]) -> Served:
    torch.backends.cudnn.benchmark = True
    faster = torch.compile(model, mode="max-autotune")

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(faster, call)

    return Served(step)


def fxquant(settings: Settings, recipe: str) -> Served:
    """Compiled on the GPU with a few calls; steps are CUDA graphs."""
    import fxquant as fx

    model = settings.model()
    calls = [settings.call(model, seed) for seed in range(settings.calls)]
    call = settings.timed_call(model)
    # A search of clipping ranges takes minutes and changes no time.
    chosen = fx.Recipe.parse(recipe).with_(weight_observer="absmax")
    quantised = fx.compile(model, calls, chosen, progress=False)
    del model
    if settings.device == "cuda":
        quantised.capture_steps()
    summary = quantised.summary
    facts = {
        "compile_seconds": dict(summary.seconds),
        "kernels": dict(summary.kernels),
        "fallbacks": list(summary.fallbacks),
        "weights_over_fp32": summary.bytes_after / summary.bytes_before,
    }
    return Served(lambda: run(quantised, call), facts)


SYSTEMS = {
    FP32: System(lambda settings: eager(settings, torch.float32)),
    FP16: System(lambda settings: eager(settings, torch.float16)),
    "fxquant W8A8": System(lambda settings: fxquant(settings, "w8a8-fast")),
    "fxquant W4A8": System(lambda settings: fxquant(settings, "w4a8-fast")),
    "fp16 torch.compile": System(compiled, alone=True),
    "torchao int8, compiled": System(torchao_int8, ("torchao",), alone=True),
}


def check_installed(name: str) -> None:
    """Raises NotMeasured, naming the packages that are missing."""
    missing = [p for p in SYSTEMS[name].packages if installed(p) is None]
    if missing:
        raise NotMeasured(f"{', '.join(missing)}: not installed")


class Process:
    """The commands of a serving process; each answers with something for JSON."""

    def __init__(self) -> None:
        self._served: Served | None = None
        self._steps = 1
        self._cuda = False

    def load(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Make it ready and take the first steps; seconds and facts."""
        chosen = Settings(**settings)
        self._cuda = chosen.device == "cuda"
        self._served, load = timed(lambda: SYSTEMS[name].load(chosen))
        first = self._seconds(1)
        peak = self._peak()
        self._seconds(2)  # what is captured at the second or third call is captured now
        once = self._seconds(1)
        self._steps = max(1, min(_MOST_STEPS, math.ceil(_ROUND / max(once, 1e-6))))
        self._forget()
        return {
            "load_seconds": load,
            "first_step_seconds": first,
            "peak_until_first_step_bytes": peak,
            "steps_a_round": self._steps,
            **self._served.facts,
        }

    def step(self) -> float:
        """Seconds of a step, of a round's."""
        return self._seconds(self._steps)

    def memory(self) -> int:
        """The most bytes that PyTorch held since loading was done."""
        return self._peak()

    def output(self, file: str) -> list[int]:
        """Write the result of a step; its shape. Float32 is float32 here."""
        assert self._served is not None
        torch.backends.cudnn.allow_tf32 = False
        result = self._served.step().float().cpu().numpy()
        np.save(file, result)
        return list(result.shape)

    def _seconds(self, steps: int) -> float:
        assert self._served is not None, "load first"
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self._served.step()
        self._wait()
        return (time.perf_counter() - started) / steps

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _peak(self) -> int:
        return torch.cuda.max_memory_reserved() if self._cuda else 0

    def _forget(self) -> None:
        """Give back what only loading took, and start the peak again."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Serve until the pipe is closed."""
    process = Process()
    answer({name: getattr(process, name) for name in ("load", "step", "memory", "output")})


if __name__ == "__main__":
    main()
