"""LPIPS, Inception features, CLIP score, aesthetic score: standard networks, weights from disk.

Each looks for its weights at the path it is given, else where the library that made them keeps
them; without them it raises EvaluationError with the address and the command. None downloads.
Images are [N, 3, H, W] in [-1, 1]; networks run in float32 on the images' device, results are on
the CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import EvaluationError
from fxquant.evaluate.weights import (
    AESTHETIC,
    ALEXNET,
    INCEPTION,
    VGG16,
    WeightFile,
    find,
    find_clip,
    load,
    require,
)

INCEPTION_FEATURE = "Inception pool, 2048 numbers (torch-fidelity)"
INCEPTION_SPATIAL = "Inception mixed_6/conv, 7 x 17 x 17 (torch-fidelity)"
INCEPTION_CLASSES = "Inception classes, 1008 (torch-fidelity)"
_SPATIAL_CHANNELS = 7
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_AESTHETIC_WIDTH = 768  # of CLIP ViT-L/14's image embedding


@torch.no_grad()
def lpips(
    a: Tensor,
    b: Tensor,
    net: Literal["alex", "vgg"] = "alex",
    weights: Path | None = None,
    batch_size: int = 50,
) -> Tensor:
    """LPIPS of each pair of images, [N] float32; 0 for identical ones (Zhang et al. 2018).

    torchmetrics' network, whose package holds the linear heads (version 0.1).

    Args:
        a, b: images of one shape; torchvision's networks need 64 pixels or more to make sense.
        weights: torchvision's file of AlexNet or VGG-16, default torch hub's folder.

    Raises:
        EvaluationError: torchmetrics, torchvision or the weights are missing or do not fit.
        ValueError: other or unequal shapes, or values outside [-1, 1].
    """
    _check_images(a)
    _check_images(b)
    if a.shape != b.shape:
        raise ValueError(f"lpips compares equal shapes, got {list(a.shape)} and {list(b.shape)}")
    model = _lpips_network(net, weights).to(a.device)
    pairs = zip(a.float().split(batch_size), b.float().split(batch_size), strict=True)
    return torch.cat([model(x, y).flatten().cpu() for x, y in pairs])


def _lpips_network(net: str, weights: Path | None) -> nn.Module:
    """torchmetrics' network with a random trunk, which fetches nothing, then its weights."""
    require("torchvision")
    module = require("torchmetrics.functional.image.lpips")
    file = ALEXNET if net == "alex" else VGG16
    tensors = load(file, weights)
    model: nn.Module = module._NoTrainLpips(net=net, pnet_rand=True)
    names = {name: _torchvision_name(name) for name in model.state_dict() if "slice" in name}
    if missing := sorted(set(names.values()) - set(tensors)):
        raise EvaluationError(
            f"{find(file, weights)} is not {file.title}: it has no {missing[0]} (expected "
            f"{file.url})"
        )
    trunk = {name: tensors[theirs] for name, theirs in names.items()}
    _fill(model, {**model.state_dict(), **trunk}, file, weights)
    return model


def _torchvision_name(name: str) -> str:
    """net.slice2.3.weight -> features.3.weight"""
    return f"features.{'.'.join(name.split('.')[2:])}"


class InceptionFeatures(NamedTuple):
    """Of N images, float32.

    Attributes:
        pool: [N, 2048], for FID, KID, precision and recall.
        spatial: [N, 7, 17, 17], the first 7 channels of mixed_6/conv before its norm, for sFID.
        probabilities: [N, 1008], softmax of the logits without bias, for the inception score.
    """

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


@torch.no_grad()
def inception_features(
    images: Tensor, weights: Path | None = None, batch_size: int = 50
) -> InceptionFeatures:
    """What FID's own Inception network sees, as torch-fidelity runs it on 8-bit images.

    Args:
        images: any size; resized to 299 as the original TensorFlow graph does.
        weights: torch-fidelity's file, default torch hub's folder.

    Raises:
        EvaluationError: torch-fidelity, torchvision or the weights are missing or do not fit.
        ValueError: no images [N, 3, H, W] in [-1, 1].
    """
    _check_images(images)
    model = _inception(weights).to(images.device)
    seen: list[Tensor] = []
    layer: Any = model.Mixed_6d
    layer.branch1x1.conv.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[:, :_SPATIAL_CHANNELS].cpu())
    )
    made = [model(part) for part in _bytes(images).split(batch_size)]
    pool, logits = (torch.cat(parts).cpu() for parts in zip(*made, strict=True))
    return InceptionFeatures(pool, torch.cat(seen), logits.softmax(dim=1))


def _inception(weights: Path | None) -> nn.Module:
    module = require("torch_fidelity.feature_extractor_inceptionv3")
    load(INCEPTION, weights)  # torch-fidelity unpickles anything: let only tensors through to it
    place = find(INCEPTION, weights)
    try:
        model: nn.Module = module.FeatureExtractorInceptionV3(
            "fxquant", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(place)
        )
    except RuntimeError as error:
        raise _misfit(INCEPTION, weights, error) from error
    return model


