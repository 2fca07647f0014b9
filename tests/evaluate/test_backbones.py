"""Standard networks: what is missing is said, and with weights on disk they run. No downloads."""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import EvaluationError
from fxquant.evaluate import backbones, weights
from fxquant.evaluate.backbones import aesthetic_score, clip_score, inception_features, lpips
from fxquant.evaluate.weights import AESTHETIC, ALEXNET, INCEPTION, VGG16

WORDS = ("a</w>", "cat</w>", "dog</w>", "<|startoftext|>", "<|endoftext|>")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No network and empty caches."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def images(n: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator) * 2 - 1


def installed(*packages: str) -> None:
    """Skip where one cannot be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError):
            pytest.skip(f"needs {package}")


@pytest.mark.parametrize("file", [INCEPTION, ALEXNET, VGG16, AESTHETIC], ids=lambda f: f.name)
def test_missing_weights_are_named_with_place_address_and_command(file, tmp_path):
    with pytest.raises(EvaluationError, match=rf"{file.title} are missing") as caught:
        weights.find(file, None)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"curl -L --create-dirs -o '{file.folder() / file.name}' {file.url}" in message
    with pytest.raises(EvaluationError, match=r"looked for elsewhere\.pth"):
        weights.find(file, Path("elsewhere.pth"))


def test_weights_are_found_by_path_and_in_the_library_s_folder(tmp_path):
    for place in (tmp_path / "mine.pth", ALEXNET.folder() / ALEXNET.name):
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"x": torch.ones(2)}, place)
    assert weights.find(ALEXNET, tmp_path / "mine.pth") == tmp_path / "mine.pth"
    assert weights.find(ALEXNET, None) == tmp_path / "hub" / "checkpoints" / ALEXNET.name
    assert weights.load(ALEXNET, None)["x"].tolist() == [1, 1]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut"])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"bad\.pth holds no tensors"):
        weights.load(AESTHETIC, tmp_path / "bad.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(EvaluationError, match="holds no tensors"):
        weights.load(INCEPTION, tmp_path / "module.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(EvaluationError, match="no dictionary of tensors"):
        weights.load(INCEPTION, tmp_path / "list.pth")


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(EvaluationError, match=r"needs no_such.*pip install 'fxquant\[eval\]'"):
        weights.require("no_such")


def test_a_package_that_does_not_import_says_why(monkeypatch):
    def broken(_name: str) -> None:
        raise RuntimeError("operator nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EvaluationError, match=r"torchvision is installed but .*nms does not exist"):
        weights.require("torchvision")


def test_missing_clip_is_named_with_its_files_and_the_command(tmp_path):
    with pytest.raises(EvaluationError, match=r"config\.json, model\.safetensors or .*") as caught:
        weights.find_clip(None)
    assert str(tmp_path / "hf" / "models--openai--clip-vit-large-patch14") in str(caught.value)
    assert str(caught.value).endswith("hf download openai/clip-vit-large-patch14")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"missing tokenizer\.json or vocab\.json; .*--local"):
        weights.find_clip(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param(torch.zeros(2, 1, 8, 8), r"\[N, 3, H, W\]", id="grey"),
        pytest.param(torch.zeros(0, 3, 8, 8), "N >= 1", id="empty"),
        pytest.param(torch.full((1, 3, 8, 8), 1.01), r"in \[-1, 1\]", id="too bright"),
        pytest.param(torch.full((1, 3, 8, 8), float("nan")), r"in \[-1, 1\]", id="nan"),
    ],
)
def test_bad_images_are_refused(bad, message):
    calls = (
        lambda: lpips(bad, bad),
        lambda: inception_features(bad),
        lambda: clip_score(bad, ["a"] * len(bad)),
        lambda: aesthetic_score(bad),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(images(2), images(1))
    with pytest.raises(ValueError, match="2 images need as many prompts, got 1"):
        clip_score(images(2), ["a"])


def test_pixels_for_clip_are_resized_cropped_and_normalised():
    grey = torch.zeros(1, 3, 10, 30)
    grey[..., :8], grey[..., 22:] = -1, 1  # cropped away
    pixels = backbones._clip_pixels(grey, 20)
    assert pixels.shape == (1, 3, 20, 20)
    expected = [
        (0.5 - m) / s for m, s in zip(backbones._CLIP_MEAN, backbones._CLIP_STD, strict=True)
    ]
    torch.testing.assert_close(pixels[0, :, 10, 10], torch.tensor(expected))
    torch.testing.assert_close(pixels.amax((0, 2, 3)), pixels.amin((0, 2, 3)))


def test_bytes_round_to_the_nearest():
    values = torch.tensor([-1.0, -0.999, 0.0, 1.0]).reshape(1, 1, 1, 4)
    assert backbones._bytes(values).flatten().tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_runs_on_a_trunk_from_disk(net, tmp_path):
    installed("torchvision", "torchmetrics")
    models = importlib.import_module("torchvision.models")
    kind, file = (models.alexnet, ALEXNET) if net == "alex" else (models.vgg16, VGG16)
    torch.manual_seed(0)
    trunk = kind(weights=None)
    place = file.folder() / file.name
    place.parent.mkdir(parents=True)
    torch.save({f"features.{k}": v for k, v in trunk.features.state_dict().items()}, place)
    a, b = images(3), images(3, seed=1)
    found = lpips(a, b, net, batch_size=2)
    assert found.shape == (3,)
    assert (found > 0).all()
    torch.testing.assert_close(lpips(a, a, net), torch.zeros(3))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=rf"other\.pth is not {file.title}: it has no feat"):
        lpips(a, b, net, tmp_path / "other.pth")


def test_lpips_follows_the_trunk(tmp_path):
    installed("torchvision", "torchmetrics")
    module = importlib.import_module("torchmetrics.functional.image.lpips")
    trunk = importlib.import_module("torchvision.models").alexnet(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "alex.pth")
    theirs = module._NoTrainLpips(net="alex", pnet_rand=True)
    for layer in (0, 3, 6, 8, 10):
        slices = (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4)
        inside = next(s for s in (*slices, theirs.net.slice5) if str(layer) in s._modules)
        inside._modules[str(layer)] = trunk.features[layer]
    a, b = images(2), images(2, seed=1)
    expected = theirs(a, b).flatten().detach()
    torch.testing.assert_close(lpips(a, b, weights=tmp_path / "alex.pth"), expected)


@pytest.mark.slow
def test_inception_features_run_on_weights_from_disk(monkeypatch, tmp_path):
    installed("torch_fidelity")
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    kept: list[dict[str, Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_args, **_kwargs: kept[0])
        patch.setattr(
            module.FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, *_args: kept.append(nn.Module.state_dict(self)),
        )
        kept.insert(0, {})
        torch.manual_seed(0)
        module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(kept[1], tmp_path / "inception.pth")
    found = inception_features(images(3), tmp_path / "inception.pth", batch_size=2)
    assert found.pool.shape == (3, 2048)
    assert found.spatial.shape == (3, 7, 17, 17)
    assert found.probabilities.shape == (3, 1008)
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(3))
    alone = inception_features(images(3)[2:], tmp_path / "inception.pth")
    torch.testing.assert_close(alone.pool[0], found.pool[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.spatial[0], found.spatial[2], rtol=1e-4, atol=1e-5)
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "part.pth")
    with pytest.raises(EvaluationError, match=r"part\.pth is not FID's Inception network"):
        inception_features(images(1), tmp_path / "part.pth")


def save_clip(folder: Path, width: int) -> None:
    """A random CLIP model with a vocabulary of WORDS."""
    transformers = importlib.import_module("transformers")
    part = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={
            **part,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 6,
            "bos_token_id": 3,
            "eos_token_id": 4,
        },
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=width,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {word: k for k, word in enumerate(WORDS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_clip_and_aesthetic_scores_run_on_a_model_from_disk(tmp_path):
    installed("transformers")
    folder = tmp_path / "clip"
    save_clip(folder, 768)
    prompts = ["a cat", "a dog " * 20, "a"]
    scores = clip_score(images(3), prompts, folder, batch_size=2)
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 100)).all()
    model, _ = backbones._clip(folder)
    seen = backbones._clip_images(model, images(3), 50)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(3))
    head = nn.Linear(768, 1)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    expected = head(seen)[:, 0].detach()
    torch.testing.assert_close(aesthetic_score(images(3), folder, tmp_path / "head.pth"), expected)
    torch.save({"weight": head.weight.data}, tmp_path / "half.pth")
    with pytest.raises(EvaluationError, match=r"half\.pth is not LAION's aesthetic head"):
        aesthetic_score(images(1), folder, tmp_path / "half.pth")


def test_another_clip_is_refused_for_the_aesthetic_score(tmp_path):
    installed("transformers")
    save_clip(tmp_path / "small", 8)
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(EvaluationError, match=r"embeds images in 8 numbers; .* ViT-L/14"):
        aesthetic_score(images(1), tmp_path / "small", tmp_path / "head.pth")
