"""Image transformers that take latents as packed tokens and positions beside them: Flux's kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.case import ONE_SIZE, REFUSED, UNSAVED, Case, Scene, Size
from tests.zoo.image_transformers import HEADS, OTHER, TEXT, make


def image_ids(scene: Scene, axes: int = 3) -> Tensor:
    """Rows and columns of the packed latents, [H * W, axes]; Flux's pipeline gives no batch."""
    ids = torch.zeros(scene.height, scene.width, axes)
    ids[..., 1] += torch.arange(scene.height)[:, None]
    ids[..., 2] += torch.arange(scene.width)[None]
    return ids.flatten(0, 1)


def tokens(scene: Scene, channels: int) -> Tensor:
    return scene.batched(scene.height * scene.width, channels)


def flux(scene: Scene, *, guided: bool = True, pooled: bool = True) -> dict[str, Any]:
    call: dict[str, Any] = {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "guidance": torch.full((scene.batch,), 3.5, dtype=scene.dtype) if guided else None,
        "pooled_projections": scene.batched(16) if pooled else None,
        "encoder_hidden_states": scene.text(TEXT),
        "txt_ids": torch.zeros(scene.tokens, 3, dtype=scene.dtype),
        "img_ids": image_ids(scene).to(scene.dtype),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }
    return call if pooled else {k: v for k, v in call.items() if k != "pooled_projections"}


FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    **HEADS,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def _flux_controlled(scene: Scene) -> dict[str, Any]:
    count = scene.height * scene.width
    return {
        **flux(scene),
        "controlnet_block_samples": [0.3 * scene.batched(count, 32)],
        "controlnet_single_block_samples": [0.3 * scene.batched(count, 32)],
        "controlnet_blocks_repeat": False,
    }


