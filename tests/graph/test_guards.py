"""What a model asks of its sizes is kept, checked when serving, and named when it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CallError, CaptureError
from fxquant.graph.capture import capture
from tests.toy import relative_error


class Asking(nn.Module):
    """Does one thing up to a width of 8, and another above."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if x.shape[-1] > 8:
            h = h * 2
        return self.out(h)


class Harmless(Asking):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if x.shape[-1] > 8:
            h = h.contiguous()
        return self.out(h)


class Pieces(Asking):
    """As many pieces as its length has pairs."""

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.conv(x).split(2, dim=2)
        return self.out(torch.cat([p + k for k, p in enumerate(pieces, 1)], dim=2))


class Guided(Asking):
    """Halves its batch, as guidance does."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.out(self.conv(x)).chunk(2)
        return torch.cat([a, a + 3 * (b - a)])


class Framed(Asking):
    """Images of several frames, whose prompts come for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(6, 8)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        batch, channels, frames, *sides = sample.shape
        x = sample.transpose(1, 2).reshape(batch * frames, channels, *sides)
        h = self.conv(x) + self.text(text).mean(1)[:, :, None, None]
        return self.out(h).reshape(batch, frames, channels, *sides).transpose(1, 2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def image(batch: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(batch, 4, height, width)


def assert_near(served: nn.Module, model: nn.Module, *call: Tensor) -> None:
    with torch.no_grad():
        assert relative_error(served(*call), model(*call)) < 0.06


def test_the_other_way_is_refused_with_the_line_that_asks(tmp_path: Path) -> None:
    model = Asking().eval()
    served = fxquant.compile(model, [(image(),)], progress=False)
    served.save_pretrained(tmp_path)
    for answer in (served, fxquant.load(tmp_path)):
        assert_near(answer, model, image(3, 6, 7))
        with pytest.raises(CallError, match=r"test_guards\.py:\d+ in forward asks whether w <= 8"):
            answer(image(2, 8, 12))


def test_calls_that_go_different_ways_are_refused_with_the_line() -> None:
    with pytest.raises(CaptureError, match=r"different ways .*test_guards\.py:\d+ in forward"):
        fxquant.compile(Asking().eval(), [(image(),), (image(2, 8, 12),)], progress=False)


def test_a_question_whose_answers_compute_the_same_is_none() -> None:
    model = Harmless().eval()
    served = fxquant.compile(model, [(image(),), (image(2, 8, 12),)], progress=False)
    assert_near(served, model, image(2, 8, 16))


def test_the_number_of_pieces_is_part_of_the_graph() -> None:
    model = Pieces().eval()
    served = fxquant.compile(model, [(image(),)], progress=False)
    assert_near(served, model, image(3, 8, 12))
    with pytest.raises(CallError, match="another way"):
        served(image(2, 10, 8))


def test_guidance_inside_forward() -> None:
    model = Guided().eval()
    served = fxquant.compile(model, [(image(2),)], progress=False)
    for batch in (2, 4, 6):
        assert_near(served, model, image(batch))


def test_rows_of_frames_follow_batch_and_frames() -> None:
    model = Framed().eval()
    call = torch.randn(1, 4, 3, 8, 8), torch.randn(3, 5, 6)
    served = fxquant.compile(model, [call], progress=False)
    assert_near(served, model, torch.randn(2, 4, 3, 6, 8), torch.randn(6, 7, 6))
    with pytest.raises(CallError, match=r"text has .* must be 8, to go with sample"):
        served(torch.randn(2, 4, 4, 8, 8), torch.randn(6, 5, 6))


def test_a_table_without_a_batch_is_a_table() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
            where = (ids.float() * torch.arange(1, 17)).sin()
            return self.second(self.first(hidden + where).relu())

    model = Ids().eval()
    ids = torch.arange(6)[:, None] * 50
    served = fxquant.compile(model, [(torch.randn(2, 6, 16), ids)], progress=False)
    for batch, length in ((2, 6), (1, 6), (3, 9)):
        ids = torch.arange(length)[:, None] * 30
        assert_near(served, model, torch.randn(batch, length, 16), ids)


def test_sizes_can_be_fixed_on_request() -> None:
    served = fxquant.compile(Harmless().eval(), [(image(),)], progress=False, dynamic=False)
    served(image())
    with pytest.raises(CallError, match="dimension 0 must be 2, as captured"):
        served(image(3))


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("h * float(h.sum())", "asks for the value of a tensor"),
        ("h if h.sum() > 0 else -h", "asks for the value of a tensor"),
        ("torch.from_numpy(h.numpy())", "leaves torch"),
        ("h + torch.ones(3)", "sizes of this call do not fit"),
        ("h.no_such_thing()", "of another kind"),
    ],
)
def test_every_cause_has_its_advice(line: str, advice: str) -> None:
    class Model(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(eval(line, {"torch": torch, "h": self.conv(x)}))

    with pytest.raises(CaptureError, match=advice):
        capture(Model(), (image(),))
