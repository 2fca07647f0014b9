"""Audio: one-dimensional UNets, spectrogram UNets, and transformers over latent frames."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import Case, Scene, Size
from tests.zoo.image_transformers import make
from tests.zoo.unets import condition, unet

TEXT = 24
LONG = Size(8, 8, 48, 6)
LONGER = Size(8, 8, 64, 9)


def _dance() -> nn.Module:
    return diffusers.UNet1DModel(
        sample_size=256,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        block_out_channels=(32, 32, 64),
    )


def _value_function() -> nn.Module:
    """The planner of ValueGuidedRLPipeline: a UNet over the steps of a trajectory."""
    return diffusers.UNet1DModel(
        in_channels=6,
        out_channels=6,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        block_out_channels=(32, 64),
        act_fn="mish",
        flip_sin_to_cos=False,
        freq_shift=1,
        layers_per_block=1,
        downsample_each_block=False,
    )


def _audioldm(scene: Scene) -> tuple[Any, Any]:
    """AudioLDM and MusicLDM: no prompt tokens; the prompt is a class embedding."""
    return (scene.image(4), scene.scalar()), {
        "encoder_hidden_states": None,
        "class_labels": scene.batched(16),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def _audioldm2_model() -> nn.Module:
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import (
        AudioLDM2UNet2DConditionModel,
    )

    return AudioLDM2UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=((None, 20, TEXT), (None, 20, TEXT)),
    )


def _audioldm2(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.scalar()), {
        "encoder_hidden_states": scene.batched(4, 20),
        "encoder_hidden_states_1": scene.text(TEXT),
        "encoder_attention_mask_1": scene.mask(),
        "return_dict": False,
    }


def _stable_audio(scene: Scene) -> tuple[Any, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(
        8, scene.frames + 1, use_real=True, repeat_interleave_real=False
    )
    return (scene.batched(8, scene.frames), scene.scalar()[None].float()), {
        "encoder_hidden_states": scene.text(TEXT),
        "global_hidden_states": scene.batched(1, 20),
        "rotary_embedding": rotary,
        "return_dict": False,
    }


def _stable_audio3(scene: Scene) -> tuple[Any, Any]:
    return (scene.batched(8, scene.frames), scene.steps(1 / 1000)), {
        "encoder_hidden_states": scene.text(TEXT),
        "global_hidden_states": scene.batched(16),
        "encoder_attention_mask": scene.mask(),
        "return_dict": False,
    }


def _ace_step(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.batched(scene.frames, 8),
        "timestep": scene.steps(1 / 1000),
        "timestep_r": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.text(TEXT),
        "context_latents": scene.batched(scene.frames, 16),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _longcat(scene: Scene) -> dict[str, Any]:
    mask = torch.ones(scene.batch, scene.frames, dtype=torch.bool)
    return {
        "hidden_states": scene.batched(scene.frames, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "encoder_attention_mask": scene.mask(kind=torch.bool),
        "timestep": scene.steps(1 / 1000),
        "attention_mask": mask,
        "latent_cond": scene.batched(scene.frames, 8),
    }


def _minimax(scene: Scene) -> dict[str, Any]:
    return {
        "hidden_states": scene.batched(8, scene.frames),
        "timestep": scene.steps(1 / 1000),
        "encoder_hidden_states": scene.batched(scene.frames, TEXT),
        "return_dict": False,
    }


def _spectrogram(scene: Scene) -> dict[str, Any]:
    """Notes and the chunk before, each with its mask, in a list of pairs."""
    tokens = torch.ones(scene.batch, scene.tokens, dtype=torch.bool)
    frames = torch.ones(scene.batch, scene.frames, dtype=torch.bool)
    encodings = [(scene.text(32), tokens), (scene.batched(scene.frames, 32), frames)]
    return {
        "encodings_and_masks": encodings,
        "decoder_input_tokens": scene.batched(scene.frames, 16),
        "decoder_noise_time": scene.steps(1 / 1000),
    }


CASES = (
    Case(
        "UNet1DModel: dance diffusion",
        "audio",
        _dance,
        lambda s: ((s.batched(2, 4 * s.frames), s.scalar()), {}),
        LONG,
        LONGER,
    ),
    Case(
        "UNet1DModel: value-guided planner",
        "audio",
        _value_function,
        lambda s: ((s.batched(6, s.frames), s.long_steps()), {}),
        Size(8, 8, 16),
        Size(8, 8, 24),
    ),
    Case(
        "UNet2DModel: audio diffusion",
        "audio",
        unet(in_channels=1, out_channels=1),
        lambda s: ((s.image(1), s.scalar()), {}),
        other=Size(8, 16),
    ),
    Case(
        "UNet2DConditionModel: AudioLDM",
        "audio",
        condition(
            class_embed_type="simple_projection",
            class_embeddings_concat=True,
            projection_class_embeddings_input_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(32, 64),
        ),
        _audioldm,
        other=Size(16, 8),
    ),
    Case(
        "AudioLDM2UNet2DConditionModel",
        "audio",
        _audioldm2_model,
        _audioldm2,
        other=Size(16, 8, 3, 9),
        gain=0.8,  # three attentions a block: rounding errors of random weights add up
    ),
    Case(
        "StableAudioDiTModel",
        "audio",
        make(
            "StableAudioDiTModel",
            sample_size=64,
            in_channels=8,
            out_channels=8,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=20,
            cross_attention_input_dim=TEXT,
        ),
        _stable_audio,
        LONG,
        LONGER,
    ),
    Case(
        "StableAudio3DiTModel",
        "audio",
        make(
            "StableAudio3DiTModel",
            io_channels=8,
            embed_dim=64,
            depth=1,
            num_heads=2,
            cond_token_dim=TEXT,
            global_cond_dim=16,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            ff_mult=2.0,
            num_memory_tokens=4,
        ),
        _stable_audio3,
        LONG,
        LONGER,
    ),
    Case(
        "AceStepTransformer1DModel",
        "audio",
        make(
            "AceStepTransformer1DModel",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=8,
            encoder_hidden_size=TEXT,
        ),
        _ace_step,
        LONG,
        LONGER,
    ),
    Case(
        "LongCatAudioDiTTransformer",
        "audio",
        make(
            "LongCatAudioDiTTransformer",
            dit_dim=32,
            dit_depth=1,
            dit_heads=2,
            dit_text_dim=TEXT,
            latent_dim=8,
            ff_mult=2.0,
        ),
        _longcat,
        LONG,
        LONGER,
    ),
    Case(
        "MiniMaxMusic3Transformer1DModel",
        "audio",
        make(
            "MiniMaxMusic3Transformer1DModel",
            in_channels=8,
            condition_dim=TEXT,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=48,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        _minimax,
        LONG,
        LONGER,
    ),
    Case(
        "MiniMaxMusic3RVQDepthDecoder",
        "other",
        make(
            "MiniMaxMusic3RVQDepthDecoder",
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            audio_vocab_size=16,
            num_codebooks=4,
        ),
        lambda s: {"inputs_embeds": s.text(32)},
        other=Size(8, 8, 3, 9),
        note="predicts codes, no denoiser",
    ),
    Case(
        "T5FilmDecoder",
        "audio",
        make(
            "T5FilmDecoder",
            input_dims=16,
            targets_length=64,
            d_model=32,
            num_layers=1,
            num_heads=2,
            d_kv=16,
            d_ff=48,
        ),
        _spectrogram,
        Size(8, 8, 16, 6),
        Size(8, 8, 24, 9),
    ),
)
