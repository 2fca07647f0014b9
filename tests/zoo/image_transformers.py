"""Image transformers that take latents as an image: DiT, PixArt, SD3, Sana and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import ONE_SIZE, REFUSED, Case, Scene, Size

TEXT = 24
HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
OTHER = Size(8, 12, 3, 9)


def make(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, name)(**settings)


def sizes(scene: Scene) -> dict[str, Any]:
    """Original size, target size and crop, [B, 2] each, as SDXL's descendants take them."""
    return {
        "original_size": torch.tensor([[1024.0, 1024.0]]).repeat(scene.batch, 1),
        "target_size": torch.tensor([[1024.0, 1024.0]]).repeat(scene.batch, 1),
        "crop_coords": torch.tensor([[0.0, 0.0]]).repeat(scene.batch, 1),
    }


def _auraflow(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4),), {
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.steps(1 / 1000),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _cogview3(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(4),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.long_steps(),
        **sizes(scene),
        "return_dict": False,
    }


def _dit(scene: Scene) -> tuple[Any, Any]:
    labels = torch.full((scene.batch,), 5)
    labels[-1] = 10  # the null class
    return (scene.image(4),), {"timestep": scene.long_steps(), "class_labels": labels}


def _ernie(scene: Scene) -> dict[str, Any]:
    lengths = torch.full((scene.batch,), scene.tokens)
    lengths[-1] -= 2
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(),
        "text_bth": scene.text(TEXT),
        "text_lens": lengths,
        "return_dict": False,
    }


