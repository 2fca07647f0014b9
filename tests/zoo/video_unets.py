"""Video UNets, whose frames are folded into the batch inside the model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import Case, Scene, Size
from tests.zoo.image_transformers import make

TEXT = 32
OTHER = Size(16, 8, 4, 9)

_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
}
_THREE_D: dict[str, Any] = {
    **_LEVELS,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_MOTION: dict[str, Any] = {
    **_LEVELS,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 4,
    "motion_num_attention_heads": 4,
    "motion_max_seq_length": 8,
}


def _text_to_video(scene: Scene) -> tuple[Any, Any]:
    """TextToVideoSDPipeline: latents [B, C, F, H, W], a prompt for every video."""
    return (scene.video(4), scene.scalar()), {
        "encoder_hidden_states": scene.text(TEXT),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def _animatediff(scene: Scene) -> tuple[Any, Any]:
    """AnimateDiffPipeline: the prompt is repeated for every frame."""
    prompt = scene.text(TEXT).repeat_interleave(scene.frames, dim=0)
    return (scene.video(4), scene.scalar()), {
        "encoder_hidden_states": prompt,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
    }


def _animatediff_xl(scene: Scene) -> tuple[Any, Any]:
    times = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat(scene.batch, 1)
    args, kwargs = _animatediff(scene)
    conditions = {"text_embeds": scene.batched(16), "time_ids": times}
    return args, {
        **kwargs,
        "timestep_cond": None,
        "added_cond_kwargs": conditions,
        "return_dict": False,
    }


def _animatediff_controlled(scene: Scene) -> tuple[Any, Any]:
    half = (scene.height // 2, scene.width // 2)
    full = (scene.height, scene.width)
    images = scene.batch * scene.frames
    down = [
        0.3 * scene.normal(images, channels, *size)
        for channels, size in ((32, full), (32, full), (32, half), (64, half))
    ]
    args, kwargs = _animatediff(scene)
    return args, {
        **kwargs,
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": 0.3 * scene.normal(images, 64, *half),
    }


def _svd(scene: Scene) -> tuple[Any, Any]:
    """StableVideoDiffusionPipeline: frames before channels, and a fractional timestep."""
    return (
        scene.batched(scene.frames, 8, scene.height, scene.width),
        torch.tensor(scene.t / 500),
    ), {
        "encoder_hidden_states": scene.batched(1, TEXT),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(scene.batch, 1),
        "return_dict": False,
    }


def _i2vgen(scene: Scene) -> tuple[Any, Any]:
    return (scene.video(4), scene.scalar()), {
        "encoder_hidden_states": scene.text(TEXT),
        "fps": torch.full((scene.batch,), 16),
        "image_latents": scene.video(4),
        "image_embeddings": scene.batched(TEXT),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def _motion_adapter() -> nn.Module:
    """AnimateDiff as it is used: a motion module put into an image model."""
    unet = diffusers.UNet2DConditionModel(
        **{
            **_LEVELS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
        }
    )
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return diffusers.UNetMotionModel.from_unet2d(unet, adapter)


def _temporal(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.normal(scene.batch * scene.frames, 32, scene.height, scene.width),
        "num_frames": scene.frames,
        "return_dict": False,
    }


CASES = (
    Case(
        "UNet3DConditionModel",
        "video",
        make("UNet3DConditionModel", **_THREE_D, attention_head_dim=8),
        _text_to_video,
        other=OTHER,
    ),
    Case("UNetMotionModel", "video", make("UNetMotionModel", **_MOTION), _animatediff, other=OTHER),
    Case(
        "UNetMotionModel: from an image model", "video", _motion_adapter, _animatediff, other=OTHER
    ),
    Case(
        "UNetMotionModel: XL",
        "video",
        make(
            "UNetMotionModel",
            **_MOTION,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        _animatediff_xl,
        other=OTHER,
    ),
    Case(
        "UNetMotionModel: ControlNet residuals",
        "video",
        make("UNetMotionModel", **_MOTION),
        _animatediff_controlled,
        other=OTHER,
    ),
    Case(
        "UNetSpatioTemporalConditionModel",
        "video",
        make(
            "UNetSpatioTemporalConditionModel",
            sample_size=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            layers_per_block=1,
            cross_attention_dim=TEXT,
            num_attention_heads=(2, 4),
            num_frames=3,
        ),
        _svd,
        other=OTHER,
    ),
    Case(
        "I2VGenXLUNet",
        "video",
        make("I2VGenXLUNet", **_THREE_D, attention_head_dim=4),
        _i2vgen,
        Size(32, 32),
        Size(48, 32, 4, 9),
    ),
    Case(
        "TransformerTemporalModel",
        "other",
        make(
            "TransformerTemporalModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            norm_num_groups=8,
        ),
        _temporal,
        other=OTHER,
    ),
)
