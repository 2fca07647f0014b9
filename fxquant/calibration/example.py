"""Random calls of a diffusers denoiser, from its config alone: for dumps, tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.graph.signature import floating_dtype

_TOKENS = 77


def example_call(
    model: nn.Module, batch: int = 2, size: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """One call with standard normal inputs, on the model's device.

    Args:
        model: a UNet2DModel or UNet2DConditionModel (any module with their `config`).
        size: height and width; the config's sample_size by default.
    """
    config: Any = model.config
    device, dtype = next(model.parameters()).device, floating_dtype(model)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    side = size or config.sample_size
    call: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, side, side),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).to(device),
    }
    if getattr(config, "cross_attention_dim", None):
        width = getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim
        call["encoder_hidden_states"] = normal(
            batch, _TOKENS, width if isinstance(width, int) else width[0]
        )
    if getattr(config, "num_class_embeds", None):
        call["class_labels"] = torch.randint(
            0, config.num_class_embeds, (batch,), generator=generator
        ).to(device)
    if getattr(config, "addition_embed_type", None) == "text_time":
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor(
            [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]], dtype=dtype, device=device
        )
        call["added_cond_kwargs"] = {
            "text_embeds": normal(batch, text),
            "time_ids": sizes.repeat(batch, 1),
        }
    return call
