"""What a lesser machine does: strict=True refuses it by name, without it results stay close."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import assets
from fxquant.errors import BackendError, FallbackError
from fxquant.kernels.machine import detect
from fxquant.recipe import Override
from tests.runtime import compiled as c
from tests.toy import relative_error

COMPILE_DIGITS = """
import sys
import torch
import fxquant
from fxquant import assets

calls = torch.load(sys.argv[1])
model = fxquant.compile(assets.load_digits_unet(), calls, progress=False)
torch.save((model(**calls[0], return_dict=False)[0], dict(model.summary.kernels),
            model.summary.fallbacks), sys.argv[2])
"""


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """$PATH is empty."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    detect.cache_clear()
    yield
    monkeypatch.undo()
    detect.cache_clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.skipif(not c.FULL_SPEED, reason="the compiler is not all that is missing here")
def test_strict_without_a_compiler_names_the_nodes_and_the_remedy() -> None:
    with pytest.raises(FallbackError) as caught:
        c.compile_mite(strict=True)
    first, *nodes = str(caught.value).splitlines()
    assert "strict=True" in first
    assert "Install a C++ compiler, or point $CXX at one." in first
    assert [line.split(":")[0].strip() for line in nodes] == ["fq_0, fq_1"]
    assert all("there is no C++ compiler" in line for line in nodes)


@pytest.mark.usefixtures("no_compiler")
def test_without_strict_the_model_still_computes() -> None:
    model, call = c.mite(), c.mite_calls(seed=1)[1]
    quantised = c.compile_mite(c.float32(), model)
    assert any("no C++ compiler" in text for text in quantised.summary.fallbacks)
    assert relative_error(c.result(quantised, call), c.result(model, call)) < 0.05


def test_strict_refuses_layers_that_would_only_be_simulated() -> None:
    wide = c.float32(overrides=(Override("conv", weight_bits=16),))
    with pytest.raises(FallbackError, match=r"at most 8 bits, or keep_float(.|\n)*simulated"):
        c.compile_mite(wide, strict=True)
    simulated = c.compile_mite(wide)
    assert any("simulated" in text for text in simulated.summary.fallbacks)


def test_an_unknown_backend_is_refused_before_any_work() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'x68'\. Did you mean 'x86'\?"):
        fxquant.compile(c.mite(), None, backend="x68")  # type: ignore[arg-type]


def test_a_recipe_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    c.float32(overrides=(Override("conv", weight_bits=4),)).save(path)
    precision = c.compile_mite(str(path)).summary.precision
    assert precision["w4a8"] == 1
    assert precision["w8a8"] == 1


@pytest.mark.slow  # two processes compile the digits model
def test_hiding_the_cpu_hardly_changes_the_image(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = [
        {
            "sample": torch.randn(4, 1, 16, 16, generator=generator),
            "timestep": torch.tensor(t),
            "class_labels": torch.arange(4),
        }
        for t in (900, 500, 100)
    ]
    torch.save(calls, tmp_path / "calls.pt")
    full, generic = (_compiled_with(level, tmp_path) for level in (None, "generic"))
    with torch.no_grad():
        wanted = assets.load_digits_unet()(**calls[0], return_dict=False)[0]
    if c.FULL_SPEED:
        assert generic[1]["conv2d gemm"] == full[1]["conv2d gemm"] > 0
        assert not full[2]
        assert not generic[2]
    errors = [relative_error(image, wanted) for image, *_ in (full, generic)]
    assert max(errors) < 0.05
    assert max(errors) < 1.5 * min(errors)


def _compiled_with(level: str | None, folder: Path) -> tuple[torch.Tensor, dict[str, int], list]:
    """Result, kernels and fallbacks of a process with FXQUANT_CPU at a level."""
    environment = {k: v for k, v in os.environ.items() if k != "FXQUANT_CPU"}
    environment |= {"FXQUANT_CPU": level} if level else {}
    result = folder / f"{level}.pt"
    command = [sys.executable, "-c", COMPILE_DIGITS, str(folder / "calls.pt"), str(result)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    image, kernels, fallbacks = torch.load(result)
    return image, kernels, fallbacks
