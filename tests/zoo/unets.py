"""Image UNets: UNet2DModel, UNet2DConditionModel and its relatives, and how pipelines call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import ONE_SIZE, REFUSED, Case, Scene, Size

TEXT = 32
TALL = Size(16, 8, 3, 9)

_TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
}
_CONDITION: dict[str, Any] = {
    **_TWO_LEVELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT,
}


def unet(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: diffusers.UNet2DModel(
        **{
            **_TWO_LEVELS,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **changes,
        }
    )


def condition(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: diffusers.UNet2DConditionModel(**{**_CONDITION, **changes})


def _positional(scene: Scene, channels: int = 4, **more: Any) -> tuple[Any, Any]:
    """unet(latents, t, encoder_hidden_states=..., return_dict=False), with what else there is."""
    kwargs = {
        "encoder_hidden_states": scene.text(TEXT),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }
    return (scene.image(channels), scene.scalar()), {**kwargs, **more}


def _unconditional(scene: Scene, channels: int = 3) -> tuple[Any, Any]:
    return (scene.image(channels), scene.scalar()), {}


def _sdxl_conditions(scene: Scene) -> dict[str, Any]:
    times = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat(scene.batch, 1)
    return {"text_embeds": scene.batched(16), "time_ids": times}


def _sdxl(**changes: Any) -> Callable[[], nn.Module]:
    return condition(
        **{
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            **changes,
        }
    )


def _residuals(scene: Scene) -> dict[str, Any]:
    """What a ControlNet of the same shape returns."""
    half = (scene.height + 1) // 2, (scene.width + 1) // 2
    full = (scene.height, scene.width)
    shapes = ((32, full), (32, full), (32, half), (64, half))
    down = [0.3 * scene.batched(channels, *size) for channels, size in shapes]
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": 0.3 * scene.batched(64, *half),
    }


def _adapter_features(scene: Scene) -> dict[str, Any]:
    """What a T2I-Adapter returns, in the fresh list that pipelines make of it."""
    half = (scene.height + 1) // 2, (scene.width + 1) // 2
    shapes = ((32, (scene.height, scene.width)), (64, half))
    features = [0.3 * scene.batched(channels, *size) for channels, size in shapes]
    return {"down_intrablock_additional_residuals": features}


def _ip_adapter(model: Any) -> None:
    """What load_ip_adapter leaves behind: two more keys and values in every cross attention."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    processors = {}
    for name in model.attn_processors:
        if "attn1" in name:
            processors[name] = AttnProcessor2_0()
            continue
        width = 64 if "mid_block" in name or "up_blocks.0" in name else 32
        processors[name] = IPAdapterAttnProcessor2_0(width, TEXT, num_tokens=(2,))
    torch.manual_seed(0)
    model.set_attn_processor(processors)
    projection = ImageProjection(
        image_embed_dim=16, cross_attention_dim=TEXT, num_image_text_embeds=2
    )
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.config.encoder_hid_dim_type = "ip_image_proj"


def _ip_call(scene: Scene) -> tuple[Any, Any]:
    return _positional(scene, added_cond_kwargs={"image_embeds": [scene.batched(1, 16)]})


def _gligen(scene: Scene) -> tuple[Any, Any]:
    boxes = torch.rand(scene.batch, 3, 4, generator=scene.generator)
    masks = torch.tensor([1.0, 1.0, 0.0]).repeat(scene.batch, 1)
    gligen = {"boxes": boxes, "positive_embeddings": scene.batched(3, TEXT), "masks": masks}
    return _positional(scene, cross_attention_kwargs={"gligen": gligen})


def _kandinsky(scene: Scene) -> dict[str, Any]:
    return {
        "sample": scene.image(4),
        "timestep": scene.scalar(),
        "encoder_hidden_states": scene.text(24),
        "added_cond_kwargs": {
            "text_embeds": scene.batched(TEXT),
            "image_embeds": scene.batched(TEXT),
        },
        "return_dict": False,
    }


def _kandinsky22(scene: Scene) -> dict[str, Any]:
    return {
        "sample": scene.image(4),
        "timestep": scene.scalar(),
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": scene.batched(24)},
        "return_dict": False,
    }


def _kandinsky22_hint(scene: Scene) -> dict[str, Any]:
    hint = scene.batched(3, 8 * scene.height, 8 * scene.width)
    conditions = {"image_embeds": scene.batched(24), "hint": hint}
    return {**_kandinsky22(scene), "added_cond_kwargs": conditions}


def _deepfloyd(scene: Scene) -> tuple[Any, Any]:
    kwargs = {
        "encoder_hidden_states": scene.text(24),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }
    return (scene.image(3), scene.scalar()), kwargs


def _deepfloyd_upscaler(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = _deepfloyd(scene)
    level = torch.full((scene.batch,), 250)
    return (scene.image(6), args[1]), {**kwargs, "class_labels": level}


_DEEPFLOYD: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 24,
    "attention_head_dim": 8,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "class_embeddings_concat": False,
    "cross_attention_dim": 32,
}

