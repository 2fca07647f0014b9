"""Which of a loader's samples are chosen, by which sampler, and why not by TDAC."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.calibration.calls import read_calls
from fxquant.calibration.choice import draw, middle
from fxquant.calibration.samplers import tdac_counts, tdac_scores
from fxquant.calibration.select import Selection, middle_node, select, step_features
from fxquant.errors import LoaderError, RecipeError
from fxquant.graph.capture import capture
from fxquant.graph.segment import inputs_of
from tests import models

TIMES = (900, 600, 400, 100, 0)
PAIRS = 9


class Block(nn.Module):
    """Tokens [B, L, C] in, tokens out, the timestep mixed in."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + torch.sin(self.linear(x) + t[:, None, None] / 100)


class Transformer(nn.Module):
    """A denoiser with blocks in a row, as a DiT has."""

    def __init__(self, depth: int = 3, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


def small_unet() -> nn.Module:
    """Text-conditional, with attention in the middle alone: quick to capture."""
    torch.manual_seed(0)
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return model.eval()


def calls_of(model: nn.Module, sizes: dict[int, int], batch: int = 4) -> list[dict[str, Any]]:
    """Calls that hold sizes[t] samples of each timestep t, batch by batch."""
    made = []
    for t, size in sizes.items():
        for start in range(0, size, batch):
            rows = min(batch, size - start)
            (call,) = models.calls(model, n=1, batch=rows, seed=1000 * start + t)
            made.append({**call, "timestep": torch.tensor(t)})
    return made


@pytest.fixture(scope="module")
def unet() -> Any:
    model = small_unet()
    calls = calls_of(model, dict.fromkeys(TIMES, PAIRS))
    signature, tensors = read_calls(calls, model)
    graph = capture(model, (), calls[0]).graph_module
    return model, graph, signature, tensors


def selected(unet: Any, sampler: str = "tdac", count: int = 20, **options: Any) -> Selection:
    _, graph, signature, tensors = unet
    return select(graph, signature, tensors, sampler, count, **options)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def maps_of_the_model(model: nn.Module, tensors: list[list[Tensor]]) -> list[Tensor]:
    """What enters the middle attention, straight from the model, nine samples a timestep."""
    seen: list[Tensor] = []
    hook = model.mid_block.attentions[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for sample, t, text in tensors:
            model(sample, t, text)
    hook.remove()
    per_step = len(seen) // len(TIMES)
    return [torch.cat(seen[k : k + per_step]) for k in range(0, len(seen), per_step)]


def test_features_are_those_of_the_same_trajectories(unet):
    model, graph, _, tensors = unet
    rows = [list(range(PAIRS * s, PAIRS * (s + 1))) for s in range(len(TIMES))]
    columns = [torch.cat(column) for column in zip(*tensors, strict=True)]
    features = step_features(graph, middle_node(graph), columns, rows)
    for found, expected in zip(features, maps_of_the_model(model, tensors), strict=True):
        assert found.shape == expected.shape == (PAIRS, 16, 4, 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tdac_counts_come_from_those_features(unet):
    model, _, _, tensors = unet
    density, variety = tdac_scores(maps_of_the_model(model, tensors))
    selection = selected(unet, variety_weight=2.0)
    assert (selection.sampler, selection.reason) == ("tdac", None)
    assert selection.timesteps == TIMES
    assert torch.equal(selection.density, density)
    torch.testing.assert_close(selection.variety, variety, rtol=1e-4, atol=1e-4)
    expected = tdac_counts(density.tolist(), variety.tolist(), 2.0, 20)
    assert torch.equal(selection.counts, expected)


@pytest.mark.parametrize("sampler", ["tdac", "uniform", "normal", "random"])
def test_what_is_chosen_is_what_was_counted(unet, sampler):
    _, _, _, tensors = unet
    selection = selected(unet, sampler)
    columns = [torch.cat(column) for column in zip(*tensors, strict=True)]
    time_of = dict(zip(map(as_bytes, columns[0]), columns[1].tolist(), strict=True))
    sample, times, text = selection.tensors
    assert len(sample) == len(times) == len(text) == int(selection.counts.sum()) == 20
    assert [time_of[as_bytes(x)] for x in sample] == times.tolist()
    found = Counter(times.tolist())
    assert [found[float(t)] for t in TIMES] == selection.counts.tolist()
    assert (selection.density is None) == (sampler != "tdac")


def test_the_seed_alone_decides(unet):
    first, again, other = (selected(unet, seed=s).tensors for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_no_more_than_there_is_is_given(unet):
    sample = selected(unet, "uniform", count=1000).tensors[0]
    assert len(sample) == len(sample.flatten(1).unique(dim=0)) == PAIRS * len(TIMES)


def test_inputs_beyond_the_signature_are_not_needed(unet):
    _, graph, signature, tensors = unet
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    with graph.graph.inserting_after(inputs_of(graph)[-1]):
        graph.graph.placeholder("rows")
    graph.recompile()
    found = select(graph, signature, tensors, "tdac", 20)
    assert torch.equal(found.counts, selected(unet).counts)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({900: 9, 500: 8, 0: 9}, "timesteps have 8 to 9 samples, so these have no partners"),
        ({900: 7, 500: 7, 0: 7}, "7 samples a timestep are fewer than the 8 it needs"),
    ],
    ids=["unpaired", "few"],
)
def test_without_pairs_tdac_says_so_and_takes_samples_uniformly(unet, caplog, sizes, reason):
    model, graph, _, _ = unet
    signature, tensors = read_calls(calls_of(model, sizes), model)
    with caplog.at_level(logging.WARNING, "fxquant"):
        selection = select(graph, signature, tensors, "tdac", 12)
    assert (selection.sampler, selection.reason) == ("uniform", reason)
    assert selection.counts.tolist() == [4, 4, 4]
    assert selection.density is selection.variety is None
    assert f"{reason}. Taking samples uniformly" in caplog.text


def test_a_model_without_a_middle_is_not_scored(caplog):
    model = nn.Conv2d(4, 4, 1)
    signature, tensors = read_calls([(torch.randn(8, 4, 2, 2),)], model)
    graph = capture(model, (tensors[0][0],)).graph_module
    selection = select(graph, signature, tensors, "tdac", 6)
    assert selection.sampler == "uniform"
    assert "neither mid_block.resnets.0 nor transformer_blocks" in selection.reason
    assert selection.reason in caplog.text


def test_a_model_without_timesteps_has_one_step():
    model = nn.Conv2d(4, 4, 1)
    signature, tensors = read_calls([(torch.randn(3, 4, 2, 2),)] * 2, model)
    graph = capture(model, (tensors[0][0],)).graph_module
    selection = select(graph, signature, tensors, "uniform", 5)
    assert selection.timesteps == (0.0,)
    assert selection.counts.tolist() == [5]


def test_a_transformer_is_compared_at_half_depth_channel_by_channel():
    model = Transformer()
    calls = [
        {"hidden_states": torch.randn(8, 5, 8), "timestep": torch.full((8,), float(t))}
        for t in (9, 5, 0)
    ]
    signature, tensors = read_calls(calls, model)
    graph = capture(model, (), calls[0]).graph_module
    halfway = nn.ModuleList(list(model.transformer_blocks)[:2])
    maps = []
    for call in calls:
        x = call["hidden_states"]
        for block in halfway:
            x = block(x, call["timestep"])
        maps.append(x.detach().transpose(1, 2))
    density, variety = tdac_scores(maps)
    selection = select(graph, signature, tensors, "tdac", 12)
    assert selection.sampler == "tdac"
    assert torch.equal(selection.density, density)
    torch.testing.assert_close(selection.variety, variety, rtol=1e-4, atol=1e-4)


def test_the_middle_is_found_by_path():
    blocks = [f"transformer_blocks.{k}" for k in range(12)]
    assert middle([*blocks, "transformer_blocks.11.attn", "proj"]) == "transformer_blocks.6"
    assert middle([*blocks, "mid_block.resnets.0"]) == "mid_block.resnets.0"
    assert middle(["down_blocks.0.transformer_blocks.0", "mid_block"]) is None


def test_recorded_samples_are_taken_as_they_are(unet):
    _, _, _, tensors = unet
    selection = selected(unet, count=3, selected=True)
    assert selection.sampler == "recorded"
    assert "already selected" in selection.reason
    assert selection.counts.tolist() == [PAIRS] * len(TIMES)
    for column, whole in zip(selection.tensors, zip(*tensors, strict=True), strict=True):
        assert torch.equal(column, torch.cat(whole))


def test_calls_of_several_resolutions_are_refused(unet):
    model, graph, _, _ = unet
    calls = calls_of(model, {9: 2, 0: 2})
    calls[1]["sample"] = torch.randn(2, 4, 4, 8)
    signature, tensors = read_calls(calls, model)
    with pytest.raises(LoaderError, match=r"shape of sample: .*\(4, 4, 8\) or \(4, 8, 8\)"):
        select(graph, signature, tensors, "uniform", 4)


@pytest.mark.parametrize(
    ("sampler", "count", "message"),
    [("tdca", 4, "unknown sampler 'tdca'. Did you mean 'tdac'"), ("tdac", 0, "count=0")],
)
def test_impossible_requests_are_refused(unet, sampler, count, message):
    with pytest.raises(RecipeError, match=message):
        selected(unet, sampler, count)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([8] * 4, [2, 3, 0, 3]), ([8] * 4, [8, 5, 0, 8]), ([3, 9, 1], [3, 7, 1])],
    ids=["one each", "several each", "unequal steps"],
)
def test_drawn_positions_are_distinct_within_a_step(sizes, counts):
    drawn = draw(sizes, torch.tensor(counts), torch.Generator().manual_seed(0))
    assert [len(set(d)) for d in drawn] == counts
    assert all(0 <= p < size for d, size in zip(drawn, sizes, strict=True) for p in d)


def test_trajectories_take_turns():
    drawn = draw([6] * 5, torch.tensor([4, 1, 6, 0, 5]), torch.Generator().manual_seed(0))
    turns = Counter(p for d in drawn for p in d)
    assert sorted(turns.values()) == [2, 2, 3, 3, 3, 3]


def test_more_than_a_step_has_is_taken_again():
    (drawn,) = draw([3], torch.tensor([7]), torch.Generator().manual_seed(0))
    assert sorted(Counter(drawn).values()) == [2, 2, 3]
