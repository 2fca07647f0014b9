"""A model is loaded again whatever its forward's arguments are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import ArtifactError
from tests.runtime import compiled as c
from tests.runtime import saved


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def through(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.first(x)))


class Builtins(_Layers):
    def forward(self, input: Tensor, type: Tensor, id: Tensor, lambda_: Tensor) -> Tensor:  # noqa: A002
        return self.through(input + 2 * type - id * lambda_)


class WeightsOfPasses(nn.Module):
    """Weights that are called what the passes call their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.group = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample * self.row) + self.group


class InputsOfPasses(_Layers):
    def forward(self, group: Tensor, row: Tensor, output: Tensor) -> Tensor:
        return self.through(group + 2 * row - output)


class Capitals(_Layers):
    def forward(self, Sample: Tensor, Timestep: Tensor, sample: Tensor, Row: Tensor) -> Tensor:  # noqa: N803
        return self.through(Sample + 2 * Timestep - sample * Row)


class Alike(_Layers):
    """Arguments that are one name with dots replaced, or the name of a weight's node."""

    def forward(self, a: dict[str, Tensor], a_b: Tensor, first_weight: Tensor) -> Tensor:
        return self.through(a["b"] + 2 * a_b - first_weight)


def check(module: nn.Module, calls: list[Any], folder: Path) -> None:
    model = c.compiled(module.eval(), calls)
    model.save_pretrained(folder)
    loaded = fxquant.load(folder)
    assert loaded.signature == model.signature
    with torch.no_grad():
        for call in calls:
            given = call.values() if isinstance(call, dict) else call
            truth, expected = module(*given), model(*given)
            assert (expected - truth).norm() < 0.1 * truth.norm()
            assert torch.equal(loaded(*given), expected)
            named = dict(zip(loaded.signature.parameters, given, strict=True))
            assert torch.equal(loaded(**named), expected)


def _tensor(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_plain_sequential(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3))
    check(module, [(_tensor(seed),) for seed in range(2)], tmp_path)


def test_sizes_stay_free_where_a_graph_needs_a_least_one(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
    model = c.compiled(module, [(_tensor(0),)])
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    for size in (8, 9, 20):
        x = torch.randn(1, 4, size, size)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("kind", "count"), [(Builtins, 4), (InputsOfPasses, 3), (Capitals, 4), (WeightsOfPasses, 1)]
)
def test_arguments_with_names_that_others_use(
    kind: type[nn.Module], count: int, tmp_path: Path
) -> None:
    calls = [tuple(_tensor(10 * call + k) for k in range(count)) for call in range(2)]
    check(kind(), calls, tmp_path)


def test_arguments_with_names_that_become_one(tmp_path: Path) -> None:
    calls = [({"b": _tensor(k)}, _tensor(10 + k), _tensor(20 + k)) for k in range(2)]
    check(Alike(), calls, tmp_path)


def test_a_name_that_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    calls = [({"b": _tensor(0), "text-embeds": _tensor(1)}, _tensor(2), _tensor(3))]
    model = c.compiled(Alike().eval(), calls)
    saved.mite().save_pretrained(tmp_path)
    before = saved.files(tmp_path)
    with pytest.raises(ArtifactError, match="text-embeds"):
        model.save_pretrained(tmp_path)
    assert saved.files(tmp_path) == before
