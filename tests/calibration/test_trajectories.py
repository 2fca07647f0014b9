"""Samples kept from trajectories, against trajectories recorded whole."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from fxquant import assets
from fxquant.calibration import (
    SelectedCalls,
    denoise,
    load_calls,
    record,
    record_selected,
)
from fxquant.calibration.calls import read_calls
from fxquant.calibration.samplers import tdac_counts, tdac_scores

# diffusers hands tensors to numpy in a way that numpy 2 warns about
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {
    "ddim": DDIMScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
    "dpm": DPMSolverMultistepScheduler(),
    "euler": EulerDiscreteScheduler(),
}
CONDITIONS = {"class": "class_labels", "text": "encoder_hidden_states"}
IMAGES, STEPS = 4, 4
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="module")
def unets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    by_class = UNet2DModel(**SMALL, **plain, num_class_embeds=11)
    by_text = UNet2DConditionModel(**SMALL, **plain, cross_attention_dim=8)
    return {"class": by_class.eval(), "text": by_text.eval()}


def condition(kind: str, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "class":
        return torch.randint(0, 10, (count,), generator=generator)
    return torch.randn(count, 5, 8, generator=generator)


def empty_condition(kind: str, count: int) -> Tensor:
    return torch.full((count,), 10) if kind == "class" else torch.zeros(count, 5, 8)


def sampling(
    model: Any,
    kind: str,
    number: int,
    *,
    scheduler: Any = SCHEDULERS["ddim"],
    guided: bool = False,
    images: int = IMAGES,
    steps: int = STEPS,
) -> Callable[[], Tensor]:
    """A run that samples one batch, the same one at every call."""
    config = model.config
    shape = (images, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    name = CONDITIONS[kind]
    return lambda: denoise(
        model,
        scheduler,
        noise,
        steps=steps,
        conditions={name: condition(kind, images, number)},
        unconditional={name: empty_condition(kind, images)} if guided else None,
        guidance_scale=3.0,
    )


def rows_of(call: Any) -> list[tuple[Any, ...]]:
    """Every row of a call as plain values, the timestep too."""
    sample = call["sample"]
    times = call["timestep"].expand(len(sample)).tolist()
    others = [call[n] for n in CONDITIONS.values() if n in call]
    return [
        (float(t), *(x[k].numpy().tobytes() for x in (sample, *others)))
        for k, t in enumerate(times)
    ]


def middle_maps(model: Any, run: Callable[[], object]) -> dict[float, Tensor]:
    """What enters the middle attention, by timestep, the last call's."""
    seen: list[Tensor] = []
    hook = model.mid_block.attentions[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    calls = record(model, run)
    hook.remove()
    return {float(c["timestep"]): x for c, x in zip(calls, seen, strict=True)}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", list(CONDITIONS))
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_each_trajectory_gives_one_of_its_own_calls(unets, scheduler, kind, guided):
    model = unets[kind]
    runs = [
        sampling(
            model, kind, number, scheduler=SCHEDULERS[scheduler], guided=guided, images=2 * IMAGES
        )
        for number in range(2)
    ]
    found = record_selected(model, runs, count=16, guided=guided)
    assert isinstance(found, SelectedCalls)
    assert found.selection.sampler == "tdac"

    whole = [record(model, run) for run in runs]
    owner, partner = {}, {}
    for number, calls in enumerate(whole):
        for call in calls:
            rows = rows_of(call)
            half = len(rows) // 2
            for k, row in enumerate(rows):
                owner[row] = (number, k % half if guided else k)
                if guided and k < half:
                    partner[row] = rows[k + half]
    kept = [row for call in found for row in rows_of(call)]
    copies = 2 if guided else 1
    assert Counter(owner[row] for row in kept) == {
        (n, k): copies for n in range(2) for k in range(2 * IMAGES)
    }
    times = Counter(row[0] for row in kept)
    assert [times[t] for t in found.selection.timesteps] == [
        copies * n for n in found.selection.counts.tolist()
    ]
    if guided:
        for call in found:
            rows = rows_of(call)
            half = len(rows) // 2
            assert [partner[row] for row in rows[:half]] == rows[half:]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_tdac_sees_what_enters_the_middle_attention(unets, scheduler, guided):
    model = unets["text"]
    run = sampling(
        model, "text", 0, scheduler=SCHEDULERS[scheduler], guided=guided, images=8, steps=6
    )
    maps = middle_maps(model, run)
    density, variety = tdac_scores(list(maps.values()))
    selection = record_selected(model, [run], count=40, guided=guided, variety_weight=0.5).selection
    assert selection.timesteps == tuple(maps)
    assert torch.equal(selection.density, density)
    assert torch.equal(selection.variety, variety)
    counts = tdac_counts(density.tolist(), variety.tolist(), 0.5, 40)
    assert torch.equal(selection.counts, counts)


def test_the_last_of_two_calls_at_one_timestep_counts(unets):
    model = unets["class"]
    run = sampling(model, "class", 0, scheduler=SCHEDULERS["pndm"], images=8)
    calls = record(model, run)
    times = [float(c["timestep"]) for c in calls]
    double = next(t for t in times if times.count(t) == 2)
    earlier, later = (c for c in calls if float(c["timestep"]) == double)
    assert not torch.equal(earlier["sample"], later["sample"])
    found = record_selected(model, [run], count=8 * STEPS, sampler="uniform")
    kept = [row for call in found for row in rows_of(call) if row[0] == double]
    assert sorted(kept) == sorted(rows_of(later))


def test_more_samples_than_trajectories_are_spread_evenly(unets):
    model = unets["class"]
    run = sampling(model, "class", 0, images=5)
    found = record_selected(model, [run], count=20, sampler="uniform")
    rows = [row for call in found for row in rows_of(call)]
    assert len(set(rows)) == len(rows) == 20
    assert set(rows) == {row for call in record(model, run) for row in rows_of(call)}


def test_runs_may_differ_in_size(unets):
    model = unets["class"]
    runs = [sampling(model, "class", n, images=images) for n, images in enumerate((8, 3, 6))]
    found = record_selected(model, runs, count=12)
    assert sum(len(call["sample"]) for call in found) == 12


def test_calls_have_at_most_32_rows(unets):
    model = unets["class"]
    for guided in (False, True):
        run = sampling(model, "class", 0, images=8, steps=5, guided=guided)
        found = record_selected(model, [run], count=40, sampler="random", guided=guided)
        sizes = [32, 8] if not guided else [32, 32, 16]
        assert [len(call["sample"]) for call in found] == sizes
        assert all(call["timestep"].shape == call["sample"].shape[:1] for call in found)


def test_the_seed_decides_noise_and_choice(unets):
    model = unets["class"]

    def run() -> Tensor:
        noise = torch.randn(8, 3, 8, 8)
        labels = {"class_labels": torch.arange(8)}
        return denoise(model, SCHEDULERS["ddim"], noise, steps=3, conditions=labels)

    state = torch.get_rng_state()
    first, again, other = (
        [
            row
            for call in record_selected(model, [run, run], count=12, seed=s)
            for row in rows_of(call)
        ]
        for s in (0, 0, 1)
    )
    assert first == again
    assert not set(first) & set(other)
    assert len({row[1] for row in first}) == 12  # the two runs draw different noise
    assert torch.equal(torch.get_rng_state(), state)


def test_spilled_is_bitwise_what_stays_in_memory(unets, tmp_path):
    model = unets["text"]
    runs = [sampling(model, "text", n, images=8, guided=True) for n in range(3)]
    options: dict[str, Any] = {"count": 24, "guided": True}
    held = record_selected(model, runs, **options)
    spilled = record_selected(model, runs, **options, byte_budget=5000, folder=tmp_path / "calls")
    assert held.folder is None
    assert spilled.folder == tmp_path / "calls"
    assert torch.equal(held.selection.variety, spilled.selection.variety)
    stored = load_calls(tmp_path / "calls")
    assert len(held) == len(spilled) == len(stored) == 3
    for calls in zip(held, spilled, stored, strict=True):
        for name, tensor in calls[0].items():
            assert all(torch.equal(tensor, call[name]) for call in calls)
            assert all(tensor.dtype == call[name].dtype for call in calls)


def test_a_temporary_folder_goes_with_the_calls(unets):
    model = unets["class"]
    found = record_selected(model, [sampling(model, "class", 0)], count=4, byte_budget=0)
    folder = found.folder
    assert folder is not None
    assert any(folder.iterdir())
    assert [len(call["sample"]) for call in found[:1]] == [len(found[-1]["sample"])] == [4]
    del found
    assert not folder.exists()


def test_they_are_a_calibration_loader(unets):
    model = unets["text"]
    run = sampling(model, "text", 0, images=8, guided=True)
    found = record_selected(model, [run], count=24, guided=True)
    signature, calls = read_calls(found, model)
    assert signature.names == ("sample", "timestep", "encoder_hidden_states")
    assert sum(len(call[0]) for call in calls) == 48


def test_the_digits_model_can_be_followed():
    unet, scheduler = assets.load_digits_unet(), assets.load_digits_scheduler()
    noise = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.arange(10)}
    found = record_selected(
        unet, [lambda: denoise(unet, scheduler, noise, steps=5, conditions=labels)], count=10
    )
    assert found.selection.sampler == "tdac"
    assert sorted(int(n) for call in found for n in call["class_labels"]) == list(range(10))


