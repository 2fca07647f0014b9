"""Machines as values, and the mask over the real one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.errors import SettingError
from fxquant.graph.options import Options
from fxquant.kernels import machine
from fxquant.kernels.machine import Machine, detect


def test_masks_nest() -> None:
    everything = frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"})
    levels = ["generic", "avx2", "avx512", "vnni"]
    left = [machine.mask(everything, level) for level in levels]
    assert left[0] == frozenset()
    assert left[1] == {"avx2", "fma"}
    assert left[2] == {"avx2", "fma", "avx512f"}
    assert left[3] == everything - {"amx_int8"}
    assert machine.mask(everything, None) == everything


def test_a_mask_adds_nothing() -> None:
    assert machine.mask(frozenset({"avx2"}), "vnni") == {"avx2"}


def test_an_unknown_mask_is_refused() -> None:
    with pytest.raises(SettingError, match="FXQUANT_CPU='sse' is not one of generic, avx2"):
        machine.mask(frozenset(), "sse")


def test_detect_obeys_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CPU", "avx512")
    masked = detect.__wrapped__()
    assert not masked.has_vnni
    assert masked.arch == machine.arch()
    monkeypatch.delenv("FXQUANT_CPU")
    assert detect.__wrapped__().cpu_features == machine.cpu_features()


def test_detect_is_cached() -> None:
    assert detect() is detect()


def test_a_gpu_is_looked_at_only_for_what_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of two GPUs: asking one initialises CUDA, which the CPU does not need."""
    asked = list[str]()

    def capability(device: str) -> tuple[int, int]:
        asked.append(device)
        return {"cuda:0": (8, 6), "cuda:1": (9, 0)}[device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    detect.cache_clear()
    try:
        assert detect().cuda is Options().machine.cuda is None
        assert not asked
        assert (detect("cuda:1").cuda, detect("cuda:0").cuda) == ("9.0", "8.6")
        assert asked == ["cuda:1", "cuda:0"]
    finally:
        detect.cache_clear()


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.linear(sample))


def test_a_model_on_the_cpu_leaves_the_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("CUDA would be initialised")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_device_capability", "get_device_properties", "current_device", "init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    detect.cache_clear()
    try:
        made = fxquant.compile(Layer(), [(torch.randn(2, 16),)], progress=False)
        made.save_pretrained(tmp_path)
        loaded = fxquant.load(tmp_path)
        assert torch.equal(loaded(torch.ones(2, 16))[0], made(torch.ones(2, 16))[0])
    finally:
        detect.cache_clear()


def test_a_missing_compiler_is_noticed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert detect.__wrapped__().compiler is None
    assert [r.getMessage() for r in caplog.records if "No C++ compiler" in r.getMessage()]


def test_named() -> None:
    assert Machine.named("x86-vnni").has_vnni
    assert not Machine.named("x86-avx512").has_vnni
    assert Machine.named("cuda-sm80").cuda == "8.0"
    with pytest.raises(ValueError, match="no machine is named 'vax'; there are x86-vnni"):
        Machine.named("vax")


def test_presets_differ() -> None:
    assert len(set(machine.PRESETS.values())) == len(machine.PRESETS)