@torch.no_grad()
def clip_score(
    images: Tensor, prompts: Sequence[str], folder: Path | None = None, batch_size: int = 50
) -> Tensor:
    """max(100 cos(image, prompt), 0) of each image and its prompt, [N] float32.

    CLIPScore of Hessel et al. 2021 with torchmetrics' factor 100 in place of 2.5. Images are
    resized (bicubic, antialiased) and cropped at the centre; prompts are cut at 77 tokens.

    Args:
        images: as many as prompts.
        folder: a CLIP model in Hugging Face's layout, default openai/clip-vit-large-patch14 in
            its cache.

    Raises:
        EvaluationError: transformers or the model is missing.
        ValueError: no images [N, 3, H, W] in [-1, 1], or another number of prompts.
    """
    _check_images(images)
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
    model, place = _clip(folder)
    seen = _clip_images(model.to(images.device), images, batch_size)
    read = _clip_prompts(model, place, prompts, batch_size)
    return (100 * (seen * read).sum(dim=1)).clamp(min=0)


@torch.no_grad()
def aesthetic_score(
    images: Tensor,
    folder: Path | None = None,
    head: Path | None = None,
    batch_size: int = 50,
) -> Tensor:
    """LAION's aesthetic predictor V1 of each image, [N] float32, roughly 1 to 10.

    A linear layer on the normalised image embedding of CLIP ViT-L/14.

    Args:
        folder: as for `clip_score`; must be ViT-L/14.
        head: the file of the linear layer, default ~/.cache/emb_reader, where LAION's code puts it.

    Raises:
        EvaluationError: transformers, CLIP or the head is missing or does not fit.
        ValueError: no images [N, 3, H, W] in [-1, 1].
    """
    _check_images(images)
    linear = nn.Linear(_AESTHETIC_WIDTH, 1)
    _fill(linear, load(AESTHETIC, head), AESTHETIC, head)
    model, place = _clip(folder)
    if model.config.projection_dim != _AESTHETIC_WIDTH:
        raise EvaluationError(
            f"{place} embeds images in {model.config.projection_dim} numbers; the aesthetic head "
            f"reads the {_AESTHETIC_WIDTH} of CLIP ViT-L/14"
        )
    seen = _clip_images(model.to(images.device), images, batch_size)
    scores: Tensor = linear(seen)
    return scores[:, 0]


def _clip(folder: Path | None) -> tuple[Any, Path]:
    """The model, and the folder it came from."""
    transformers = require("transformers")
    place = find_clip(folder)
    model = _from_folder(transformers.CLIPModel, place)
    return model.float().eval(), place


def _from_folder(kind: Any, place: Path) -> Any:
    try:
        return kind.from_pretrained(str(place), local_files_only=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise EvaluationError(f"{place} holds no CLIP model that loads: {error}") from error


def _clip_images(model: Any, images: Tensor, batch_size: int) -> Tensor:
    """Unit embeddings [N, d]."""
    size = model.config.vision_config.image_size
    return _unit(
        lambda part: model.visual_projection(
            model.vision_model(pixel_values=_clip_pixels(part.float(), size)).pooler_output
        ),
        images.split(batch_size),
    )


def _clip_prompts(model: Any, place: Path, prompts: Sequence[str], batch_size: int) -> Tensor:
    """Unit embeddings [N, d]."""
    tokenizer = _from_folder(require("transformers").CLIPTokenizer, place)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    ).to(model.device)
    parts = zip(
        tokens["input_ids"].split(batch_size),
        tokens["attention_mask"].split(batch_size),
        strict=True,
    )
    return _unit(
        lambda part: model.text_projection(
            model.text_model(input_ids=part[0], attention_mask=part[1]).pooler_output
        ),
        list(parts),
    )


def _unit(embed: Callable[[Any], Tensor], parts: Sequence[Any]) -> Tensor:
    return F.normalize(torch.cat([embed(part).cpu() for part in parts]), dim=1)


def _clip_pixels(images: Tensor, size: int) -> Tensor:
    """Shorter side to `size`, centre crop, CLIP's mean and deviation."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = (pixels[..., top : top + size, left : left + size] + 1) / 2
    mean, std = (pixels.new_tensor(v).reshape(3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    return (pixels - mean) / std


def _bytes(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 uint8."""
    return ((images.float() + 1) * 127.5).round().to(torch.uint8)


def _fill(model: nn.Module, state: dict[str, Tensor], file: WeightFile, path: Path | None) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _misfit(file, path, error) from error


def _misfit(file: WeightFile, path: Path | None, error: Exception) -> EvaluationError:
    return EvaluationError(f"{find(file, path)} is not {file.title} (expected {file.url}): {error}")


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images must be [N, 3, H, W] with N >= 1, got {list(images.shape)}")
    if not bool((images.abs() <= 1).all()):
        raise ValueError(f"images {list(images.shape)} must lie in [-1, 1]")