def _flux2(scene: Scene) -> dict[str, Any]:
    ids = image_ids(scene, 4).repeat(scene.batch, 1, 1)
    text = torch.zeros(scene.tokens, 4)
    text[:, 3] = torch.arange(scene.tokens)
    return {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "guidance": torch.full((scene.batch,), 4.0),
        "encoder_hidden_states": scene.text(TEXT),
        "txt_ids": text.repeat(scene.batch, 1, 1),
        "img_ids": ids,
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _flux3(scene: Scene) -> dict[str, Any]:
    text = torch.zeros(scene.tokens, 4)
    text[:, 3] = torch.arange(scene.tokens)
    return {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "return_dict": False,
        "img_ids": image_ids(scene, 4),
        "txt_ids": text,
        "encoder_hidden_states": scene.text(TEXT),
    }


def _bria(scene: Scene) -> dict[str, Any]:
    call = flux(scene, guided=False, pooled=False)
    renamed = {"attention_kwargs": call.pop("joint_attention_kwargs"), "timestep": scene.steps()}
    return {k: v for k, v in {**call, **renamed}.items() if k != "guidance"}


def _fibo(scene: Scene) -> dict[str, Any]:
    call = flux(scene, guided=False, pooled=False)
    call.pop("guidance")
    layers = [scene.text(12) for _ in range(2)]
    return {**call, "text_encoder_layers": layers, "timestep": scene.steps()}


def _chroma(scene: Scene) -> dict[str, Any]:
    call = flux(scene, guided=False, pooled=False)
    call.pop("guidance")
    image = torch.ones(scene.batch, scene.height * scene.width, dtype=torch.bool)
    mask = torch.cat([scene.mask(kind=torch.bool), image], dim=1)
    return {**call, "attention_mask": mask}


def _ovis(scene: Scene) -> dict[str, Any]:
    call = flux(scene, guided=False, pooled=False)
    call.pop("guidance")
    return call


def _longcat(scene: Scene) -> dict[str, Any]:
    return {k: v for k, v in _ovis(scene).items() if k != "joint_attention_kwargs"}


def _ideogram(scene: Scene) -> dict[str, Any]:
    image = scene.height * scene.width
    rows = torch.arange(scene.height).repeat_interleave(scene.width)
    columns = torch.arange(scene.width).repeat(scene.height)
    text = torch.arange(scene.tokens)
    ids = torch.cat(
        [text[:, None].expand(-1, 3), torch.stack([rows * 0, rows, columns], 1) + scene.tokens]
    )
    indicator = torch.tensor([3] * scene.tokens + [2] * image).repeat(scene.batch, 1)
    segments = torch.ones(scene.batch, scene.tokens + image, dtype=torch.long)
    indicator[-1, :2], segments[-1, :2] = -1, -1  # the last prompt is two tokens shorter
    padding = torch.zeros(scene.batch, scene.tokens, 16)
    return {
        "hidden_states": torch.cat([padding, scene.batched(image, 16)], dim=1),
        "timestep": 1.0 - scene.steps(1 / 1000),
        "encoder_hidden_states": scene.batched(scene.tokens + image, TEXT),
        "position_ids": ids.repeat(scene.batch, 1, 1),
        "segment_ids": segments,
        "indicator": indicator,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _krea2(scene: Scene) -> dict[str, Any]:
    ids = torch.cat([torch.zeros(scene.tokens, 3), image_ids(scene)])
    return {
        "hidden_states": tokens(scene, 16),
        "encoder_hidden_states": scene.batched(scene.tokens, 2, TEXT),
        "timestep": scene.steps(1 / 1000),
        "position_ids": ids,
        "encoder_attention_mask": scene.mask(kind=torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _nucleus(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_hidden_states_mask": scene.mask(kind=torch.bool),
        "img_shapes": [(1, scene.height, scene.width)] * scene.batch,
        "attention_kwargs": None,
        "return_dict": False,
    }


def qwen(scene: Scene, *, masked: bool = True) -> dict[str, Any]:
    return {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "guidance": None,
        "encoder_hidden_states_mask": scene.mask() if masked else None,
        "encoder_hidden_states": scene.text(TEXT),
        "img_shapes": [[(1, scene.height, scene.width)]] * scene.batch,
        "attention_kwargs": {},
        "return_dict": False,
    }


QWEN: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    **HEADS,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (2, 2, 4),
}


def _qwen_edit(scene: Scene) -> dict[str, Any]:
    """The latents that are made, and those of the image that is edited."""
    call = qwen(scene)
    shape = (1, scene.height, scene.width)
    both = torch.cat([call["hidden_states"], tokens(scene, 16)], dim=1)
    return {**call, "hidden_states": both, "img_shapes": [[shape, shape]] * scene.batch}


def _qwen_controlled(scene: Scene) -> dict[str, Any]:
    call = qwen(scene)
    call.pop("guidance")
    samples = [0.3 * scene.batched(scene.height * scene.width, 32)]
    return {**call, "controlnet_block_samples": samples}


def _qwen21(scene: Scene) -> dict[str, Any]:
    slots = scene.height * scene.width // 4
    mask = torch.tensor([False] * scene.tokens + [True] * slots).repeat(scene.batch, 1)
    return {
        "hidden_states": tokens(scene, 16),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_hidden_states_mask": scene.mask(),
        "img_shapes": [[(1, scene.height, scene.width)]] * scene.batch,
        "img_mask": mask,
        "attention_kwargs": {},
        "kv_cache": None,
        "kv_cache_mode": None,
        "return_dict": False,
    }


_BRIA: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    **HEADS,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": [2, 2, 4],
}

CASES = (
    Case(
        "BriaTransformer2DModel",
        "image",
        make("BriaTransformer2DModel", **_BRIA),
        _bria,
        other=OTHER,
    ),
    Case(
        "BriaFiboTransformer2DModel",
        "image",
        make("BriaFiboTransformer2DModel", **_BRIA, text_encoder_dim=12),
        _fibo,
        other=OTHER,
    ),
    Case(
        "ChromaTransformer2DModel",
        "image",
        make(
            "ChromaTransformer2DModel",
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        _chroma,
        other=OTHER,
        expect=ONE_SIZE,
        note="makes a list as long as the batch: one batch",
    ),
    Case(
        "FluxTransformer2DModel",
        "image",
        make("FluxTransformer2DModel", **FLUX),
        flux,
        other=OTHER,
        quick=True,
    ),
    Case(
        "FluxTransformer2DModel: bfloat16",
        "image",
        make("FluxTransformer2DModel", **FLUX),
        flux,
        other=OTHER,
        dtype=torch.bfloat16,
    ),
    Case(
        "FluxTransformer2DModel: schnell",
        "image",
        make("FluxTransformer2DModel", **{**FLUX, "guidance_embeds": False}),
        lambda s: flux(s, guided=False),
        other=OTHER,
    ),
    Case(
        "FluxTransformer2DModel: ControlNet residuals",
        "image",
        make("FluxTransformer2DModel", **FLUX),
        _flux_controlled,
        other=OTHER,
    ),
    Case(
        "Flux2Transformer2DModel",
        "image",
        make(
            "Flux2Transformer2DModel",
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        _flux2,
        other=OTHER,
    ),
    Case(
        "Flux3Transformer2DModel",
        "image",
        make(
            "Flux3Transformer2DModel",
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            timestep_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        _flux3,
        other=OTHER,
    ),
    Case(
        "Ideogram4Transformer2DModel",
        "image",
        make(
            "Ideogram4Transformer2DModel",
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=TEXT,
            mrope_section=(4, 2, 2),
        ),
        _ideogram,
        other=OTHER,
    ),
    Case(
        "Krea2Transformer2DModel",
        "image",
        make(
            "Krea2Transformer2DModel",
            in_channels=16,
            num_layers=1,
            **HEADS,
            num_key_value_heads=2,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=TEXT,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(2, 2, 4),
        ),
        _krea2,
        other=OTHER,
        expect=ONE_SIZE,
    ),
    Case(
        "LongCatImageTransformer2DModel",
        "image",
        make(
            "LongCatImageTransformer2DModel",
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=[2, 2, 4],
        ),
        _longcat,
        other=OTHER,
    ),
    Case(
        "NucleusMoEImageTransformer2DModel",
        "image",
        make(
            "NucleusMoEImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=2,
            **HEADS,
            joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=24,
            capacity_factors=2.0,
        ),
        _nucleus,
        other=OTHER,
        expect=UNSAVED,
        note="counts tokens by expert; the sizes of its images are Python numbers",
    ),
    Case(
        "NucleusMoEImageTransformer2DModel: dense",
        "image",
        make(
            "NucleusMoEImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
            moe_enabled=False,
        ),
        _nucleus,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case(
        "OvisImageTransformer2DModel",
        "image",
        make(
            "OvisImageTransformer2DModel",
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
        ),
        _ovis,
        other=OTHER,
    ),
    Case(
        "QwenImageTransformer2DModel",
        "image",
        make("QwenImageTransformer2DModel", **QWEN),
        qwen,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case(
        "QwenImageTransformer2DModel: full prompts",
        "image",
        make("QwenImageTransformer2DModel", **QWEN),
        lambda s: qwen(s, masked=False),
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case(
        "QwenImageTransformer2DModel: edit",
        "image",
        make("QwenImageTransformer2DModel", **QWEN),
        _qwen_edit,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case(
        "QwenImageTransformer2DModel: ControlNet residuals",
        "image",
        make("QwenImageTransformer2DModel", **QWEN),
        _qwen_controlled,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case(
        "QwenImage21Transformer2DModel",
        "image",
        make(
            "QwenImage21Transformer2DModel",
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            context_in_dim=TEXT,
            axes_dims_rope=(4, 6, 6),
        ),
        _qwen21,
        Size(8, 8),
        Size(8, 12, 3, 9),
        expect=REFUSED,
        note="asks for the values of a tensor",
    ),
)
