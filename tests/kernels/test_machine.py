"""Machines as values, and the mask over the real one."""

from __future__ import annotations

import logging

import pytest

from fxquant.errors import SettingError
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