_KANDINSKY: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "encoder_hid_dim": 24,
    "resnet_time_scale_shift": "scale_shift",
}


def _unclip(scene: Scene) -> dict[str, Any]:
    return {
        "sample": scene.image(3),
        "timestep": scene.scalar(),
        "encoder_hidden_states": scene.text(TEXT),
        "class_labels": scene.batched(128),
        "attention_mask": scene.mask(kind=torch.bool),
    }


def _dreamlite() -> nn.Module:
    return diffusers.DreamLiteUNetModel(**_DREAMLITE)


_DREAMLITE: dict[str, Any] = {
    **_TWO_LEVELS,
    "in_channels": 8,
    "down_block_types": (
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
        "DreamLiteCrossAttnDownBlock2D",
    ),
    "up_block_types": (
        "DreamLiteCrossAttnUpBlock2D",
        "DreamLiteCrossAttnNoSelfAttnUpBlock2D",
    ),
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT,
    "addition_embed_type": "time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8,
}


def _dreamlite_call(scene: Scene) -> tuple[Any, Any]:
    times = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(scene.batch, 1)
    return (scene.image(8),), {
        "timestep": scene.steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "added_cond_kwargs": {"time_ids": times},
        "return_dict": False,
    }


def _kandinsky3() -> nn.Module:
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=64,
        groups=8,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32,
        encoder_hid_dim=24,
    )


def _kandinsky3_call(scene: Scene) -> tuple[Any, Any]:
    kwargs = {
        "encoder_hidden_states": scene.text(24),
        "encoder_attention_mask": scene.mask(),
        "return_dict": False,
    }
    return (scene.image(4), scene.scalar()), kwargs


def _uvit() -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=5 * 8,
        encoder_hidden_size=24,
        vocab_size=33,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        sample_size=8,
    )


def _amused(scene: Scene) -> tuple[Any, Any]:
    ids = scene.integers(33, scene.batch, scene.height, scene.width)
    kwargs = {
        "micro_conds": torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]).repeat(scene.batch, 1),
        "pooled_text_emb": scene.batched(16),
        "encoder_hidden_states": scene.text(24),
        "cross_attention_kwargs": None,
    }
    return (ids,), kwargs


def _cascade(**changes: Any) -> Callable[[], nn.Module]:
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 16,
        "conditioning_dim": 32,
        "block_out_channels": (32, 32),
        "num_attention_heads": (4, 4),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 16,
        "clip_seq": 2,
        "timestep_conditioning_type": ("sca",),
    }
    return lambda: StableCascadeUNet(**{**settings, **changes})


def _cascade_prior(scene: Scene) -> dict[str, Any]:
    return {
        "sample": scene.image(4),
        "timestep_ratio": scene.steps(1 / 1000),
        "clip_text_pooled": scene.batched(1, 16),
        "clip_text": scene.text(24),
        "clip_img": scene.batched(1, 20),
        "return_dict": False,
    }


def _cascade_decoder(scene: Scene) -> dict[str, Any]:
    return {
        "sample": scene.image(4),
        "timestep_ratio": scene.steps(1 / 1000),
        "clip_text_pooled": scene.batched(1, 16),
        "effnet": scene.batched(8, scene.height // 4, scene.width // 4),
        "return_dict": False,
    }


def _flat() -> nn.Module:
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
        UNetFlatConditionModel,
    )

    return UNetFlatConditionModel(
        **{
            **_CONDITION,
            "in_channels": (24, 1, 1),
            "out_channels": (24, 1, 1),
            "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
            "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
        }
    )


