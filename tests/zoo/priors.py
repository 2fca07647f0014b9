"""Priors, and models that denoise several things at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.case import Case, Scene, Size
from tests.zoo.image_transformers import HEADS, make

TEXT = 32


def _prior(scene: Scene) -> tuple[Any, Any]:
    return (scene.batched(TEXT),), {
        "timestep": scene.scalar(),
        "proj_embedding": scene.batched(TEXT),
        "encoder_hidden_states": scene.text(TEXT),
        "attention_mask": scene.mask(kind=torch.bool),
    }


def _shap_e(scene: Scene) -> tuple[Any, Any]:
    return (scene.batched(8, TEXT),), {
        "timestep": scene.scalar(),
        "proj_embedding": scene.batched(16),
    }


def _wuerstchen_prior() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import (
        WuerstchenPrior,
    )

    return WuerstchenPrior(c_in=4, c=32, c_cond=24, c_r=16, depth=1, nhead=4)


@torch.no_grad()
def _small_output(model: Any) -> None:
    """The prior divides by one minus half of its output, which training keeps small."""
    model.out[1].weight.mul_(0.1)


def _wuerstchen_prior_call(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4),), {"r": scene.steps(1 / 1000), "c": scene.text(24)}


def _wuerstchen_decoder() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
        WuerstchenDiffNeXt,
    )

    return WuerstchenDiffNeXt(
        c_r=16,
        c_cond=32,
        c_hidden=[32, 64],
        nhead=[-1, 4],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=8,
        clip_embd=24,
    )


def _wuerstchen_decoder_call(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4),), {
        "r": scene.steps(1 / 1000),
        "effnet": scene.batched(8, scene.height // 4, scene.width // 4),
        "clip": scene.text(24),
    }


def _unidiffuser() -> nn.Module:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    return UniDiffuserModel(
        text_dim=24,
        clip_img_dim=20,
        num_text_tokens=6,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        norm_type="layer_norm",
        use_data_type_embedding=True,
        use_patch_pos_embed=False,
    )


def _unidiffuser_call(scene: Scene) -> tuple[Any, Any]:
    return (scene.image(4), scene.batched(1, 20), scene.text(24)), {
        "timestep_img": scene.scalar(),
        "timestep_text": scene.scalar(),
        "data_type": 1,
    }


def _text_to_image(scene: Scene) -> tuple[Any, Any]:
    """The prompt is given, so its timestep is the number 0."""
    args, kwargs = _unidiffuser_call(scene)
    return args, {**kwargs, "timestep_text": 0}


def _u_transformer() -> nn.Module:
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    return UTransformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu",
    )


def _proteina(scene: Scene) -> dict[str, Any]:
    return {
        "bb_ca": scene.text(3),
        "local_latents": scene.text(8),
        "bb_ca_time": scene.steps(1 / 1000),
        "local_latents_time": scene.steps(1 / 1000),
        "padding_mask": scene.mask(kind=torch.bool),
        "token_type": scene.integers(7, scene.batch, scene.tokens),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(scene.batch, scene.tokens, dtype=torch.bool),
            "supports_local_latent": torch.ones(scene.batch, scene.tokens, dtype=torch.bool),
        },
        "recycle_depth": 0,
        "attention_kwargs": None,
    }


PRIOR: dict[str, Any] = {**HEADS, "num_layers": 1, "embedding_dim": TEXT, "num_embeddings": 6}

CASES = (
    Case(
        "PriorTransformer",
        "prior",
        make("PriorTransformer", **PRIOR),
        _prior,
        other=None,
        quick=True,
        note="the prompt length is the model's",
    ),
    Case(
        "PriorTransformer: Shap-E",
        "prior",
        make(
            "PriorTransformer",
            **{**PRIOR, "num_embeddings": 8},
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            encoder_hid_proj_type=None,
            added_emb_type=None,
            embedding_proj_dim=16,
            clip_embed_dim=2 * TEXT,
        ),
        _shap_e,
        other=None,
        note="the length is the model's",
    ),
    Case(
        "WuerstchenPrior",
        "prior",
        _wuerstchen_prior,
        _wuerstchen_prior_call,
        other=Size(8, 12, 3, 9),
        prepare=_small_output,
    ),
    Case(
        "WuerstchenDiffNeXt",
        "image",
        _wuerstchen_decoder,
        _wuerstchen_decoder_call,
        Size(16, 16),
        Size(16, 24, 3, 9),
    ),
    Case(
        "UniDiffuserModel",
        "image",
        _unidiffuser,
        _unidiffuser_call,
        other=None,
    ),
    Case(
        "UniDiffuserModel: prompt to image",
        "image",
        _unidiffuser,
        _text_to_image,
        other=None,
    ),
    Case(
        "UTransformer2DModel",
        "other",
        _u_transformer,
        lambda s: {"hidden_states": s.image(4), "return_dict": False},
        other=None,
    ),
    Case(
        "RFD4ProteinaTransformer",
        "other",
        make(
            "RFD4ProteinaTransformer",
            nlayers=1,
            token_dim=32,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=16,
            latent_dim=8,
            token_type_emb_dim=8,
            cath_emb_dim=8,
            t_emb_dim=16,
            seq_sep_dim=8,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
            tri_mult_c=8,
        ),
        _proteina,
        other=Size(8, 8, 3, 9),
    ),
)
