"""Denoisers without convolutions: published diffusion transformers, made small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

import fxquant
from tests.toy import relative_error

TOKENS, TEXT = 7, 32
SMALL: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2,
                         "num_attention_heads": 2}  # fmt: skip


def dit() -> nn.Module:
    """DiT-XL/2: adaptive norms from a timestep and a class, heads of 72 channels."""
    return DiTTransformer2DModel(**SMALL, attention_head_dim=72, out_channels=8,
                                 num_embeds_ada_norm=1000)  # fmt: skip


def pixart() -> nn.Module:
    """PixArt-alpha: cross attention with a mask, one adaptive norm for all blocks."""
    return PixArtTransformer2DModel(**SMALL, attention_head_dim=72, out_channels=8,
                                    cross_attention_dim=144, caption_channels=TEXT,
                                    use_additional_conditions=False)  # fmt: skip


def sd3() -> nn.Module:
    """Stable Diffusion 3: attention over text and image together."""
    return SD3Transformer2DModel(**SMALL, attention_head_dim=64, out_channels=4,
                                 joint_attention_dim=TEXT, caption_projection_dim=128,
                                 pooled_projection_dim=TEXT, pos_embed_max_size=16)  # fmt: skip


def call(kind: Callable[[], nn.Module], timestep: int, batch: int = 2) -> dict[str, Tensor]:
    shared = {"hidden_states": torch.randn(batch, 4, 16, 16),
              "timestep": torch.full((batch,), timestep)}  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(batch, TOKENS, TEXT)}
    if kind is dit:
        return {**shared, "class_labels": torch.randint(1000, (batch,))}
    if kind is sd3:
        return {**shared, **text, "pooled_projections": torch.randn(batch, TEXT)}
    mask = torch.ones(batch, TOKENS)
    mask[0, 4:] = 0
    return {**shared, **text, "encoder_attention_mask": mask}


@pytest.mark.parametrize(
    "kind", [dit, *(pytest.param(k, marks=pytest.mark.slow) for k in (pixart, sd3))]
)
def test_a_transformer_is_compiled_saved_and_served(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    for parameter in model.parameters():
        if not parameter.any():  # published models start from zero: their blocks would do nothing
            nn.init.normal_(parameter, std=0.02)
    quantised = fxquant.compile(model, [call(kind, t) for t in (900, 500, 100)], "w8a8-fast")
    quantised.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    other = call(kind, 300, batch=3)
    with torch.no_grad():
        expected = model(**other).sample
        made = [loaded(**other).sample for _ in range(4)]  # from the third on, replayed
    assert all(torch.equal(made[0], again) for again in made[1:])
    assert torch.equal(made[0], quantised(**other).sample)
    assert 0 < relative_error(made[0].float(), expected) < 0.03
