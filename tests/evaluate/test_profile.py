"""Time by kind of operator and interleaved timing, on a clock that the tests turn."""

from __future__ import annotations

from collections import Counter

import pytest

from fxquant.evaluate import profile
from fxquant.evaluate.profile import Timing, interleaved, kind, time_by_kind
from tests.runtime.compiled import toy
from tests.toy import story


class Clock:
    """perf_counter that moves only when told to, or by `tick` each time it is read."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profile.time, "perf_counter", made)
    return made


def test_systems_take_turns_and_the_warm_up_does_not_count(clock):
    order: list[str] = []
    seconds = {"a": [100, 50, 3, 1, 2], "b": [0, 0, 7, 7, 9]}

    def system(name: str):
        def run() -> None:
            order.append(name)
            clock.now += seconds[name].pop(0)

        return run

    found = interleaved({"a": system("a"), "b": system("b")}, rounds=3, warmup=2)
    assert found == {"a": Timing(2, 1, 3), "b": Timing(7, 7, 9)}
    assert order == ["a", "b"] * 5


def test_every_operator_is_counted_once(monkeypatch):
    model = toy("w8a8-fast")
    monkeypatch.setattr(profile.time, "perf_counter", Clock(tick=1.0))
    found = time_by_kind(model, story().calls[0], rounds=2, warmup=1)
    nodes = Counter(kind(n) for n in model.graph.graph.nodes if n.op == "call_function")
    assert {t.kind: t.calls for t in found} == nodes
    assert {t.kind: t.seconds for t in found} == nodes  # each node takes one tick
    assert [t.seconds for t in found] == sorted((t.seconds for t in found), reverse=True)


def test_kinds_name_operator_and_kernel():
    nodes = [n for n in toy("w8a8-fast").graph.graph.nodes if n.op == "call_function"]
    kinds = {kind(n) for n in nodes}
    assert {"aten.conv2d", "aten.linear", "sizes"} <= kinds
    conv = next(n for n in nodes if str(n.target) == "fxquant.conv2d.default")
    assert kind(conv) == f"fxquant.conv2d {conv.args[-1]}"
