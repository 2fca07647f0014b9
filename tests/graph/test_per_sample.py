"""Lists with one entry for each sample: their length is the batch, and no part of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CallError
from fxquant.graph.signature import signature_of
from fxquant.graph.structure import SAMPLES, Skeleton, from_json, to_json


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Packed(nn.Module):
    """Tokens of images whose height and width stand beside them, as QwenImage has them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, tokens: Tensor, img_shapes: list[list[tuple[int, int]]]) -> Tensor:
        (height, width) = img_shapes[0][0]
        image = self.proj(tokens).unflatten(1, (height, width))
        return (image + torch.linspace(0, 1, width)[:, None]).flatten(1, 2)


class Each(Packed):
    """Asks for the shape of every image."""

    def forward(self, tokens: Tensor, img_shapes: list[list[tuple[int, int]]]) -> Tensor:
        shapes = iter(img_shapes)
        parts = [super(Each, self).forward(t[None], [next(shapes)]) for t in tokens]
        return torch.cat(parts)


def call(batch: int, *shapes: tuple[int, int]) -> dict[str, Any]:
    given = [[s] for s in shapes or [(3, 4)] * batch]
    return {"tokens": torch.randn(batch, 12, 16), "img_shapes": given}


def error(compiled: nn.Module, model: nn.Module, given: dict[str, Any]) -> float:
    with torch.no_grad():
        expected = model(**given)
        return float((compiled(**given) - expected).norm() / expected.norm())


def test_a_list_of_what_is_the_same_for_all_samples_is_as_long_as_the_batch(
    tmp_path: Path,
) -> None:
    model = Packed().eval()
    compiled = fxquant.compile(model, [call(2), call(2)])
    compiled.save_pretrained(tmp_path)
    for served in (compiled, fxquant.load(tmp_path)):
        assert all(error(served, model, call(batch)) < 0.05 for batch in (1, 2, 3))
        with pytest.raises(CallError, match="img_shapes has 2 entries for a batch of 3"):
            served(**call(3, (3, 4), (3, 4)))
        with pytest.raises(CallError, match=r"img_shapes\.1 is another than img_shapes\.0"):
            served(**call(2, (3, 4), (4, 3)))
        with pytest.raises(CallError, match=r"img_shapes\.0\.0\.0 is 4, in the first"):
            served(**call(2, (4, 3), (4, 3)))


def test_a_module_that_walks_through_the_list_takes_one_batch() -> None:
    model = Each().eval()
    compiled = fxquant.compile(model, [call(2)])
    assert error(compiled, model, call(2)) < 0.05
    with pytest.raises(CallError, match="must be 2"):
        compiled(**call(3))


@pytest.mark.parametrize(
    ("batch", "shapes"), [(1, [(3, 4)]), (2, [(3, 4), (4, 3)]), (3, [(3, 4), (3, 4)])]
)
def test_other_lists_are_part_of_the_program(batch: int, shapes: list[tuple[int, int]]) -> None:
    signature = signature_of(Packed(), (), call(batch, *shapes))
    kinds = [m.kind for _, m in signature.arguments.members if isinstance(m, Skeleton)]
    assert kinds == ["list"]


def test_a_skeleton_of_samples_has_one_entry() -> None:
    skeleton = Skeleton(SAMPLES, ((0, "a"),))
    assert from_json(to_json(skeleton)) == skeleton
    for members in ([], [[0, "a"], [1, "b"]], [[1, "a"]]):
        with pytest.raises(ValueError, match="no skeleton"):
            from_json([SAMPLES, members])
