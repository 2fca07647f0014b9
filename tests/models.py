"""Random-weight denoisers for tests: published configurations made small, and a hand-written toy.

Widths, layer counts and sizes shrink; block types and flags stay as published, so that whatever a
pass meets in the real network it meets here. Every channel count is a multiple of 16.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

CONFIGS = Path(__file__).parent / "configs"
TRAIN_STEPS = 1000
PROMPT_TOKENS = 7

_SMALL = {
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
_SMALL_TEXT = {**_SMALL, "attention_head_dim": 2, "cross_attention_dim": 32}

# name -> (file in configs/, what is reduced)
REDUCED: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("sd14", _SMALL_TEXT),
    "sd_inpainting": ("sd_inpainting", _SMALL_TEXT),
    "ldm_text2im": ("ldm_text2im_large_256", _SMALL_TEXT),
    "sdxl": (
        "sdxl_base",
        {
            **_SMALL_TEXT,
            "block_out_channels": [32, 64, 64],
            "attention_head_dim": [1, 2, 4],
            "transformer_layers_per_block": [1, 1, 2],
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 6 * 16 + 32,  # six sizes and a pooled prompt
        },
    ),
    "ldm": ("ldm_celebahq_256", {**_SMALL, "block_out_channels": [32, 64, 96, 128]}),
    "ddpm": ("ddpm_cifar10_32", _SMALL),
}
NAMES = ("toy", *REDUCED)


class ToyUNet(nn.Module):
    """One of everything, in as few nodes as that takes: goldens are dumps of this.

    A residual block with a time embedding, an asymmetric (0, 1, 0, 1) downsample, self and cross
    attention, an upsample, and a residual block without time over a skip-concat, with a 1x1
    shortcut; 16 and 32 channels, 2 groups.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=4, out_channels=4, sample_size=8, cross_attention_dim=16
        )
        self.time_proj = Timesteps(16, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(16, 32)
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.down_resnet = _resnet(16, 16, time=32)
        self.downsample = Downsample2D(16, use_conv=True, padding=0, name="op")
        self.transformer = Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            norm_num_groups=2,
            cross_attention_dim=16,
        )
        self.upsample = Upsample2D(16, use_conv=True)
        self.up_resnet = _resnet(32, 16, time=None)
        self.conv_norm_out = nn.GroupNorm(2, 16, eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """[B, 4, H, W] with even H and W, scalar or [B], [B, L, 16] -> .sample [B, 4, H, W]."""
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        embedding = self.time_embedding(self.time_proj(timestep.expand(sample.shape[0])))
        skip = self.down_resnet(self.conv_in(sample), embedding)
        hidden = self.transformer(
            self.downsample(skip), encoder_hidden_states=encoder_hidden_states, return_dict=False
        )[0]
        hidden = self.up_resnet(torch.cat([self.upsample(hidden), skip], dim=1), None)
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def build(name: str, seed: int = 0) -> nn.Module:
    """A float32 model in eval mode whose weights depend on `seed` alone.

    Raises:
        ValueError: `name` is none of NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"no test model is called {name!r}; known: {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyUNet() if name == "toy" else _from_config(config(name))
        _randomise_norms(model)
    return model.eval()


def config(name: str, *, reduced: bool = True) -> dict[str, Any]:
    """The diffusers config of one of REDUCED, small, or with reduced=False as published."""
    file, smaller = REDUCED[name]
    published: dict[str, Any] = json.loads((CONFIGS / f"{file}.json").read_text())
    return published | smaller if reduced else published


def calls(
    model: str | nn.Module, n: int = 2, batch: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """`n` calls, each a dict of forward's arguments, from early (noisy) to late timesteps.

    Args:
        model: a name, or a model of `build`.
        n: how many; timesteps are 0-d int64 tensors spread evenly over 999..0.
        batch: samples in each call.
        seed: everything but the timesteps is standard normal from this.
    """
    facts = _facts(model)
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(TRAIN_STEPS - 1, 0, n).round().long()
    return [_call(facts, t, batch, generator) for t in timesteps]


def _from_config(published: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(diffusers, published["_class_name"]).from_config(published)
    return model


def _resnet(inputs: int, outputs: int, time: int | None) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=inputs, out_channels=outputs, temb_channels=time, groups=2, eps=1e-5
    )


def _randomise_norms(model: nn.Module) -> None:
    """Fresh norms multiply by one and add zero, which would hide that an affine was lost."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            nn.init.normal_(module.bias, std=0.2)


def _facts(model: str | nn.Module) -> Any:
    """The model's config, whatever form it comes in."""
    if isinstance(model, nn.Module):
        return model.config
    return build(model).config


def _call(facts: Any, timestep: Tensor, batch: int, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    size = facts.sample_size
    call: dict[str, Any] = {"sample": normal(facts.in_channels, size, size), "timestep": timestep}
    if width := getattr(facts, "cross_attention_dim", None):
        call["encoder_hidden_states"] = normal(PROMPT_TOKENS, width)
    if getattr(facts, "addition_embed_type", None) == "text_time":
        pooled = facts.projection_class_embeddings_input_dim - 6 * facts.addition_time_embed_dim
        pixels = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0])
        call["added_cond_kwargs"] = {
            "text_embeds": normal(pooled),
            "time_ids": pixels.repeat(batch, 1),
        }
    return call
