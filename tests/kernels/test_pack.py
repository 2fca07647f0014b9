"""Packed weights live as long as the weight, and follow its changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from typing import Any

import pytest
import torch

from fxquant.errors import BackendError
from fxquant.kernels import pack
from fxquant.kernels.machine import detect
from fxquant.kernels.pack import Packed
from fxquant.kernels.x86 import onednn
from tests.kernels import cases

needs_vnni = pytest.mark.skipif(
    detect().arch != "x86_64" or not detect().has_vnni, reason="the x86 kernels need VNNI"
)


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Packed:
        self.calls += 1
        return Packed(torch.zeros(1), torch.zeros(1))


def test_packed_once() -> None:
    weight, make = cases.integers(3, 4), Maker()
    assert pack.packed(weight, make) is pack.packed(weight, make)
    assert make.calls == 1


def test_equal_weights_are_packed_each() -> None:
    make = Maker()
    pack.packed(cases.integers(3, 4), make)
    other = cases.integers(3, 4)
    pack.packed(other, make)
    assert make.calls == 2


def test_a_changed_weight_is_packed_again() -> None:
    weight, make = cases.integers(3, 4), Maker()
    pack.packed(weight, make)
    weight.zero_()
    pack.packed(weight, make)
    assert make.calls == 2


class OnGpu:
    """As much of a weight on a GPU as is asked for."""

    device, is_cuda, _version = torch.device("cuda", 1), True, 0

    def is_inference(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return 1 << 20

    def untyped_storage(self) -> object:
        return self


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the current stream: "capturing" put in front is answered with yes."""
    done: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("waited")

    def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
        assert device == OnGpu.device
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capturing" in done)
    return done


def test_what_a_gpu_packs_is_there_before_it_is_handed_out(gpu: list[str]) -> None:
    weight: Any = OnGpu()

    def make() -> Packed:
        assert not gpu
        gpu.append("made")
        return Packed(torch.zeros(1), torch.zeros(1))

    first = pack.packed(weight, make)
    assert gpu == ["made", "waited"]
    assert pack.packed(weight, make) is first
    assert gpu == ["made", "waited"], "once"


def test_nothing_is_packed_into_a_cuda_graph(gpu: list[str]) -> None:
    weight: Any = OnGpu()
    gpu.append("capturing")
    make = Maker()
    with pytest.raises(BackendError, match="run the model once before the capture"):
        pack.packed(weight, make)
    assert make.calls == 0
    gpu.clear()
    first = pack.packed(weight, make)
    gpu.append("capturing")
    assert pack.packed(weight, make) is first, "a capture may use what is there"


def test_each_form_is_packed_once() -> None:
    weight, one, other = cases.integers(3, 4), Maker(), Maker()
    before = pack.count()
    first = pack.packed(weight, one, "one")
    second = pack.packed(weight, other, "other")
    assert first is not second
    assert pack.packed(weight, one, "one") is first
    assert pack.packed(weight, other, "other") is second
    assert (one.calls, other.calls, pack.count() - before) == (1, 1, 1)
    weight.zero_()
    assert pack.packed(weight, one, "one") is not first


def test_an_inference_weight_is_packed_each_time() -> None:
    """It counts no changes: what is kept may be of other numbers."""
    make = Maker()
    with torch.inference_mode():
        weight = cases.integers(3, 4)
        pack.packed(weight, make)
        pack.packed(weight.neg_(), make)
    assert make.calls == 2


def test_the_pack_dies_with_the_weight() -> None:
    gc.collect()
    before = pack.count()
    weight = cases.integers(3, 4)
    pack.packed(weight, Maker())
    assert pack.count() == before + 1
    del weight
    gc.collect()
    assert pack.count() == before


def test_threads_pack_once() -> None:
    weight, make, start = cases.integers(3, 4), Maker(), threading.Barrier(8)

    def use() -> None:
        start.wait()
        pack.packed(weight, make)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1


@needs_vnni
def test_an_op_uses_what_was_prepared() -> None:
    args = cases.linear_args()
    prepared = onednn.prepare_linear(args[3], 8, 24)
    before = pack.count()
    cases.call("linear", "onednn", *args)
    assert pack.count() == before
    assert onednn.prepare_linear(args[3], 8, 24) is prepared
    args = cases.conv2d_args()
    prepared = onednn.prepare_conv2d(args[3], 8, 11, [3, 3])
    before = pack.count()
    cases.call("conv2d", "onednn", *args)
    assert pack.count() == before


@needs_vnni
def test_an_op_sees_a_weight_that_changed() -> None:
    args = cases.linear_args()
    first = cases.call("linear", "onednn", *args)
    args[3].neg_()
    expected = cases.call("linear", "reference", *args)
    cases.assert_near(cases.call("linear", "onednn", *args), expected)
    assert not torch.allclose(first, expected)


@needs_vnni
def test_a_module_with_packed_weights_can_be_copied() -> None:
    module = torch.nn.Module()
    args = cases.linear_args()
    module.register_buffer("weight", args[3])
    expected = cases.call("linear", "onednn", *args)
    copied = copy.deepcopy(module)
    assert torch.equal(
        cases.call("linear", "onednn", *args[:3], copied.weight, *args[4:]), expected
    )