def _glm(scene: Scene) -> dict[str, Any]:
    count = (scene.height // 2) * (scene.width // 2)
    times = sizes(scene)
    return {
        "hidden_states": scene.image(4),
        "encoder_hidden_states": scene.text(TEXT),
        "prior_token_id": scene.integers(32, scene.batch, count),
        "prior_token_drop": torch.zeros(scene.batch, count, dtype=torch.bool),
        "timestep": scene.long_steps() - 1,
        "target_size": times["target_size"],
        "crop_coords": times["crop_coords"],
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": None,
    }


def _hidream(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(4),
        "timesteps": scene.steps(),
        "encoder_hidden_states_t5": scene.text(TEXT),
        "encoder_hidden_states_llama3": scene.normal(2, scene.batch, scene.tokens, TEXT),
        "pooled_embeds": scene.batched(16),
        "attention_kwargs": None,
        "return_dict": False,
    }


def hunyuan_conditions(scene: Scene, head: int = 8) -> dict[str, Any]:
    """What HunyuanDiT and its ControlNet take besides latents and timestep."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    height, width = scene.height // 2, scene.width // 2
    rotary = get_2d_rotary_pos_embed(
        head, ((0, 0), (height, width)), (height, width), output_type="pt"
    )
    meta = torch.tensor([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]]).repeat(scene.batch, 1)
    return {
        "encoder_hidden_states": scene.batched(5, TEXT),
        "text_embedding_mask": scene.mask(tokens=5),
        "encoder_hidden_states_t5": scene.batched(7, 16),
        "text_embedding_mask_t5": scene.mask(tokens=7),
        "image_meta_size": meta,
        "style": torch.zeros(scene.batch, dtype=torch.long),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


HUNYUAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "cross_attention_dim": TEXT,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "text_len": 5,
    "text_len_t5": 7,
}


def _hunyuan(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.steps()), hunyuan_conditions(scene)


def _hunyuan_controlled(scene: Scene) -> tuple[Any, Any]:
    """Residuals arrive in a list that the model pops from."""
    args, kwargs = _hunyuan(scene)
    count = (scene.height // 2) * (scene.width // 2)
    samples = [0.3 * scene.batched(count, 32)]
    return args, {**kwargs, "controlnet_block_samples": samples}


def _hunyuan_image(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(8),
        "timestep": scene.steps(),
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
    }


def _hunyuan_image_glyphs(scene: Scene) -> dict[str, Any]:
    return {
        **_hunyuan_image(scene),
        "encoder_hidden_states_2": scene.batched(4, 20),
        "encoder_attention_mask_2": scene.mask(tokens=4),
    }


def _hunyuan_refiner(scene: Scene) -> dict[str, Any]:
    guidance = torch.full((scene.batch,), 3500.0)
    return {
        **_hunyuan_image(scene),
        "hidden_states": scene.batched(8, 1, scene.height, scene.width),
        "guidance": guidance,
    }


def _lumina(scene: Scene) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_mask": scene.mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(
            8, 96, 96, linear_factor=1.0, ntk_factor=1.0
        ),
        "cross_attention_kwargs": {"base_sequence_length": 16},
        "return_dict": False,
    }


def _lumina2(scene: Scene, *, padded: bool = True) -> dict[str, Any]:
    mask = scene.mask() if padded else torch.ones(scene.batch, scene.tokens, dtype=torch.int64)
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": mask,
        "return_dict": False,
        "attention_kwargs": None,
    }


def _omnigen(scene: Scene) -> dict[str, Any]:
    image = (scene.height // 2) * (scene.width // 2)
    length = scene.tokens + 1 + image
    mask = torch.ones(scene.batch, length, length)
    mask[:, : scene.tokens] = torch.ones(length, length).tril()[: scene.tokens]
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(1 / 1000),
        "input_ids": scene.integers(32, scene.batch, scene.tokens),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(scene.batch, 1),
        "return_dict": False,
    }


def _pixart(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4),), {
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "timestep": scene.long_steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _pixart_alpha(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = _pixart(scene)
    resolution = torch.tensor([[1024.0, 1024.0]]).repeat(scene.batch, 1)
    ratio = torch.tensor([[1.0]]).repeat(scene.batch, 1)
    conditions = {"resolution": resolution, "aspect_ratio": ratio}
    return args, {**kwargs, "added_cond_kwargs": conditions}


PIXART: dict[str, Any] = {
    **HEADS,
    "num_layers": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "caption_channels": TEXT,
    "sample_size": 8,
}


def _prx(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "attention_mask": scene.mask(kind=torch.bool),
        "return_dict": False,
    }


SANA: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    **HEADS,
    "num_layers": 1,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": TEXT,
    "sample_size": 8,
}


def sana(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(8),), {
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "timestep": scene.long_steps(),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _sana_sprint(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = sana(scene)
    guidance = torch.full((scene.batch,), 0.45)
    return args, {**kwargs, "guidance": guidance, "timestep": scene.steps(1 / 1000)}


def _sana_controlled(scene: Scene) -> tuple[Any, Any]:
    args, kwargs = sana(scene)
    samples = (0.3 * scene.batched(scene.height * scene.width, 32),)
    return args, {**kwargs, "controlnet_block_samples": samples}


SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    **HEADS,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
}


def sd3(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "pooled_projections": scene.batched(16),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _sd3_controlled(scene: Scene) -> dict[str, Any]:
    given = sd3(scene)  # drawn first: prompts as large as those of the case without residuals
    count = (scene.height // 2) * (scene.width // 2)
    return {**given, "block_controlnet_hidden_states": (0.3 * scene.batched(count, 32),)}


def _vq(scene: Scene) -> tuple[Any, Any]:
    ids = scene.integers(16, scene.batch, 64)
    return (ids,), {
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": torch.tensor(int(scene.t) % 100),
    }


def _block(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(32),
        "encoder_hidden_states": scene.text(TEXT),
        "return_dict": False,
    }


def _patches(scene: Scene) -> dict[str, Any]:
    """One latent image a sample, in a list, and prompts of different lengths in another."""
    images = [scene.normal(4, 1, scene.height, scene.width) for _ in range(scene.batch)]
    prompts = [scene.normal(scene.tokens, TEXT) for _ in range(scene.batch - 1)]
    return {"images": images, "prompts": [*prompts, scene.normal(scene.tokens - 2, TEXT)]}


def _z_image(scene: Scene) -> tuple[Any, Any]:
    made = _patches(scene)
    args = (made["images"], scene.steps(1 / 1000), made["prompts"])
    return args, {"joint_attention_kwargs": None, "return_dict": False}


def _joy(scene: Scene) -> dict[str, Any]:
    """The image that is made, and one that is edited."""
    return {
        "hidden_states": scene.batched(2, 4, 1, scene.height, scene.width),
        "timestep": scene.long_steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "return_dict": False,
    }


def _joy_plus(scene: Scene) -> dict[str, Any]:
    grid = (1, scene.height // 2, scene.width // 2)
    count = 2 * grid[1] * grid[2]
    return {
        "hidden_states": scene.batched(count, 4, 1, 2, 2),
        "timestep": scene.long_steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_hidden_states_mask": scene.mask(),
        "shape_list": [[grid, grid]] * scene.batch,
        "return_dict": False,
    }


JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": TEXT,
    "mlp_width_ratio": 2.0,
    "num_layers": 1,
    "rope_dim_list": [4, 6, 6],
}


def _fibo2(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.image(4),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.batched(2, scene.tokens, TEXT),
        "encoder_attention_mask": scene.mask(kind=torch.bool),
        "context_latents": None,
        "return_dict": False,
    }


CASES = (
    Case(
        "AuraFlowTransformer2DModel",
        "image",
        make(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            **HEADS,
            joint_attention_dim=TEXT,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        _auraflow,
        other=OTHER,
    ),
    Case(
        "BriaFibo2Transformer2DModel",
        "image",
        make(
            "BriaFibo2Transformer2DModel",
            in_channels=4,
            dim=48,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=TEXT,
            injection_layer_ids=(0,),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(8, 8, 8),
            axes_lens=(64, 32, 32),
        ),
        _fibo2,
        other=OTHER,
        expect=REFUSED,
        note="asks for the values of a tensor",
    ),
    Case(
        "CogView3PlusTransformer2DModel",
        "image",
        make(
            "CogView3PlusTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            **HEADS,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=12,
            sample_size=8,
        ),
        _cogview3,
        other=OTHER,
    ),
    Case(
        "CogView4Transformer2DModel",
        "image",
        make(
            "CogView4Transformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=12,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        lambda s: {**_cogview3(s), "attention_kwargs": None},
        other=OTHER,
    ),
    Case(
        "DiTTransformer2DModel",
        "image",
        make(
            "DiTTransformer2DModel",
            **HEADS,
            out_channels=8,
            num_layers=1,
            norm_num_groups=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        _dit,
        other=Size(12, 12),
        quick=True,
        expect=ONE_SIZE,
        note="its positions are those of its own size",
    ),
    Case(
        "ErnieImageTransformer2DModel",
        "image",
        make(
            "ErnieImageTransformer2DModel",
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=48,
            in_channels=4,
            out_channels=4,
            text_in_dim=TEXT,
            rope_axes_dim=(4, 6, 6),
        ),
        _ernie,
        other=OTHER,
    ),
    Case(
        "GlmImageTransformer2DModel",
        "image",
        make(
            "GlmImageTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        ),
        _glm,
        other=OTHER,
        expect=ONE_SIZE,
        note="one prior token for each patch",
    ),
    Case(
        "HiDreamImageTransformer2DModel",
        "image",
        make(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[TEXT, TEXT],
            text_emb_dim=16,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
            force_inference_output=True,
        ),
        _hidream,
        other=OTHER,
        expect=REFUSED,
        note="sorts tokens by expert in NumPy",
    ),
    Case(
        "HunyuanDiT2DModel",
        "image",
        make("HunyuanDiT2DModel", **HUNYUAN, num_layers=4),
        _hunyuan,
        other=OTHER,
    ),
    Case(
        "HunyuanDiT2DModel: ControlNet residuals",
        "image",
        make("HunyuanDiT2DModel", **HUNYUAN, num_layers=4),
        _hunyuan_controlled,
        other=OTHER,
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        "image",
        make(
            "HunyuanImageTransformer2DModel",
            in_channels=8,
            out_channels=8,
            **HEADS,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT,
            rope_axes_dim=(4, 4),
        ),
        _hunyuan_image,
        other=OTHER,
    ),
    Case(
        "HunyuanImageTransformer2DModel: glyphs",
        "image",
        make(
            "HunyuanImageTransformer2DModel",
            in_channels=8,
            out_channels=8,
            **HEADS,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT,
            text_embed_2_dim=20,
            rope_axes_dim=(4, 4),
        ),
        _hunyuan_image_glyphs,
        other=OTHER,
        expect=REFUSED,
        note="reorders prompts by the values of their masks",
    ),
    Case(
        "HunyuanImageTransformer2DModel: refiner",
        "image",
        make(
            "HunyuanImageTransformer2DModel",
            in_channels=8,
            out_channels=8,
            **HEADS,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=(1, 1, 1),
            guidance_embeds=True,
            text_embed_dim=TEXT,
            rope_axes_dim=(2, 2, 4),
        ),
        _hunyuan_refiner,
        other=OTHER,
    ),
    Case(
        "JoyImageEditTransformer3DModel",
        "image",
        make("JoyImageEditTransformer3DModel", **JOY),
        _joy,
        other=OTHER,
        expect=ONE_SIZE,
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel",
        "image",
        make("JoyImageEditPlusTransformer3DModel", **JOY),
        _joy_plus,
        other=OTHER,
        expect=ONE_SIZE,
        note="goes through its samples one by one: one batch",
    ),
    Case(
        "LuminaNextDiT2DModel",
        "image",
        make(
            "LuminaNextDiT2DModel",
            sample_size=8,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=TEXT,
        ),
        _lumina,
        other=OTHER,
        expect=ONE_SIZE,
        note="makes a list as long as the batch: one batch",
    ),
    Case(
        "Lumina2Transformer2DModel",
        "image",
        make(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=48,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(32, 16, 16),
            cap_feat_dim=TEXT,
        ),
        _lumina2,
        other=OTHER,
        expect=REFUSED,
        note="asks for the values of a tensor",
    ),
    Case(
        "Lumina2Transformer2DModel: full prompts",
        "image",
        make(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=48,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(32, 16, 16),
            cap_feat_dim=TEXT,
        ),
        lambda s: _lumina2(s, padded=False),
        other=OTHER,
        expect=REFUSED,
        note="asks for the values of a tensor",
    ),
    Case(
        "OmniGenTransformer2DModel",
        "image",
        make(
            "OmniGenTransformer2DModel",
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=48,
            num_layers=1,
            pad_token_id=0,
            vocab_size=32,
            max_position_embeddings=128,
            original_max_position_embeddings=64,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
            pos_embed_max_size=16,
            time_step_dim=16,
        ),
        _omnigen,
        other=OTHER,
        expect=REFUSED,
        note="asks for the values of a tensor",
    ),
    Case(
        "PixArtTransformer2DModel",
        "image",
        make("PixArtTransformer2DModel", **PIXART),
        _pixart,
        other=OTHER,
        expect=ONE_SIZE,
        note="its positions are those of its own size",
    ),
    Case(
        "PixArtTransformer2DModel: alpha",
        "image",
        make(
            "PixArtTransformer2DModel",
            **{**PIXART, "num_attention_heads": 6, "cross_attention_dim": 48},
            use_additional_conditions=True,
        ),
        _pixart_alpha,
        other=OTHER,
        expect=ONE_SIZE,
        note="its positions are those of its own size",
    ),
    Case(
        "PRXTransformer2DModel",
        "image",
        make(
            "PRXTransformer2DModel",
            in_channels=4,
            context_in_dim=TEXT,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            axes_dim=[8, 8],
        ),
        _prx,
        other=OTHER,
    ),
    Case(
        "SanaTransformer2DModel", "image", make("SanaTransformer2DModel", **SANA), sana, other=OTHER
    ),
    Case(
        "SanaTransformer2DModel: sprint",
        "image",
        make(
            "SanaTransformer2DModel", **SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads"
        ),
        _sana_sprint,
        other=OTHER,
    ),
    Case(
        "SanaTransformer2DModel: ControlNet residuals",
        "image",
        make("SanaTransformer2DModel", **SANA),
        _sana_controlled,
        other=OTHER,
    ),
    Case("SD3Transformer2DModel", "image", make("SD3Transformer2DModel", **SD3), sd3, other=OTHER),
    Case(
        "SD3Transformer2DModel: 3.5",
        "image",
        make("SD3Transformer2DModel", **SD3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        sd3,
        other=OTHER,
    ),
    Case(
        "SD3Transformer2DModel: ControlNet residuals",
        "image",
        make("SD3Transformer2DModel", **SD3),
        _sd3_controlled,
        other=OTHER,
    ),
    Case(
        "Transformer2DModel: continuous",
        "other",
        make(
            "Transformer2DModel",
            **HEADS,
            in_channels=32,
            norm_num_groups=4,
            cross_attention_dim=TEXT,
        ),
        _block,
        other=OTHER,
    ),
    Case(
        "Transformer2DModel: VQ diffusion",
        "image",
        make(
            "Transformer2DModel",
            **HEADS,
            sample_size=8,
            num_vector_embeds=17,
            cross_attention_dim=TEXT,
            num_embeds_ada_norm=100,
            norm_type="ada_norm",
            attention_bias=True,
            activation_fn="geglu-approximate",
        ),
        _vq,
        other=None,
        expect=REFUSED,
        note="its samples are codes",
    ),
    Case(
        "DreamLiteTransformer2DModel",
        "other",
        make(
            "DreamLiteTransformer2DModel",
            **HEADS,
            in_channels=32,
            norm_num_groups=4,
            cross_attention_dim=TEXT,
        ),
        _block,
        other=OTHER,
    ),
    Case(
        "ZImageTransformer2DModel",
        "image",
        make(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=48,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[8, 8, 8],
            axes_lens=[96, 32, 32],
        ),
        _z_image,
        other=OTHER,
        expect=ONE_SIZE,
        note="a tensor for each sample: one batch",
    ),
)
