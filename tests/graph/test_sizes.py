"""Which heights and widths a captured model takes: all, or the one that the model itself has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

import fxquant
from fxquant.errors import CallError, CaptureError
from fxquant.graph.capture import capture
from tests import models


class Positions(nn.Module):
    """Patches and a learned position for each of the 16 that an 8x8 image has."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 8, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, sample: Tensor) -> Tensor:
        return self.patches(sample).flatten(2).transpose(1, 2) + self.positions


class Renamed(Positions):
    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden)


class Condition(nn.Module):
    """Adds a condition of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.down(condition)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x * 2


class Unpatched(nn.Module):
    """Takes patches of 2x2 apart and puts them together, with halves of the sides throughout."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
        rows = nn.functional.silu(rows.flatten(1, 2)).view(b, h // 2, w // 2, c, 2, 2)
        return rows.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Joint(nn.Module):
    """Prompt and image are one sequence, with one mask."""

    def forward(self, x: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        tokens = torch.cat([prompt, x], 1) * mask[:, :, None]
        return tokens[:, prompt.shape[1] :] + tokens.mean(1, keepdim=True)


class Uneven(nn.Module):
    """Are the prompts, without their padding, equally long?"""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * 2 if len(set(mask.sum(1).tolist())) > 1 else x


class Listed(nn.Module):
    """Its samples are the entries of a list, so no tensor has a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: list[Tensor], t: Tensor) -> Tensor:
        return self.conv(torch.stack(x)) + t[:, None, None, None]


class ChannelsLast(nn.Module):
    """Patches of a video whose channels come last: `4 * c * (h // (h // 2))` inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4 * 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, f, h, w, c = x.shape
        x = x.view(b, f, h // 2, 2, w // 2, 2, c).permute(0, 1, 2, 4, 3, 5, 6)
        return self.patches(x.flatten(4))


class Steps(nn.Module):
    """A timestep for every frame, and a place for every patch of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(4, 8, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, x: Tensor, t: Tensor, places: Tensor) -> Tensor:
        x = self.patches(x) * t[:, None, :, None, None]
        return x.flatten(2).transpose(1, 2) + places[..., None]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * np.sqrt(x.shape[-1] / x.shape[-2])


def image(side: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, side, side)


@pytest.mark.parametrize("kind", [Positions, Renamed])
def test_learned_positions_have_one_size(
    kind: type[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = fxquant.compile(kind().eval(), [(image(8),)])
    assert f"{kind.__name__} takes one size only in these dimensions" in caplog.text
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    x = image(8, batch=3)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CallError, match="must be 8"):
        loaded(image(16))


def test_sizes_that_follow_each_other_stay_free(caplog: pytest.LogCaptureFixture) -> None:
    model = Condition().eval()
    graph = capture(model, (image(8), image(16))).graph_module
    inputs = image(5), image(9)
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), model(*inputs))
    assert not caplog.text


def test_a_remainder_is_no_size(caplog: pytest.LogCaptureFixture) -> None:
    graph, x = capture(Odd(), (image(9),)).graph_module, image(11)
    torch.testing.assert_close(graph(x), Odd()(x))
    assert not caplog.text


def test_even_sides_are_not_one_size(caplog: pytest.LogCaptureFixture) -> None:
    captured, x = capture(Unpatched(), (image(8),)), torch.randn(3, 4, 12, 6)
    torch.testing.assert_close(captured.graph_module(x), Unpatched()(x))
    assert captured.signature.limits.shapes == (("B", 4, "2*h", "2*w"),)
    assert not caplog.text


def test_timesteps_and_places_of_frames_are_as_free_as_the_frames() -> None:
    def call(batch: int, frames: int, height: int) -> tuple[Tensor, ...]:
        places = torch.randn(1, frames * height * 2)
        return torch.randn(batch, 4, frames, 2 * height, 4), torch.rand(batch, frames), places

    model = Steps()
    graph = capture(model, call(2, 3, 4)).graph_module
    for other in (call(3, 5, 4), call(2, 3, 6)):
        torch.testing.assert_close(graph(*other), model(*other))


def test_channels_that_come_last_are_fixed_and_a_video_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = fxquant.compile(ChannelsLast().eval(), [(torch.randn(2, 3, 8, 8, 4),)])
    assert "one size only" not in caplog.text
    assert model.signature.limits.shapes == (("B", "C", "F", "h", 4),)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 2, 6, 4, 4)
    assert torch.equal(fxquant.load(tmp_path)(x), model(x))


def test_a_sound_is_free_in_its_length(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Conv1d(6, 6, 3, padding=1)
    captured, x = capture(model, (torch.randn(2, 6, 16),)), torch.randn(3, 6, 21)
    torch.testing.assert_close(captured.graph_module(x), model(x))
    assert captured.signature.limits.shapes == (("B", 6, "C"),)
    assert not caplog.text


def test_the_root_that_numpy_takes_of_a_size_stays_free() -> None:
    captured, x = capture(Scaled(), (image(8),)), torch.randn(3, 4, 12, 6)
    torch.testing.assert_close(captured.graph_module(x), Scaled()(x))


def test_a_unet_calibrated_at_a_size_it_cannot_take_is_refused() -> None:
    model = UNet2DModel(**{**models.build("ddpm").config, "sample_size": 15})
    call = {"sample": torch.randn(2, 3, 15, 15), "timestep": torch.tensor([3, 4])}
    with pytest.raises(CaptureError, match="could not trace"):
        capture(model, (), call)


def test_one_mask_for_prompt_and_image_leaves_both_free() -> None:
    call = torch.randn(2, 9, 8), torch.randn(2, 5, 8), torch.ones(2, 14)
    graph = capture(Joint(), call).graph_module
    other = torch.randn(3, 6, 8), torch.randn(3, 7, 8), torch.ones(3, 13)
    torch.testing.assert_close(graph(*other), Joint()(*other))


def test_a_set_of_what_a_tensor_holds_is_refused_for_that() -> None:
    with pytest.raises(CaptureError, match="asks for the value of a tensor"):
        capture(Uneven(), (torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.int64)))


def test_as_many_timesteps_as_there_are_images_in_a_list() -> None:
    torch.manual_seed(0)
    model = Listed().eval()
    call = {"x": [torch.randn(4, 8, 8) for _ in range(3)], "t": torch.rand(3)}
    compiled = fxquant.compile(model, [call])
    with torch.no_grad():
        expected = model(**call)
        assert (compiled(**call) - expected).norm() < 0.05 * expected.norm()