def test_a_transformer_is_followed_through_its_middle_block():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ).eval()
    latents, maps = torch.randn(8, 4, 8, 8), list[Tensor]()

    def run() -> None:
        with torch.no_grad():
            for t in (900, 500, 100):
                model(latents * t / 1000, torch.full((8,), t), class_labels=torch.arange(8))

    hook = model.transformer_blocks[2].register_forward_hook(
        lambda _, __, output: maps.append(output.transpose(1, 2))
    )
    found = record_selected(model, [run], count=8)
    hook.remove()
    assert found.selection.sampler == "tdac"
    assert torch.equal(found.selection.variety, tdac_scores(maps[:3])[1])
    assert {"hidden_states", "timestep", "class_labels"} == set(found[0])


def test_inference_mode_leaves_no_trace(unets):
    model = unets["class"]
    run = sampling(model, "class", 0, images=8)

    def frozen() -> None:
        with torch.inference_mode():
            run()

    found = record_selected(model, [frozen], count=8, byte_budget=100)
    assert found.selection.sampler == "tdac"
    held = record_selected(model, [frozen], count=8)
    assert not any(tensor.is_inference() for call in held for tensor in call.values())


def test_few_trajectories_are_taken_uniformly(unets, caplog):
    model = unets["class"]
    run = sampling(model, "class", 0, images=7)
    with caplog.at_level(logging.WARNING, "fxquant"):
        selection = record_selected(model, [run], count=8).selection
    assert selection.sampler == "uniform"
    assert selection.reason == "7 samples a timestep are fewer than the 8 it needs"
    assert selection.counts.tolist() == [2] * STEPS
    assert "TDAC needs paired samples: 7 samples" in caplog.text
