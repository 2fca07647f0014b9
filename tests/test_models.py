"""The models other tests run on: they work, they are small, and a seed fixes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import models

PARAMETER_BUDGET = 4_000_000
REDUCIBLE = {
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
}


@pytest.fixture(scope="module", params=models.NAMES)
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Every model once, with its name."""
    return request.param, models.build(request.param)


@torch.no_grad()
def test_a_call_gives_an_image_of_the_output_channels(named: tuple[str, nn.Module]) -> None:
    _, model = named
    size = model.config.sample_size
    for call in models.calls(model, n=2, batch=3):
        output = model(**call)
        assert output.sample.shape == (3, model.config.out_channels, size, size)
        assert torch.isfinite(output.sample).all()
        torch.testing.assert_close(model(**call, return_dict=False)[0], output.sample)


def test_it_is_small_and_in_eval_mode(named: tuple[str, nn.Module]) -> None:
    _, model = named
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < PARAMETER_BUDGET


def test_channels_are_multiples_of_16(named: tuple[str, nn.Module]) -> None:
    _, model = named
    ends = {"conv_in", "conv_out"}
    layers = {k: m for k, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert not [
        k for k, m in layers.items() if k not in ends and any(c % 16 for c in m.weight.shape[:2])
    ]


def test_the_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (models.build("toy", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_the_seed_fixes_the_calls() -> None:
    first, again, other = (models.calls("toy", n=3, seed=seed) for seed in (0, 0, 1))
    assert [int(call["timestep"]) for call in first] == [999, 500, 0]
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["sample"], b["sample"])
        assert not torch.equal(a["sample"], c["sample"])


def test_sdxl_calls_carry_their_size_conditions() -> None:
    extra = models.calls("sdxl", n=1, batch=2)[0]["added_cond_kwargs"]
    assert {k: tuple(v.shape) for k, v in extra.items()} == {
        "text_embeds": (2, 32),
        "time_ids": (2, 6),
    }


@pytest.mark.parametrize("name", models.REDUCED)
def test_only_widths_counts_and_sizes_are_reduced(name: str) -> None:
    published, small = models.config(name, reduced=False), models.config(name)
    changed = {k for k in small if published.get(k) != small[k]}
    assert changed <= REDUCIBLE


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sd15'.*toy, sd,"):
        models.build("sd15")