CASES = (
    Case("UNet2DModel", "image", unet(), _unconditional, other=TALL),
    Case(
        "UNet2DModel: classes, consistency",
        "image",
        unet(num_class_embeds=5, resnet_time_scale_shift="scale_shift"),
        lambda s: (
            (s.image(3), s.scalar()),
            {"class_labels": s.integers(5, s.batch), "return_dict": False},
        ),
        other=TALL,
    ),
    Case(
        "UNet2DModel: score_sde_ve",
        "image",
        unet(
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            time_embedding_type="fourier",
            norm_eps=1e-6,
            block_out_channels=(64, 128),
            norm_num_groups=None,
        ),
        lambda s: ((s.image(3), torch.full((s.batch,), 0.01 + s.t / 20)), {}),
        other=TALL,
    ),
    Case("UNet2DConditionModel", "image", condition(), _positional, other=TALL),
    Case(
        "UNet2DConditionModel: odd size",
        "image",
        condition(),
        _positional,
        Size(9, 7),
        Size(11, 9, 3, 9),
    ),
    Case(
        "UNet2DConditionModel: bfloat16",
        "image",
        condition(),
        _positional,
        other=TALL,
        dtype=torch.bfloat16,
    ),
    Case(
        "UNet2DConditionModel: float16",
        "image",
        condition(),
        _positional,
        other=TALL,
        dtype=torch.float16,
    ),
    Case(
        "UNet2DConditionModel: SDXL",
        "image",
        _sdxl(),
        lambda s: _positional(s, added_cond_kwargs=_sdxl_conditions(s)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: LCM guidance",
        "image",
        condition(time_cond_proj_dim=16),
        lambda s: _positional(s, timestep_cond=s.batched(16)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: attention scale",
        "image",
        condition(),
        lambda s: _positional(s, cross_attention_kwargs={"scale": 0.5}),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: ControlNet residuals",
        "image",
        condition(),
        lambda s: _positional(s, **_residuals(s)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: ControlNet and T2I features",
        "image",
        condition(),
        lambda s: _positional(s, **_adapter_features(s)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: IP-Adapter",
        "image",
        condition(),
        _ip_call,
        other=TALL,
        prepare=_ip_adapter,
    ),
    Case(
        "UNet2DConditionModel: GLIGEN",
        "image",
        condition(attention_type="gated"),
        _gligen,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: masked prompt",
        "image",
        condition(),
        lambda s: _positional(s, encoder_attention_mask=s.mask()),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: FreeU",
        "image",
        condition(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D",) * 2),
        _positional,
        other=TALL,
        prepare=lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    ),
    Case(
        "UNet2DConditionModel: sliced attention",
        "image",
        condition(),
        _positional,
        other=TALL,
        prepare=lambda m: m.set_attention_slice("auto"),
        expect=ONE_SIZE,
        note="attends sample by sample: one batch",
    ),
    Case(
        "UNet2DConditionModel: fused projections",
        "image",
        condition(),
        _positional,
        other=TALL,
        prepare=lambda m: m.fuse_qkv_projections(),
    ),
    Case(
        "UNet2DConditionModel: channels last",
        "image",
        condition(),
        _positional,
        other=TALL,
        prepare=lambda m: m.to(memory_format=torch.channels_last),
    ),
    Case(
        "UNet2DConditionModel: x4 upscaler",
        "image",
        condition(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)),
        lambda s: _positional(s, 7, class_labels=torch.full((s.batch,), 20)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: stable unclip",
        "image",
        condition(class_embed_type="projection", projection_class_embeddings_input_dim=24),
        lambda s: _positional(s, class_labels=s.batched(24)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: timestep classes",
        "image",
        condition(class_embed_type="timestep"),
        lambda s: _positional(s, class_labels=torch.full((s.batch,), 250)),
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: unclip decoder",
        "image",
        condition(
            **{**_KANDINSKY, "encoder_hid_dim": None},
            in_channels=3,
            out_channels=6,
            class_embed_type="identity",
        ),
        _unclip,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: Kandinsky 2.1",
        "image",
        condition(
            **_KANDINSKY, encoder_hid_dim_type="text_image_proj", addition_embed_type="text_image"
        ),
        _kandinsky,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: Kandinsky 2.2",
        "image",
        condition(**_KANDINSKY, encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        _kandinsky22,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: Kandinsky 2.2 with a hint",
        "image",
        condition(
            **_KANDINSKY,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image_hint",
            in_channels=8,
        ),
        _kandinsky22_hint,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: DeepFloyd IF",
        "image",
        condition(**_DEEPFLOYD),
        _deepfloyd,
        other=TALL,
    ),
    Case(
        "UNet2DConditionModel: DeepFloyd IF upscaler",
        "image",
        condition(**{**_DEEPFLOYD, "in_channels": 6, "class_embed_type": "timestep"}),
        _deepfloyd_upscaler,
        other=TALL,
    ),
    Case(
        "UNetFlatConditionModel",
        "other",
        _flat,
        lambda s: ((s.batched(24, 1, 1), s.scalar()), {"encoder_hidden_states": s.text(TEXT)}),
        other=TALL,
    ),
    Case(
        "Kandinsky3UNet", "image", _kandinsky3, _kandinsky3_call, Size(16, 16), Size(24, 16, 3, 9)
    ),
    Case("DreamLiteUNetModel", "image", _dreamlite, _dreamlite_call, other=TALL),
    Case(
        "UVit2DModel",
        "image",
        _uvit,
        _amused,
        other=TALL,
        expect=REFUSED,
        note="its samples are codes",
    ),
    Case(
        "StableCascadeUNet: prior",
        "image",
        _cascade(
            clip_text_in_channels=24,
            clip_image_in_channels=20,
            timestep_conditioning_type=("sca", "crp"),
            switch_level=(False,),
        ),
        _cascade_prior,
        other=TALL,
    ),
    Case(
        "StableCascadeUNet: decoder",
        "image",
        _cascade(
            patch_size=2,
            effnet_in_channels=8,
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            up_blocks_repeat_mappers=(2, 1),
        ),
        _cascade_decoder,
        other=TALL,
    ),
)
