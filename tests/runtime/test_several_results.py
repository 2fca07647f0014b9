"""Modules that return more than one tensor: ControlNets' residuals, a video and its sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

import fxquant
from fxquant.errors import CallError
from tests.runtime import compiled as c
from tests.toy import relative_error


class Nested(nn.Module):
    """Lists in tuples in dicts, None, and one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Any]:
        hidden = self.conv_in(sample) * (1 + timestep[:, None, None, None] / 1000)
        low = self.down(hidden.relu())
        return {"residuals": [(hidden, None), low], "middle": self.out(low), "again": low}


def calls(batch: int = 2) -> list[c.Call]:
    return [
        {"sample": torch.randn(batch, 4, 8, 8), "timestep": torch.full((batch,), t)}
        for t in (0.0, 300.0, 600.0, 900.0)
    ]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif value is not None:
        yield value


def shape_of(value: Any) -> Any:
    """Its nesting, with sizes for tensors."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(shape_of, value))
    return value if value is None else list(value.shape)


@torch.no_grad()
def check(found: Any, wanted: Any) -> None:
    assert shape_of(found) == shape_of(wanted)
    for a, b in zip(tensors(found), tensors(wanted), strict=True):
        assert relative_error(a, b) < 0.05


@pytest.mark.parametrize("groups", [1, 2])
def test_they_nest_as_the_module_nests_them(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    given = calls()
    quantised = c.compiled(model, given, c.float32(keep_float=(), timestep_groups=groups))
    for call in (*given, *given):  # recorded, then replayed where steps are
        check(quantised(**call), model(**call))
    mixed = {"sample": torch.randn(3, 4, 12, 8), "timestep": torch.tensor([0.0, 900.0, 0.0])}
    check(quantised(**mixed), model(**mixed))
    quantised.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    for a, b in zip(tensors(loaded(**mixed)), tensors(quantised(**mixed)), strict=True):
        assert torch.equal(a, b)


class Summed(Nested):
    """One number for the whole call beside the picture."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        result = super().forward(sample, timestep)["middle"]
        return result, result.mean((1, 2, 3)).sum(0, keepdim=True)


def test_what_is_no_samples_own_is_not_put_together_of_parts() -> None:
    torch.manual_seed(0)
    model = Summed().eval()
    quantised = c.compiled(model, calls(), c.float32(keep_float=(), timestep_groups=2))
    given = calls()[1]
    assert relative_error(quantised(**given)[0], model(**given)[0].detach()) < 0.05
    mixed = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0.0, 900.0])}
    with pytest.raises(CallError, match="takes or returns cannot be split by sample"):
        quantised(**mixed)


def test_a_result_is_the_callers_own() -> None:
    """Replay writes to memory that stays in place; what was returned must not change with it."""
    torch.manual_seed(0)
    quantised = c.compiled(Nested().eval(), calls(), c.float32(keep_float=()))
    given = calls()[0]
    results = [quantised(**given) for _ in range(4)]
    kept = [[t.clone() for t in tensors(result)] for result in results]
    quantised(**calls()[3])
    for result, copies in zip(results, kept, strict=True):
        assert all(map(torch.equal, tensors(result), copies))


def test_they_can_be_reconstructed() -> None:
    torch.manual_seed(0)
    model, given = Nested().eval(), calls(4)
    settings = {"iters": 3, "batch": 4, "sampler": "uniform"}
    recipe = c.float32("w4a8", keep_float=(), reconstruction=settings)
    quantised = c.compiled(model, given, recipe)
    assert quantised.summary.units
    for a, b in zip(tensors(quantised(**given[0])), tensors(model(**given[0])), strict=True):
        assert relative_error(a.detach(), b.detach()) < 0.3


def test_a_controlnet_returns_its_class_or_a_tuple(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ControlNetModel(
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(16, 32),
    ).eval()
    for parameter in model.parameters():  # they start as zeros
        nn.init.normal_(parameter, std=0.1)
    given = [
        {
            "sample": torch.randn(2, 4, 16, 16),
            "timestep": torch.tensor(t),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "controlnet_cond": torch.randn(2, 3, 32, 32),
            "conditioning_scale": 0.5,
        }
        for t in (900, 500, 100)
    ]
    quantised = c.compiled(model, given, c.float32())
    result = quantised(**given[0])
    assert type(result) is type(model(**given[0]))
    check(
        [*result.down_block_res_samples, result.mid_block_res_sample],
        list(tensors(model(**given[0], return_dict=False))),
    )
    check(quantised(**given[1], return_dict=False), model(**given[1], return_dict=False))
    quantised.save_pretrained(tmp_path)
    check(fxquant.load(tmp_path)(**given[2])[0], model(**given[2])[0])
