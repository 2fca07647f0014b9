"""Video transformers that take prompts, latents and a timestep."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.case import ONE_SIZE, REFUSED, Case, Scene, Size
from tests.zoo.image_transformers import HEADS, make

TEXT = 24
OTHER = Size(8, 12, 5, 9)


def _allegro(scene: Scene) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    grid = (scene.height // 2, scene.width // 2)
    *frequencies, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        12, ((0, 0), grid), grid, scene.frames
    )
    places = torch.cartesian_prod(frames.long(), rows.long(), columns.long())
    positions = places.reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": scene.video(4),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "timestep": scene.long_steps(),
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
        "return_dict": False,
    }


def _anyflow(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.batched(scene.frames, 4, scene.height, scene.width),
        "timestep": torch.full((scene.batch, scene.frames), scene.t),
        "r_timestep": torch.full((scene.batch, scene.frames), scene.t - 50),
        "encoder_hidden_states": scene.text(TEXT),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _anyflow_far(scene: Scene) -> dict[str, Any]:
    """The first chunk of a video, with an empty cache for every block."""
    full, small = scene.height * scene.width // 4, scene.height * scene.width // 16
    cache = {
        "full_cache": torch.zeros(2, scene.batch, 2, 3 * scene.frames * full, 12),
        "compressed_cache": torch.zeros(2, scene.batch, 2, scene.frames * small, 12),
    }
    return {
        **_anyflow(scene),
        "chunk_partition": [scene.frames],
        "kv_cache": {0: cache},
        "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": False},
    }


def _cogvideo(scene: Scene, *, rotary: bool = True) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    table = get_3d_rotary_pos_embed(
        16,
        ((0, 0), (scene.height // 2, scene.width // 2)),
        (scene.height // 2, scene.width // 2),
        scene.frames,
    )
    return {
        "hidden_states": scene.batched(scene.frames, 4, scene.height, scene.width),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.long_steps(),
        "image_rotary_emb": table if rotary else None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _cogvideo_image(scene: Scene) -> dict[str, Any]:
    return {**_cogvideo(scene), "ofs": torch.full((1,), 2.0)}


COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
}


def _consisid(scene: Scene) -> dict[str, Any]:
    return {
        **_cogvideo(scene),
        "id_cond": scene.batched(16),
        "id_vit_hidden": [scene.batched(4, 16) for _ in range(1)],
    }


def _cosmos(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(4),
        "timestep": scene.steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 8 * scene.height, 8 * scene.width),
        "return_dict": False,
    }


def _cosmos25(scene: Scene) -> dict[str, Any]:
    mask = torch.zeros(scene.batch, 1, scene.frames, scene.height, scene.width)
    mask[:, :, 0] = 1
    call = _cosmos(scene)
    call.pop("fps")
    times = torch.full((scene.batch, 1, scene.frames, 1, 1), scene.t / 1000)
    return {**call, "condition_mask": mask, "timestep": times}


COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT,
    "adaln_lora_dim": 8,
    "max_size": (8, 16, 16),
    "concat_padding_mask": False,  # its resizing needs torchvision
}


def _easyanimate(scene: Scene) -> tuple[Any, Any]:
    return (scene.video(4), scene.steps()), {
        "encoder_hidden_states": scene.text(TEXT),
        "return_dict": False,
    }


def _helios(scene: Scene) -> dict[str, Any]:
    def history(frames: int) -> Any:
        return scene.batched(4, frames, scene.height, scene.width)

    def positions(start: int, count: int) -> Any:
        return torch.arange(start, start + count).repeat(scene.batch, 1)

    return {
        "hidden_states": scene.video(4),
        "timestep": scene.long_steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "indices_hidden_states": positions(7, scene.frames),
        "indices_latents_history_short": positions(6, 1),
        "indices_latents_history_mid": positions(4, 2),
        "indices_latents_history_long": positions(0, 4),
        "latents_history_short": history(1),
        "latents_history_mid": history(2),
        "latents_history_long": history(4),
        "attention_kwargs": None,
        "return_dict": False,
    }


HUNYUAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT,
    "rope_axes_dim": (2, 2, 4),
}


def _hunyuan(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(4),
        "timestep": scene.steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "pooled_projections": scene.batched(16),
        "guidance": torch.full((scene.batch,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _hunyuan15(scene: Scene) -> dict[str, Any]:
    """A text to video call: no image, so its embeddings are zeros."""
    return {
        "hidden_states": scene.video(9),
        "image_embeds": torch.zeros(scene.batch, 4, 12),
        "timestep": scene.steps(),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "encoder_hidden_states_2": scene.batched(4, 20),
        "encoder_attention_mask_2": scene.mask(tokens=4),
    }


def _framepack(scene: Scene) -> dict[str, Any]:
    def history(frames: int) -> Any:
        return scene.batched(4, frames, scene.height, scene.width)

    def positions(start: int, count: int) -> Any:
        return torch.arange(start, start + count)

    return {
        **_hunyuan(scene),
        "image_embeds": scene.batched(5, 12),
        "indices_latents": positions(20, scene.frames),
        "latents_clean": history(2),
        "indices_latents_clean": torch.tensor([0, 19]),
        "latents_history_2x": history(2),
        "indices_latents_history_2x": positions(17, 2),
        "latents_history_4x": history(16),
        "indices_latents_history_4x": positions(1, 16),
    }


def _kandinsky5(scene: Scene) -> dict[str, Any]:
    grid = (scene.frames, scene.height // 2, scene.width // 2)
    return {
        "hidden_states": scene.batched(scene.frames, scene.height, scene.width, 4),
        "encoder_hidden_states": scene.text(TEXT),
        "pooled_projections": scene.batched(16),
        "timestep": scene.steps(),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(scene.tokens),
        "scale_factor": (1, 2, 2),
        "sparse_params": None,
        "return_dict": True,
    }


def _kandinsky6(scene: Scene) -> dict[str, Any]:
    grid = (scene.frames, scene.height // 2, scene.width // 2)
    return {
        "hidden_states": scene.batched(scene.frames, scene.height, scene.width, 4),
        "audio_hidden_states": scene.batched(6, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "pooled_projections": scene.batched(16),
        "timestep": scene.steps(),
        "visual_rope_pos": tuple(torch.arange(size) for size in grid),
        "encoder_attention_mask": None,
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _kandinsky6_sr(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.batched(scene.frames, scene.height, scene.width, 9),
        "timestep": scene.steps(),
        "return_dict": False,
    }


def _latte(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(4),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.long_steps(),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def _ltx(scene: Scene) -> dict[str, Any]:
    count = scene.frames * scene.height * scene.width
    return {
        "hidden_states": scene.batched(count, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.steps(),
        "encoder_attention_mask": scene.mask(),
        "num_frames": scene.frames,
        "height": scene.height,
        "width": scene.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _ltx2(scene: Scene) -> dict[str, Any]:
    count = scene.frames * scene.height * scene.width
    return {
        "hidden_states": scene.batched(count, 8),
        "audio_hidden_states": scene.batched(6, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "audio_encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.steps(),
        "sigma": scene.steps(),
        "encoder_attention_mask": scene.mask(),
        "audio_encoder_attention_mask": scene.mask(),
        "num_frames": scene.frames,
        "height": scene.height,
        "width": scene.width,
        "fps": 24.0,
        "audio_num_frames": 6,
        "video_coords": None,
        "audio_coords": None,
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


LTX2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": TEXT,
    "rope_double_precision": False,
}


def _sana_wm_refiner(scene: Scene) -> dict[str, Any]:
    count = scene.frames * scene.height * scene.width
    return {
        "hidden_states": scene.batched(count, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.steps()[:, None].expand(-1, count),
        "video_rotary_emb": (scene.batched(count, 32).cos(), scene.batched(count, 32).sin()),
        "encoder_attention_mask": scene.mask(),
        "return_dict": False,
    }


def _mochi(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(4),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": scene.steps(),
        "encoder_attention_mask": scene.mask(kind=torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _motif(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(4),
        "timestep": scene.steps(),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
    }


def _sana_video(scene: Scene) -> tuple[Any, Any]:
    return (scene.video(4),), {
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(),
        "timestep": scene.long_steps(),
        "return_dict": False,
        "attention_kwargs": None,
    }


def wan(scene: Scene, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": scene.video(channels),
        "timestep": scene.long_steps(),
        "encoder_hidden_states": scene.text(TEXT),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_image(scene: Scene) -> dict[str, Any]:
    return {**wan(scene, 12), "encoder_hidden_states_image": scene.batched(5, 16)}


def _wan22(scene: Scene) -> dict[str, Any]:
    """Wan 2.2: a timestep for every token."""
    count = scene.frames * (scene.height // 2) * (scene.width // 2)
    times = torch.full((scene.batch, count), int(scene.t))
    times[:, : count // scene.frames] = 0
    return {**wan(scene), "timestep": times}


def _wan_vace(scene: Scene) -> dict[str, Any]:
    return {
        **wan(scene),
        "control_hidden_states": scene.video(6),
        "control_hidden_states_scale": torch.tensor([1.0]),
    }


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def _wan_animate(scene: Scene) -> dict[str, Any]:
    frames = 4 * scene.frames - 4  # of the video in pixels, a latent frame for every four
    return {
        **wan(scene, 12),
        "encoder_hidden_states_image": scene.batched(5, 16),
        "pose_hidden_states": scene.batched(4, scene.frames - 1, scene.height, scene.width),
        "face_pixel_values": scene.batched(3, frames, 16, 16),
        "motion_encode_batch_size": None,
    }


def _skyreels_forcing(scene: Scene) -> dict[str, Any]:
    times = torch.full((scene.batch, scene.frames), int(scene.t))
    return {
        **wan(scene),
        "timestep": times,
        "enable_diffusion_forcing": True,
        "fps": [1] * scene.batch,
    }


CASES = (
    Case(
        "AllegroTransformer3DModel",
        "video",
        make(
            "AllegroTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=3,
            caption_channels=TEXT,
        ),
        _allegro,
        other=OTHER,
    ),
    Case(
        "AnyFlowTransformer3DModel",
        "video",
        make("AnyFlowTransformer3DModel", **WAN),
        _anyflow,
        other=Size(8, 12, 4, 9),
        note="more frames than rows or columns need a calibration call of their own",
    ),
    Case(
        "AnyFlowFARTransformer3DModel",
        "video",
        make("AnyFlowFARTransformer3DModel", **WAN, chunk_partition=(3, 3, 3)),
        _anyflow_far,
        other=OTHER,
        expect=REFUSED,
        note="its masks are made under torch.vmap",
    ),
    Case(
        "ChronoEditTransformer3DModel",
        "video",
        make(
            "ChronoEditTransformer3DModel",
            **{**WAN, "in_channels": 12, "rope_temporal_skip_len": 8},
            image_dim=16,
            added_kv_proj_dim=24,
        ),
        _wan_image,
        Size(8, 8, 2, 512),
        Size(8, 12, 2, 512),
        note="it counts on prompts of 512 tokens",
    ),
    Case(
        "CogVideoXTransformer3DModel",
        "video",
        make("CogVideoXTransformer3DModel", **COGVIDEO, use_rotary_positional_embeddings=True),
        _cogvideo,
        other=OTHER,
    ),
    Case(
        "CogVideoXTransformer3DModel: 2b",
        "video",
        make("CogVideoXTransformer3DModel", **COGVIDEO),
        lambda s: _cogvideo(s, rotary=False),
        other=Size(8, 12, 5, 6),
        expect=ONE_SIZE,
        note="its positions are learned",
    ),
    Case(
        "CogVideoXTransformer3DModel: image to video",
        "video",
        make(
            "CogVideoXTransformer3DModel",
            **COGVIDEO,
            use_rotary_positional_embeddings=True,
            ofs_embed_dim=16,
        ),
        _cogvideo_image,
        other=OTHER,
    ),
    Case(
        "ConsisIDTransformer3DModel",
        "video",
        make(
            "ConsisIDTransformer3DModel",
            **{**COGVIDEO, "num_attention_heads": 3},
            use_rotary_positional_embeddings=True,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=16,
            LFE_vit_dim=16,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=2,
            LFE_output_dim=32,
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        _consisid,
        other=OTHER,
    ),
    Case(
        "CosmosTransformer3DModel",
        "video",
        make("CosmosTransformer3DModel", **COSMOS),
        _cosmos,
        other=OTHER,
    ),
    Case(
        "CosmosTransformer3DModel: 2.5",
        "video",
        make(
            "CosmosTransformer3DModel",
            **{**COSMOS, "in_channels": 5, "extra_pos_embed_type": None},
        ),
        _cosmos25,
        other=OTHER,
    ),
    Case(
        "EasyAnimateTransformer3DModel",
        "video",
        make(
            "EasyAnimateTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=1,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=TEXT,
        ),
        _easyanimate,
        other=OTHER,
        expect=ONE_SIZE,
        note="torch.linspace takes a number of frames",
    ),
    Case(
        "HeliosTransformer3DModel",
        "video",
        make(
            "HeliosTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=48,
            num_layers=1,
            rope_dim=(4, 4, 4),
        ),
        _helios,
        Size(16, 16),
        Size(16, 24, 5, 9),
    ),
    Case(
        "HunyuanVideoTransformer3DModel",
        "video",
        make(
            "HunyuanVideoTransformer3DModel",
            **HUNYUAN,
            num_layers=1,
            num_single_layers=1,
            pooled_projection_dim=16,
        ),
        _hunyuan,
        other=OTHER,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        "video",
        make(
            "HunyuanVideo15Transformer3DModel",
            **{**HUNYUAN, "in_channels": 9},
            num_layers=1,
            text_embed_2_dim=20,
            image_embed_dim=12,
        ),
        _hunyuan15,
        other=OTHER,
        expect=REFUSED,
        note="it asks whether there is an image by its values",
    ),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        "video",
        make(
            "HunyuanVideoFramepackTransformer3DModel",
            **HUNYUAN,
            num_layers=1,
            num_single_layers=1,
            pooled_projection_dim=16,
            has_image_proj=True,
            image_proj_dim=12,
            has_clean_x_embedder=True,
        ),
        _framepack,
        Size(16, 16),
        Size(16, 32, 5, 9),
        expect=REFUSED,
        note="it cuts prompts to lengths by their masks' values",
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        "video",
        make(
            "Kandinsky5Transformer3DModel",
            in_text_dim=TEXT,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
        ),
        _kandinsky5,
        batch=1,
        other_batch=None,
        other=OTHER,
        note="its rotary table takes one video",
    ),
    Case(
        "Kandinsky6Transformer3DModel",
        "video",
        make(
            "Kandinsky6Transformer3DModel",
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=TEXT,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            visual_cond=False,
            in_audio_dim=8,
            out_audio_dim=8,
        ),
        _kandinsky6,
        other=OTHER,
        expect=ONE_SIZE,
        note="its rotary table takes numbers of frames, rows and columns",
        gain=0.7,  # its attention is sharp: a rounded query looks elsewhere, simulated as well
    ),
    Case(
        "Kandinsky6SRTransformer3DModel",
        "video",
        make(
            "Kandinsky6SRTransformer3DModel",
            in_visual_dim=4,
            out_visual_dim=8,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
        ),
        _kandinsky6_sr,
        Size(16, 16, 2),
        None,
        expect=REFUSED,
        note="its masks are made under torch.vmap",
    ),
    Case(
        "LatteTransformer3DModel",
        "video",
        make(
            "LatteTransformer3DModel",
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=TEXT,
            video_length=3,
        ),
        _latte,
        other=Size(8, 8, 3, 9),
    ),
    Case(
        "LTXVideoTransformer3DModel",
        "video",
        make(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=TEXT,
        ),
        _ltx,
        Size(4, 4),
        Size(4, 6, 5, 9),
        expect=ONE_SIZE,
        note="it is given frames, height and width as numbers",
    ),
    Case(
        "LTX2VideoTransformer3DModel",
        "video",
        make("LTX2VideoTransformer3DModel", **LTX2),
        _ltx2,
        Size(4, 4),
        Size(4, 6, 5, 9),
        expect=ONE_SIZE,
        note="it is given frames, height and width as numbers",
    ),
    Case(
        "MochiTransformer3DModel",
        "video",
        make(
            "MochiTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=1,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=TEXT,
            time_embed_dim=16,
            max_sequence_length=6,
        ),
        _mochi,
        other=OTHER,
    ),
    Case(
        "MotifVideoTransformer3DModel",
        "video",
        make(
            "MotifVideoTransformer3DModel",
            **{k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"},
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
        ),
        _motif,
        other=OTHER,
    ),
    Case(
        "SanaVideoTransformer3DModel",
        "video",
        make(
            "SanaVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=TEXT,
            sample_size=8,
        ),
        _sana_video,
        other=OTHER,
    ),
    Case(
        "SanaWMLTX2RefinerTransformer3DModel",
        "video",
        make("SanaWMLTX2RefinerTransformer3DModel", **LTX2),
        _sana_wm_refiner,
        Size(4, 4),
        Size(4, 6, 5, 9),
    ),
    Case(
        "SkyReelsV2Transformer3DModel",
        "video",
        make("SkyReelsV2Transformer3DModel", **WAN),
        wan,
        other=OTHER,
    ),
    Case(
        "SkyReelsV2Transformer3DModel: forcing",
        "video",
        make("SkyReelsV2Transformer3DModel", **WAN),
        _skyreels_forcing,
        other=OTHER,
    ),
    Case(
        "WanTransformer3DModel",
        "video",
        make("WanTransformer3DModel", **WAN),
        wan,
        other=OTHER,
        quick=True,
    ),
    Case(
        "WanTransformer3DModel: image to video",
        "video",
        make(
            "WanTransformer3DModel",
            **{**WAN, "in_channels": 12},
            image_dim=16,
            added_kv_proj_dim=24,
        ),
        _wan_image,
        Size(tokens=512),
        Size(8, 12, 5, 512),
        note="it counts on prompts of 512 tokens",
    ),
    Case(
        "WanTransformer3DModel: 2.2",
        "video",
        make("WanTransformer3DModel", **WAN),
        _wan22,
        other=OTHER,
    ),
    Case(
        "WanVACETransformer3DModel",
        "video",
        make("WanVACETransformer3DModel", **WAN, vace_layers=[0], vace_in_channels=6),
        _wan_vace,
        other=OTHER,
    ),
    Case(
        "WanAnimateTransformer3DModel",
        "video",
        make(
            "WanAnimateTransformer3DModel",
            **{**WAN, "in_channels": 12},
            latent_channels=4,
            image_dim=16,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        _wan_animate,
        other=OTHER,
        expect=ONE_SIZE,
        note="faces of all samples go through its encoder in pieces of eight",
    ),
)
