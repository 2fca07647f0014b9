"""The toy UNet's graph after every pass, for a fixed machine, made once per recipe."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.fx import GraphModule

from fxquant.calibration.calls import read_calls
from fxquant.compiler import FakeQuantised, fake_quantise
from fxquant.graph import runner
from fxquant.graph.capture import capture_calls
from fxquant.graph.dump import dump
from fxquant.graph.options import Options
from fxquant.graph.signature import Signature
from fxquant.kernels.machine import Machine
from fxquant.passes import pipelines
from fxquant.recipe import Recipe
from tests import models
from tests.golden import assert_golden


class Story:
    """Everything one compilation of the toy made."""

    def __init__(self, recipe: Recipe):
        self.model = models.build("toy")
        self.options = Options(recipe, machine=Machine.named("x86-vnni"))
        self.signature: Signature
        self.signature, self.calls = read_calls(models.calls("toy", 3, 2, 0), self.model)
        captured = capture_calls(self.model, self.signature, [self.calls[0]])
        self.graphs: dict[str, GraphModule] = {"capture": captured.graph_module}
        self.records: list[runner.Record] = []
        self.fake: FakeQuantised = fake_quantise(
            self.model, self.signature, self.calls, self.options, on_pass=self.records.append
        )
        runner.run(
            (*pipelines.LOWER, *pipelines.BIND),
            self.fake.graph,
            self.options,
            on_pass=self.records.append,
        )
        self.graphs |= {r.name: r.graph for r in self.records}

    def before(self, name: str) -> GraphModule:
        """The graph that pass `name` was given."""
        names = list(self.graphs)
        return self.graphs[names[names.index(name) - 1]]

    def __getitem__(self, name: str) -> GraphModule:
        return self.graphs[name]

    def run(self, gm: GraphModule) -> torch.Tensor:
        """The graph's result on the first call, whatever stage it is from."""
        extra = {"group": torch.zeros(2, dtype=torch.int64), "row": self.fake.table.row(0)}
        last = [n.name for n in gm.graph.nodes if n.op == "placeholder"][-1]
        with torch.no_grad():
            return gm(*self.calls[0], *([extra[last]] if last in extra else []))


def story(recipe: Recipe | None = None) -> Story:
    """The toy compiled with a recipe (w8a8-fast by default), made once."""
    return _story(recipe or Recipe.parse("w8a8-fast"))


_story = functools.cache(Story)


def golden(test_file: str, gm: GraphModule, *parts: str) -> None:
    """Compare the parts of a dump (module path prefixes; all of it by default) with NAME.txt."""
    here = Path(test_file)
    name = here.stem.removeprefix("test_")
    text = "".join(dump(gm, part) for part in parts) if parts else dump(gm)
    assert_golden(text, here.parent / "goldens" / f"{name}.txt")


def targets(gm: GraphModule) -> list[str]:
    """Names of the called operators, in order."""
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())
