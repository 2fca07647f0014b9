"""Models whose call is no ordinary one: packed sequences of several kinds, caches, lists."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.zoo.case import ONE_SIZE, REFUSED, Case, Scene, Size
from tests.zoo.controls import tokens
from tests.zoo.image_transformers import HUNYUAN, OTHER, hunyuan_conditions, make
from tests.zoo.packed_transformers import QWEN, qwen

TEXT = 24


def _cosmos3(scene: Scene) -> dict[str, Any]:
    """One prompt and one video in one sequence, without a batch."""
    rows, columns = scene.height // 2, scene.width // 2
    count = scene.frames * rows * columns
    prompt = scene.tokens
    grid = torch.stack(
        torch.meshgrid(
            torch.arange(scene.frames), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
    ).flatten(1)
    positions = torch.cat([torch.arange(prompt)[None].expand(3, -1), grid + prompt], dim=1)
    return {
        "input_ids": scene.integers(32, prompt),
        "text_indexes": torch.arange(prompt),
        "position_ids": positions,
        "und_len": prompt,
        "sequence_length": prompt + count,
        "vision_tokens": [scene.normal(1, 4, scene.frames, scene.height, scene.width)],
        "vision_token_shapes": [(scene.frames, rows, columns)],
        "vision_sequence_indexes": torch.arange(prompt, prompt + count),
        "vision_mse_loss_indexes": torch.arange(prompt, prompt + count),
        "vision_timesteps": torch.full((count,), scene.t),
        "vision_noisy_frame_indexes": [torch.arange(scene.frames)],
        "return_dict": False,
    }


def _minimax_h3(scene: Scene) -> dict[str, Any]:
    """Prompt, video and audio as rows of one sequence, and which rows are which."""
    video, audio, text = scene.height * scene.width // 4, 5, scene.tokens
    length = text + video + audio
    return {
        "hidden_states": scene.batched(video, 16),
        "audio_hidden_states": scene.batched(audio, 8),
        "encoder_hidden_states": scene.text(TEXT),
        "timestep": torch.tensor([0.0, scene.t / 1000]),
        "timestep_indices": torch.tensor([0] * text + [1] * (video + audio)),
        "token_tags": torch.tensor([0] * text + [1] * video + [2] * audio),
        "position_ids": torch.arange(length)[:, None].expand(-1, 3).float(),
        "video_indices": torch.arange(text, text + video),
        "audio_indices": torch.arange(text + video, length),
        "text_indices": torch.arange(text),
        "return_dict": False,
    }


def _sana_wm(scene: Scene) -> tuple[Any, Any]:
    """A timestep for every frame; the first is given and has 0."""
    times = torch.full((scene.batch, 1, scene.frames), scene.t)
    times[:, :, 0] = 0
    mask = scene.mask()
    return (scene.video(8), times, scene.batched(1, scene.tokens, TEXT)), {
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[64.0, 64.0]])},
        "mask": mask,
    }


def _wan_animate2(scene: Scene) -> dict[str, Any]:
    """The pass over the driving video, which fills the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid = (scene.frames, scene.height // 2, scene.width // 2)
    return {
        "hidden_states": [scene.normal(4, scene.frames, scene.height, scene.width)],
        "timestep": torch.tensor([scene.t]),
        "encoder_hidden_states": [scene.normal(scene.tokens, TEXT)],
        "encoder_hidden_states_image": scene.normal(1, 5, 1280),
        "condition_latents": [scene.normal(8, scene.frames, scene.height, scene.width)],
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": grid[0] * grid[1] * grid[2],
        "offset_grid_sizes": torch.tensor([grid]),
    }


_Z: dict[str, Any] = {"dim": 48, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def _z_control() -> nn.Module:
    transformer = diffusers.ZImageTransformer2DModel(
        **_Z,
        in_channels=4,
        n_layers=1,
        cap_feat_dim=TEXT,
        axes_dims=[8, 8, 8],
        axes_lens=[96, 32, 32],
    )
    control = diffusers.ZImageControlNetModel(
        **_Z, control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4
    )
    return diffusers.ZImageControlNetModel.from_transformer(control, transformer)


def _z_control_call(scene: Scene) -> tuple[Any, Any]:
    def images() -> list[torch.Tensor]:
        return [scene.normal(4, 1, scene.height, scene.width) for _ in range(scene.batch)]

    prompts = [scene.normal(scene.tokens - k % 2, TEXT) for k in range(scene.batch)]
    args = (images(), scene.steps(1 / 1000), prompts, images())
    return args, {"conditioning_scale": 0.75}


def _hunyuan_multi() -> nn.Module:
    return diffusers.HunyuanDiT2DMultiControlNetModel(
        [
            diffusers.HunyuanDiT2DControlNetModel(**HUNYUAN, transformer_num_layers=4)
            for _ in range(2)
        ]
    )


def _hunyuan_multi_call(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.steps()), {
        **hunyuan_conditions(scene),
        "controlnet_cond": [scene.image(4), scene.image(4)],
        "conditioning_scale": [0.8, 0.4],
    }


def _qwen_multi_call(scene: Scene) -> dict[str, Any]:
    call = {k: v for k, v in qwen(scene).items() if k not in ("guidance", "attention_kwargs")}
    return {
        **call,
        "controlnet_cond": [tokens(scene, 16), tokens(scene, 16)],
        "conditioning_scale": [0.8, 0.4],
    }


CASES = (
    Case(
        "Cosmos3OmniTransformer",
        "video",
        make(
            "Cosmos3OmniTransformer",
            head_dim=16,
            hidden_size=32,
            intermediate_size=48,
            latent_channel=4,
            patch_latent_dim=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=1,
            vocab_size=32,
            rope_axes_dim=(4, 2, 2),
        ),
        _cosmos3,
        batch=1,
        other_batch=None,
        other=Size(8, 12, 5, 9),
        expect=REFUSED,
        note="it takes tokens of text in the place of a sample",
    ),
    Case(
        "MiniMaxH3Transformer3DModel",
        "video",
        make(
            "MiniMaxH3Transformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            ffn_dim=48,
            in_channels=4,
            audio_in_channels=8,
            text_dim=TEXT,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax_h3,
        batch=1,
        other_batch=None,
        other=Size(8, 12, 3, 9),
        expect=REFUSED,
        note="it takes a timestep of video and one of audio for a sample",
    ),
    Case(
        "SanaWMTransformer3DModel",
        "video",
        make(
            "SanaWMTransformer3DModel",
            in_channels=8,
            num_layers=2,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=24,
            image_size=64,
            caption_channels=TEXT,
            chunk_plucker_post_attn_blocks=2,
        ),
        _sana_wm,
        other=Size(8, 12, 5, 9),
        expect=ONE_SIZE,
        note="the tracer fixes its batch and sizes",
    ),
    Case(
        "WanAnimate2Transformer3DModel",
        "video",
        make(
            "WanAnimate2Transformer3DModel",
            text_len=16,
            in_dim=12,
            dim=24,
            ffn_dim=48,
            freq_dim=16,
            text_dim=TEXT,
            out_dim=4,
            num_heads=2,
            num_layers=1,
        ),
        _wan_animate2,
        batch=1,
        other_batch=None,
        other=None,
        expect=REFUSED,
        note="its cache of keys and values is an object",
    ),
    Case(
        "ZImageControlNetModel",
        "control",
        _z_control,
        _z_control_call,
        other=OTHER,
        expect=ONE_SIZE,
        note="a tensor for each sample: one batch",
    ),
    Case(
        "HunyuanDiT2DMultiControlNetModel",
        "control",
        _hunyuan_multi,
        _hunyuan_multi_call,
        other=OTHER,
    ),
    Case(
        "QwenImageMultiControlNetModel",
        "control",
        lambda: diffusers.QwenImageMultiControlNetModel(
            [diffusers.QwenImageControlNetModel(**QWEN)]
        ),
        _qwen_multi_call,
        other=OTHER,
        expect=ONE_SIZE,
        note="the sizes of its images are Python numbers",
    ),
)
