"""Models that were compiled on a CPU, on the GPU: every operator against the reference on equal
inputs, and the whole by its error to the float model (see tests/test_op_by_op.py for why)."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

import fxquant
from fxquant.assets import load_digits_unet
from fxquant.errors import FallbackError
from fxquant.graph.lowered import arguments, is_op
from fxquant.kernels.cutlass import gemm
from fxquant.kernels.machine import detect
from fxquant.recipe import Recipe
from fxquant.runtime.model import QuantizedModel
from tests import models

CASES = [
    (name, bits, dtype)
    for name in ("digits", "sd", "sdxl")
    for bits in ("w8a8-fast", "w4a8-fast")
    for dtype in ("auto", "float32")
]
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
END_TO_END = 1.1
SAME = 1e-3  # float operators of torch need not choose the same algorithm every time
cases = pytest.mark.parametrize(("name", "recipe", "dtype"), CASES)


class Saved:
    """A model compiled on the CPU and saved; and what the float model makes of its calls."""

    def __init__(self, name: str, recipe: Recipe):
        model, self.calls = float_model(name)
        self.truth = results(model, self.calls)
        self._folder = tempfile.TemporaryDirectory(prefix="fxquant-gpu-")
        self.folder = Path(self._folder.name)
        compiled = fxquant.compile(model, self.calls, recipe, backend="reference", progress=False)
        compiled.save_pretrained(self.folder)

    @functools.cached_property
    def on_gpu(self) -> QuantizedModel:
        return fxquant.load(self.folder, device="cuda")

    @functools.cached_property
    def reference_error(self) -> float:
        """Of the reference on the CPU, its float parts in float32."""
        return self.error(fxquant.load(self.folder, backend="reference"))

    def error(self, model: nn.Module, device: str = "cpu") -> float:
        """Relative error to the float model over all calls."""
        result = results(model, [moved(call, device) for call in self.calls]).cpu()
        return float((result - self.truth).norm() / self.truth.norm())


@functools.cache
def saved(name: str, recipe: str = "w8a8-fast", dtype: str = "auto", groups: int = 1) -> Saved:
    options = {"compute_dtype": dtype, "timestep_groups": groups, "weight_observer": "absmax"}
    return Saved(name, Recipe.parse(recipe).with_(**options))


def float_model(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    if name != "digits":
        return models.build(name), models.calls(name, n=3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3, 7, 9])
    calls = [
        {
            "sample": torch.randn(4, 1, 16, 16, generator=generator),
            "timestep": torch.tensor(t),
            "class_labels": labels,
        }
        for t in (999, 500, 0)
    ]
    return load_digits_unet(), calls


def results(model: nn.Module, calls: list[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**call, return_dict=False)[0].float() for call in calls])


def moved(value: Any, device: str) -> Any:
    """Tensors and devices in nested arguments."""

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        return torch.device(device) if isinstance(part, torch.device) else part

    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return map_aggregate(value, move)


class Compared(Interpreter):
    """Runs a graph on the GPU, and each of its operators on the CPU too, on the same inputs."""

    def __init__(self, model: QuantizedModel):
        super().__init__(model.graph)
        self.wrong: list[str] = []
        self.kernels: set[str] = set()
        self.count = 0

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = self.call_function(n.target, args, kwargs)
        if isinstance(result, Tensor):
            args, kwargs = moved(args, "cpu"), {k: moved(v, "cpu") for k, v in kwargs.items()}
            if is_op(n):
                self.kernels.add(str(arguments(n)["kernel"]))
                args = (*args[:-1], "reference")
            self.look_at(n, result, self.call_function(n.target, args, kwargs))
        return result

    def look_at(self, node: Node, result: Tensor, wanted: Tensor) -> None:
        self.count += 1
        assert result.is_cuda, f"{node.name} ran on {result.device}"
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        actual = result.cpu()
        if wanted.is_floating_point():
            a, b = actual.double(), wanted.double()
            error, limit = float((a - b).norm() / b.norm().clamp(min=1e-30)), LIMITS[wanted.dtype]
        else:
            error = float((actual.long() - wanted.long()).abs().max())
            limit = 1 if wanted.dtype == torch.int8 else 0
        if not error <= limit:
            self.wrong.append(f"{node.name} ({node.target}): {error:.3g} > {limit:g}")


@cases
def test_every_operator_equals_the_reference_on_the_same_inputs(
    name: str, recipe: str, dtype: str
) -> None:
    made = saved(name, recipe, dtype)
    model = made.on_gpu
    tensors = model.signature.flatten((), moved(made.calls[0], "cuda"))
    compared = Compared(model)
    with torch.no_grad():
        compared.run(*tensors, model.table.row(0))
    assert compared.wrong == []
    assert compared.count > 20
    layer = "cutlass" if recipe.startswith("w8") else "cutlass_int4"
    assert {layer, "cuda"} <= compared.kernels
    assert "reference" not in compared.kernels


@cases
def test_the_error_to_the_float_model_is_that_of_the_reference(
    name: str, recipe: str, dtype: str
) -> None:
    made = saved(name, recipe, dtype)
    simulated = saved(name, recipe, "float32").reference_error
    assert 1e-4 < simulated < 0.6
    assert made.error(made.on_gpu, "cuda") <= END_TO_END * simulated


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_captured_steps_are_eager_steps(recipe: str) -> None:
    made = saved("sdxl", recipe)
    eager = results(made.on_gpu, [moved(call, "cuda") for call in made.calls])
    captured = fxquant.load(made.folder, device="cuda").capture_steps()
    for _ in range(2):  # a capture, then replays
        assert_near(results(captured, [moved(call, "cuda") for call in made.calls]), eager)


def test_captured_steps_of_several_shapes() -> None:
    made = saved("sd")
    captured = fxquant.load(made.folder, device="cuda").capture_steps()
    for batch in (2, 1, 2, 4):
        call = moved(models.calls("sd", n=1, batch=batch)[0], "cuda")
        assert_near(results(captured, [call]), results(made.on_gpu, [call]))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_step_waits_for_nothing(groups: int, captured: bool) -> None:
    model = fxquant.load(saved("sd", groups=groups).folder, device="cuda")
    if captured:
        model.capture_steps()
    calls = [moved(call, "cuda") for call in models.calls("sd", n=3)]
    first = results(model, calls)
    waiting_is_an_error(lambda: [model(**call) for call in calls])
    assert_near(results(model, calls), first)


def waiting_is_an_error(run: Callable[[], object]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_groups_of_timesteps_take_their_own_row() -> None:
    made = saved("sd", groups=3)
    model = made.on_gpu
    assert model.table.values.shape[0] == 3
    mixed = moved(made.calls[0], "cuda")
    apart = [mixed | {"timestep": torch.tensor(t, device="cuda")} for t in (999, 0)]
    wanted = torch.stack([results(model, [call])[k] for k, call in enumerate(apart)])
    both = results(model, [mixed | {"timestep": torch.tensor([999, 0], device="cuda")}])
    assert_near(both, wanted, 1e-2)  # another batch size may have other float kernels


def test_compile_of_a_model_on_the_gpu() -> None:
    made = saved("digits")
    model, calls = float_model("digits")
    model = model.cuda()
    calls = [moved(call, "cuda") for call in calls]
    compiled = fxquant.compile(model, calls, "w8a8-fast", progress=False, strict=True)
    assert compiled.device.type == "cuda"
    assert compiled.summary.fallbacks == ()
    assert (
        made.error(compiled, "cuda")
        <= END_TO_END * saved("digits", dtype="float32").reference_error
    )
    with tempfile.TemporaryDirectory(prefix="fxquant-gpu-") as folder:
        compiled.save_pretrained(folder)
        again = fxquant.load(folder, device="cuda")
        on_cpu = fxquant.load(folder, backend="reference")
    assert_near(results(again, calls), results(compiled, calls))
    assert made.error(on_cpu) < 0.6


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine where nothing was built."""
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    for cached in (detect, gemm._gpu):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (detect, gemm._gpu):
        cached.cache_clear()


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
@pytest.mark.usefixtures("no_libraries")
def test_without_libraries_a_slower_path_serves_and_says_so(
    recipe: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fxquant"), "propagate", True)
    made = saved("sd", recipe)
    with caplog.at_level(logging.WARNING, "fxquant"):
        model = fxquant.load(made.folder, device="cuda")
    notices = [r.getMessage() for r in caplog.records if "fxquant kernels build" in r.getMessage()]
    assert len(notices) == 1, notices
    assert model.summary.fallbacks
    assert {kernel.split()[-1] for kernel in model.summary.kernels} <= {
        "int_mm", "reference", "sdpa",
    }  # fmt: skip
    simulated = saved("sd", recipe, "float32").reference_error
    assert made.error(model, "cuda") <= END_TO_END * simulated
    with pytest.raises(FallbackError, match="kernels build"):
        fxquant.load(made.folder, device="cuda", strict=True)


def assert_near(actual: Tensor, wanted: Tensor, limit: float = SAME) -> None:
    assert actual.isfinite().all()
    assert (actual - wanted).norm() <= limit * wanted.norm()
