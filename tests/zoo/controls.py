"""ControlNets and adapters: what they return is a list of residuals."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import ONE_SIZE, UNSAVED, Case, Scene, Size
from tests.zoo.image_transformers import (
    HUNYUAN,
    OTHER,
    SANA,
    SD3,
    hunyuan_conditions,
    make,
    sana,
    sd3,
)
from tests.zoo.packed_transformers import FLUX, QWEN, flux, qwen, tokens

TEXT = 32
TALL = Size(16, 8, 3, 9)

_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT,
}
_CONTROL: dict[str, Any] = {
    **_LEVELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (16, 16, 16, 16),
}


def _picture(scene: Scene) -> torch.Tensor:
    """The condition, in pixels: eight a latent."""
    return torch.rand(scene.batch, 3, 8 * scene.height, 8 * scene.width, generator=scene.generator)


def _controlnet(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.scalar()), {
        "encoder_hidden_states": scene.text(TEXT),
        "controlnet_cond": _picture(scene),
        "conditioning_scale": 0.8,
        "guess_mode": False,
        "return_dict": False,
    }


def _controlnet_xl(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = _controlnet(scene)
    times = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat(scene.batch, 1)
    conditions = {"text_embeds": scene.batched(16), "time_ids": times}
    return args, {**kwargs, "added_cond_kwargs": conditions}


def _union(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = _controlnet_xl(scene)
    kinds = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).repeat(scene.batch, 1)
    return args, {
        **kwargs,
        "controlnet_cond": [kwargs["controlnet_cond"]],
        "control_type": kinds,
        "control_type_idx": [1],
        "conditioning_scale": [0.8],
    }


def _multi() -> nn.Module:
    nets = [diffusers.ControlNetModel(**_CONTROL) for _ in range(2)]
    return diffusers.MultiControlNetModel(nets)


def _multi_call(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = _controlnet(scene)
    return args, {
        **kwargs,
        "controlnet_cond": [kwargs["controlnet_cond"], _picture(scene)],
        "conditioning_scale": [0.8, 0.5],
    }


def _xs() -> nn.Module:
    base = diffusers.UNet2DConditionModel(
        **{k: v for k, v in _LEVELS.items() if k != "layers_per_block"},
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        layers_per_block=2,  # a ControlNet-XS knows no other
        use_linear_projection=True,
    )
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        base,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        conditioning_embedding_out_channels=(16, 16),
    )
    return diffusers.UNetControlNetXSModel.from_unet(base, adapter)


def _xs_call(scene: Scene) -> dict[str, Any]:
    picture = torch.rand(
        scene.batch, 3, 2 * scene.height, 2 * scene.width, generator=scene.generator
    )
    return {
        "sample": scene.image(4),
        "timestep": scene.scalar(),
        "encoder_hidden_states": scene.text(TEXT),
        "controlnet_cond": picture,
        "conditioning_scale": 0.8,
        "cross_attention_kwargs": None,
        "return_dict": True,
        "apply_control": True,
    }


def _sparse(scene: Scene) -> tuple[Any, Any]:
    """AnimateDiffSparseControlNetPipeline: conditions for some frames, and which they are."""
    mask = torch.zeros(scene.batch, 1, scene.frames, scene.height, scene.width)
    mask[:, :, 0] = 1
    return (scene.video(4), scene.scalar()), {
        "encoder_hidden_states": scene.text(TEXT).repeat_interleave(scene.frames, dim=0),
        "controlnet_cond": scene.video(4),
        "conditioning_mask": mask,
        "conditioning_scale": 0.8,
        "guess_mode": False,
        "return_dict": False,
    }


def _flux(scene: Scene) -> dict[str, Any]:
    return {
        **flux(scene),
        "controlnet_cond": tokens(scene, 16),
        "controlnet_mode": None,
        "conditioning_scale": 0.7,
    }


def _flux_union(scene: Scene) -> dict[str, Any]:
    return {**_flux(scene), "controlnet_mode": torch.full((scene.batch, 1), 2)}


def _flux_multi(scene: Scene) -> dict[str, Any]:
    return {
        **_flux(scene),
        "controlnet_cond": [tokens(scene, 16), tokens(scene, 16)],
        "controlnet_mode": [torch.full((scene.batch,), 1), torch.full((scene.batch,), 2)],
        "conditioning_scale": [0.7, 0.4],
    }


def _hunyuan(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.steps()), {
        **hunyuan_conditions(scene),
        "controlnet_cond": scene.image(4),
        "conditioning_scale": 0.8,
    }


def _qwen(scene: Scene) -> dict[str, Any]:
    call = {k: v for k, v in qwen(scene).items() if k not in ("guidance", "attention_kwargs")}
    return {**call, "controlnet_cond": tokens(scene, 16), "conditioning_scale": 0.8}


def _sana(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = sana(scene)
    return args, {**kwargs, "controlnet_cond": scene.image(8), "conditioning_scale": 0.8}


def _sd3(scene: Scene) -> dict[str, Any]:
    return {**sd3(scene), "controlnet_cond": scene.image(4), "conditioning_scale": 0.8}


def _sd3_multi(scene: Scene) -> dict[str, Any]:
    return {
        **sd3(scene),
        "controlnet_cond": [scene.image(4), scene.image(4)],
        "conditioning_scale": [0.8, 0.5],
    }


def _twice(multi: str, single: str, **settings: Any) -> Any:
    return lambda: getattr(diffusers, multi)(
        [getattr(diffusers, single)(**settings) for _ in range(2)]
    )


def _adapter(kind: str, **settings: Any) -> Any:
    return make("T2IAdapter", adapter_type=kind, num_res_blocks=1, **settings)


CASES = (
    Case(
        "ControlNetModel",
        "control",
        make("ControlNetModel", **_CONTROL),
        _controlnet,
        other=TALL,
    ),
    Case(
        "ControlNetModel: XL",
        "control",
        make(
            "ControlNetModel",
            **_CONTROL,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        _controlnet_xl,
        other=TALL,
    ),
    Case(
        "ControlNetUnionModel",
        "control",
        make(
            "ControlNetUnionModel",
            **_CONTROL,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            num_trans_channel=32,
            num_trans_head=4,
            num_proj_channel=32,
        ),
        _union,
        other=TALL,
        expect=UNSAVED,
        note="a weight of no fixed size",
    ),
    Case(
        "MultiControlNetModel",
        "control",
        _multi,
        _multi_call,
        other=TALL,
    ),
    Case("UNetControlNetXSModel", "control", _xs, _xs_call, other=TALL),
    Case(
        "SparseControlNetModel",
        "control",
        make(
            "SparseControlNetModel",
            **_LEVELS,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            attention_head_dim=4,
            motion_num_attention_heads=4,
            motion_max_seq_length=8,
            conditioning_embedding_out_channels=(16, 16),
        ),
        _sparse,
        other=Size(16, 8, 4, 9),
    ),
    Case(
        "FluxControlNetModel",
        "control",
        make("FluxControlNetModel", **FLUX),
        _flux,
        other=OTHER,
    ),
    Case(
        "FluxControlNetModel: union",
        "control",
        make("FluxControlNetModel", **FLUX, num_mode=4),
        _flux_union,
        other=OTHER,
    ),
    Case(
        "FluxMultiControlNetModel",
        "control",
        _twice("FluxMultiControlNetModel", "FluxControlNetModel", **FLUX, num_mode=4),
        _flux_multi,
        other=OTHER,
    ),
    Case(
        "HunyuanDiT2DControlNetModel",
        "control",
        make("HunyuanDiT2DControlNetModel", **HUNYUAN, transformer_num_layers=4),
        _hunyuan,
        other=OTHER,
    ),
    Case(
        "QwenImageControlNetModel",
        "control",
        make("QwenImageControlNetModel", **QWEN),
        _qwen,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
    Case("SanaControlNetModel", "control", make("SanaControlNetModel", **SANA), _sana, other=OTHER),
    Case("SD3ControlNetModel", "control", make("SD3ControlNetModel", **SD3), _sd3, other=OTHER),
    Case(
        "SD3MultiControlNetModel",
        "control",
        _twice("SD3MultiControlNetModel", "SD3ControlNetModel", **SD3),
        _sd3_multi,
        other=OTHER,
    ),
    Case(
        "T2IAdapter: full",
        "control",
        _adapter("full_adapter", channels=[32, 64], downscale_factor=8),
        lambda s: ((_picture(s),), {}),
        other=TALL,
    ),
    Case(
        "T2IAdapter: light",
        "control",
        _adapter("light_adapter", channels=[32, 64], downscale_factor=8),
        lambda s: ((_picture(s),), {}),
        other=TALL,
    ),
)
