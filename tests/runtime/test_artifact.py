"""save_pretrained and load: the same model, bit for bit, wherever it is bound again."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import fxquant
from fxquant import QuantizedModel, Recipe
from fxquant.errors import ArtifactError, BackendError
from fxquant.graph.dump import dump
from tests import models
from tests.runtime import compiled as c
from tests.runtime import saved
from tests.runtime.damage import forged
from tests.toy import relative_error

RECIPES = ("w8a8-fast", "w4a8-fast")
DTYPES = ("float32", "bfloat16")
CALL = c.mixed_call(5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensors_results_and_graph_survive(recipe: str, dtype: str, tmp_path: Path) -> None:
    model = saved.toy(recipe, dtype)
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert model.table.values.shape[0] == 3
    saved.check_same_tensors(model, loaded)
    saved.check_same_results(model, loaded, CALL)
    assert dump(model.graph) == dump(loaded.graph)
    assert loaded.recipe == model.recipe
    assert loaded.signature == model.signature
    assert loaded.origin == model.origin
    apart = {"seconds": 0, "error": 0}  # of the compilation, which is not repeated
    assert loaded.summary.to_json() | apart == model.summary.to_json() | apart


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_saving_is_deterministic_and_repeatable(recipe: str, dtype: str, tmp_path: Path) -> None:
    model = saved.toy(recipe, dtype)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    fxquant.load(tmp_path / "first").save_pretrained(tmp_path / "loaded")
    slow = fxquant.load(tmp_path / "first", backend="reference")
    slow.save_pretrained(tmp_path / "reference")
    expected = saved.files(tmp_path / "first")
    assert len(expected) == 3
    for name in ("second", "loaded", "reference"):
        assert saved.files(tmp_path / name) == expected


def test_it_may_be_bound_for_another_backend(tmp_path: Path) -> None:
    model = saved.toy()
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path, backend="reference")
    assert all(kernel.endswith(" reference") for kernel in loaded.summary.kernels)
    direct = c.compiled(
        c.float_toy(), models.calls("toy", 6, batch=2), model.recipe, backend="reference"
    )
    saved.check_same_results(direct, loaded, CALL)


@pytest.mark.parametrize(("first", "second"), [DTYPES, DTYPES[::-1]])
def test_float_parts_are_cast_when_bound(first: str, second: str, tmp_path: Path) -> None:
    """The file holds what ran where it was saved; another machine computes in its own dtype."""
    model = saved.toy("w8a8-fast", first)
    model.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "fxquant.json").read_text())
    (tmp_path / "fxquant.json").unlink()
    manifest["recipe"]["compute_dtype"] = second
    (tmp_path / "fxquant.json").write_text(forged(manifest))
    loaded = fxquant.load(tmp_path)
    kinds = {t.dtype for n, t in loaded.graph.state_dict().items() if n.startswith("conv_in")}
    assert kinds == {getattr(torch, second)}
    assert relative_error(c.result(loaded, CALL), c.result(model, CALL)) < 0.05


def test_int4_weights_are_stored_two_to_a_byte(tmp_path: Path) -> None:
    sizes = []
    for recipe in RECIPES:
        saved.toy(recipe).save_pretrained(tmp_path / recipe)
        loaded = fxquant.load(tmp_path / recipe)
        integers = [t for t in loaded.buffers() if t.dtype in (torch.int8, torch.uint8)]
        sizes.append(sum(t.numel() for t in integers))
    assert sizes[1] == sizes[0] / 2


def test_a_diffusers_model_comes_back_as_itself(tmp_path: Path) -> None:
    original, model = c.unconditional()
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert type(loaded) is type(model)
    assert inspect.signature(loaded.forward) == inspect.signature(original.forward)
    assert loaded.config.sample_size == original.config.sample_size
    assert list(loaded.config.block_out_channels) == list(original.config.block_out_channels)
    images = [
        DDIMPipeline(unet=unet, scheduler=DDIMScheduler())(
            batch_size=2,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="np",
        ).images
        for unet in (model, loaded)
    ]
    assert (images[0] == images[1]).all()


def test_another_class_comes_back_as_a_quantized_model(tmp_path: Path) -> None:
    model = saved.toy()
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert type(loaded) is QuantizedModel
    assert loaded.config.cross_attention_dim == 16
    assert torch.equal(loaded(**CALL).sample, model(**CALL).sample)


def test_a_loaded_model_copies_and_outlives_its_files(tmp_path: Path) -> None:
    model = saved.toy()
    model.save_pretrained(tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", backend="reference")  # reads weights at every call
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    twin = copy.deepcopy(loaded)
    twin.save_pretrained(tmp_path / "again")
    again = fxquant.load(tmp_path / "again")
    saved.check_same_tensors(model, again)
    saved.check_same_results(loaded, twin, CALL)
    saved.check_same_results(model, again, CALL)


def test_integer_weights_stay_in_the_file(tmp_path: Path) -> None:
    """The canonical weight is given back once it is packed, and reads the same afterwards."""
    model = c.unconditional()[1]
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    name = next(n for n, t in loaded.named_buffers() if t.dtype == torch.int8)
    weight = loaded.get_buffer(name)
    assert torch.equal(weight, model.get_buffer(name))
    assert weight._version == 0  # kernels count on it to see changes
    with torch.inference_mode():
        other = fxquant.load(tmp_path)
    assert not any(t.is_inference() for t in other.buffers())


def test_what_it_was_calibrated_with_is_on_record(tmp_path: Path) -> None:
    saved.mite().save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert loaded.origin is not None
    assert loaded.origin.calls == 4
    assert loaded.origin.timesteps == (0.0, 333.0, 666.0, 999.0)


def test_the_files_hold_no_clock_path_or_machine(tmp_path: Path) -> None:
    saved.mite().save_pretrained(tmp_path)
    text = b"".join(saved.files(tmp_path).values())
    for word in (str(tmp_path).encode(), b"/work", b"seconds", b"onednn", b"fused", b"avx"):
        assert word not in text


def test_another_process_loads_it(tmp_path: Path) -> None:
    model = saved.toy()
    model.save_pretrained(tmp_path / "model")
    torch.save({"call": CALL, "result": c.result(model, CALL)}, tmp_path / "truth.pt")
    script = (
        "import sys, torch, fxquant\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "truth = torch.load(sys.argv[1] + '/truth.pt')\n"
        "model = fxquant.load(sys.argv[1] + '/model')\n"
        "result = model(**truth['call'], return_dict=False)[0]\n"
        "sys.exit(0 if torch.equal(result, truth['result']) else 3)\n"
    )
    threads = str(torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), threads], check=False)
    assert done.returncode == 0


@torch.library.custom_op("fxquant_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    """An operator that no other installation has."""
    return x / 2


@halved.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Foreign(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return halved(self.conv_out(self.conv(sample) + timestep[:, None, None, None]))


def test_a_model_without_a_saved_form_says_so_when_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = c.compiled(Foreign().eval(), c.mite_calls(), c.float32())
    assert torch.isfinite(model(**c.mite_calls()[0])).all()
    assert "halved" in model.summary.unsaved
    assert f"cannot be saved: {model.summary.unsaved}" in str(model.summary)
    assert f"save_pretrained will refuse it: {model.summary.unsaved}" in caplog.text
    with pytest.raises(ArtifactError, match="halved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_was_edited_is_not_saved_as_it_was(tmp_path: Path) -> None:
    model = c.fresh(saved.mite())
    model.save_pretrained(tmp_path / "before")
    conv = next(n for n in model.graph.graph.nodes if n.target is torch.ops.fxquant.conv2d.default)
    conv.args = (*conv.args[:-1], "reference")
    model.graph.recompile()
    with pytest.raises(ArtifactError, match=r"model\.graph is another graph than"):
        model.save_pretrained(tmp_path / "after")
    loaded = fxquant.load(tmp_path / "before")
    loaded.graph = model.graph
    with pytest.raises(ArtifactError, match=r"model\.graph is another graph than"):
        loaded.save_pretrained(tmp_path / "after")


class Grouped(torch.nn.Module):
    """Layers that stay float unasked: a grouped convolution, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.grouped = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.weight = torch.nn.Parameter(torch.randn(4, 16, 1, 1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        weight = self.weight * timestep.mean().cos()
        return torch.nn.functional.conv2d(self.grouped(self.conv(sample)), weight)


def test_layers_that_stayed_float_unasked_survive(tmp_path: Path) -> None:
    model = c.compiled(Grouped().eval(), c.mite_calls(), c.float32())
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert len(model.summary.fallbacks) > 0
    assert loaded.summary.fallbacks == model.summary.fallbacks
    call = torch.randn(3, 4, 12, 12), torch.tensor(7.0)  # one for all, whose mean it takes
    assert torch.equal(loaded(*call), model(*call))


def test_an_unknown_backend_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="tpu"):
        fxquant.load(tmp_path, backend="tpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"split_shortcut": True},
        {"activation_symmetric": True, "keep_float": ("conv_in",)},
        {"activation_bits": 12},
    ],
    ids=str,
)
def test_other_recipes_survive_as_well(changes: dict[str, object], tmp_path: Path) -> None:
    recipe = Recipe.parse("w8a8-fast").with_(**changes)
    model = c.compiled(c.float_toy(), models.calls("toy", 3), recipe)
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    saved.check_same_tensors(model, loaded)
    saved.check_same_results(model, loaded, CALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in models.NAMES if n != "toy"])
def test_every_architecture_survives(name: str, tmp_path: Path) -> None:
    model = c.compiled(models.build(name), models.calls(name, 2))
    model.save_pretrained(tmp_path / "first")
    loaded = fxquant.load(tmp_path / "first")
    saved.check_same_tensors(model, loaded)
    for call in models.calls(name, 2, batch=3, seed=7):
        saved.check_same_results(model, loaded, call)
    loaded.save_pretrained(tmp_path / "again")
    assert saved.files(tmp_path / "again") == saved.files(tmp_path / "first")
