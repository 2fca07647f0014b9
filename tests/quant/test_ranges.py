"""What observers saw and the user should know."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CallError, CaptureError, RecipeError
from fxquant.quant.observers import OBSERVERS, ObservedEdge
from fxquant.quant.ranges import FACTOR, judge
from fxquant.quant.spec import QuantSpec
from fxquant.quant.table import settle
from fxquant.runtime.model import QuantizedModel
from tests.runtime import compiled as c
from tests.toy import relative_error

NAN, INF = float("nan"), float("inf")
NONE = torch.zeros(2, dtype=torch.int64)


def edge_of(*batches: Tensor, observer: str = "minmax") -> ObservedEdge:
    edge = ObservedEdge(QuantSpec(observer=observer), 1)
    for batch in batches:
        edge(batch, torch.zeros(len(batch), dtype=torch.int64))
    return edge


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_values_that_are_not_finite_do_not_decide_a_range(observer: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 8, 32, generator=generator)
    dirty = batch.clone()
    dirty[2, 3] = bad
    finite = dirty[torch.isfinite(dirty)].reshape(1, -1)
    edge = edge_of(dirty, batch, observer=observer)
    assert edge.rows[0].range() == pytest.approx(
        edge_of(finite, batch, observer=observer).rows[0].range(), rel=1e-5
    )
    assert (edge.dropped, edge.values) == (32, 2 * batch.numel())


def test_they_are_reported_by_layer() -> None:
    one, other = edge_of(torch.tensor([[1.0, NAN]])), edge_of(torch.tensor([[INF, NAN, 3.0]]))
    (said,) = judge({"one": one, "clean": edge_of(torch.ones(1, 2)), "other": other}, [], [])
    assert said.startswith("NaN or infinity in calibration: other (2 of 3), one (1 of 2).")


def test_an_edge_that_never_was_finite_is_refused_by_name() -> None:
    edge = edge_of(torch.full((2, 3), NAN))
    with pytest.raises(CallError, match="the input of conv held no finite number"):
        judge({"the input of conv": edge, "fine": edge_of(torch.ones(1, 1))}, [], [])


def test_a_row_without_finite_values_takes_the_nearest() -> None:
    edge = ObservedEdge(QuantSpec(), 2)
    edge(torch.tensor([[NAN, NAN], [-1.0, 1.0]]), torch.tensor([0, 1]))
    assert edge.seen == [0, 1]
    table = settle([edge], torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    assert torch.equal(table.values[0], table.values[1])


def test_constant_zero_is_fine() -> None:
    edge = edge_of(torch.zeros(2, 3), torch.zeros(2, 3))
    assert judge({"zero": edge}, [0.0, 0.0, 5.0, 5.0], [0] * 4) == ()
    assert torch.equal(settle([edge]).values[0, 0], torch.tensor([1.0, -128.0]))


def grown(factor: float, count: int = 16) -> ObservedEdge:
    """A value that grows with the timestep, from 1 to this."""
    return edge_of(*(torch.tensor([[-w, w]]) for w in torch.linspace(1, factor, count).tolist()))


def test_a_range_for_timesteps_that_differ_is_named_with_a_remedy() -> None:
    times = [float(t) for t in range(16)]
    edges = {"wide": grown(99), "wider": grown(150), "narrow": grown(8)}
    (said,) = judge(edges, times, [0] * 16)
    assert "at wider (150x), wide (99x)," in said
    assert "narrow" not in said
    assert "timestep_groups=8" in said
    assert judge({"edge": grown(FACTOR)}, times, [0] * 16) == ()


def test_samples_of_one_timestep_may_differ() -> None:
    """Prompts that are zero, or short, are no matter of timesteps."""
    edge = edge_of(torch.tensor([[-1.0, 1.0], [-1e-3, 0.0]]), torch.tensor([[-1.0, 1.0], [0, 0]]))
    assert judge({"edge": edge}, [3.0, 3.0, 7.0, 7.0], [0] * 4) == ()


class Growing(nn.Module):
    """The sample's size is its timestep's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(sample)))


def growing(count: int = 16) -> list[c.Call]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "sample": torch.randn(2, 4, 8, 8, generator=generator) * (1 + t / 10),
            "timestep": torch.full((2,), float(t)),
        }
        for t in torch.linspace(0, 980, count).tolist()
    ]


def test_the_remedy_works_as_said(caplog: pytest.LogCaptureFixture) -> None:
    model, calls = Growing().eval(), growing()
    recipe = c.float32(keep_float=())

    def worst(quantised: QuantizedModel) -> float:
        return relative_error(quantised(**calls[0]), model(**calls[0]).detach())

    with caplog.at_level(logging.WARNING):
        one = c.compiled(model, calls, recipe)
    (said,) = [r.message for r in caplog.records if "values differ widely" in r.message]
    assert f"ranges: {said}" in str(one.summary)
    assert "the input %sample of first" in said
    groups = int(said.split("timestep_groups=")[1].split(")")[0])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        several = c.compiled(model, calls, recipe.with_(timestep_groups=groups))
    assert not caplog.records
    assert several.summary.ranges == ()
    assert worst(one) > 0.3
    assert worst(several) < 0.2


def test_ordinary_models_stay_silent() -> None:
    for model in (c.toy(), c.unconditional()[1], c.text_conditional()[1], c.shared_mite()):
        assert model.summary.ranges == ()


def test_more_groups_than_timesteps_are_refused() -> None:
    with pytest.raises(RecipeError, match="timestep_groups=5, but the calls have 4 distinct"):
        c.compile_mite(c.float32(timestep_groups=5))


class Attending(nn.Module):
    """Attention whose first rows are masked wholly, and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        mask = torch.zeros(16, 16)
        mask[:4] = -INF
        self.register_buffer("mask", mask)

    def forward(self, sample: Tensor) -> Tensor:
        q = self.inside(sample)
        y = self.out((q @ q.transpose(1, 2) + self.mask).softmax(-1) @ q)
        return torch.cat([sample[:, :4], y[:, 4:]], 1)


def test_padded_rows_that_are_thrown_away_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, calls = Attending().eval(), [{"sample": torch.randn(2, 16, 8)} for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        quantised = c.compiled(model, calls, c.float32(keep_float=()))
    assert "NaN or infinity in calibration" in caplog.text
    assert " of out (192 of 768)" in caplog.text
    assert relative_error(quantised(**calls[0]), model(**calls[0]).detach()) < 0.04


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["conv.weight", "conv_out.bias", "norm.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(name: str, bad: float) -> None:
    model = c.mite()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = bad
    with pytest.raises(CaptureError, match=f"in the weights {name}"):
        c.compile_mite(model=model)


class Masked(nn.Module):
    """An additive mask that is never quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, sample: Tensor, mask: Tensor) -> Tensor:
        q = self.inside(sample)
        return (q @ q.transpose(1, 2) + mask).softmax(-1) @ sample


def masked() -> c.Call:
    mask = torch.zeros(2, 1, 16)
    mask[:, :, 9:] = -INF
    return {"sample": torch.randn(2, 16, 8), "mask": mask}


def test_masks_may_hold_infinity_and_nothing_holds_nan() -> None:
    torch.manual_seed(0)
    model, calls = Masked().eval(), [masked() for _ in range(3)]
    quantised = c.compiled(model, calls, c.float32(keep_float=()))
    assert relative_error(quantised(**calls[0]), model(**calls[0]).detach()) < 0.04
    for name, bad in (("sample", INF), ("sample", NAN), ("mask", NAN)):
        call = masked()
        call[name][0, 0, 0] = bad
        with pytest.raises(CallError, match=f"call 1: {name} holds NaN or infinity"):
            c.compiled(model, [calls[0], call], c.float32(keep_float=()))


def test_inputs_are_checked_on_request() -> None:
    model, call = c.fresh(c.shared_mite()), c.mite_calls(1)[0]
    assert not model.check_inputs
    call["sample"][0, 0] = NAN
    model.check_inputs = True
    with pytest.raises(CallError, match="sample holds NaN"):
        c.result(model, call)
    assert torch.isfinite(c.result(model, c.mite_calls(1)[0])).all()


class Together(nn.Module):
    """Quantised values that no sample has: learned tokens, and means over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(7, 16))
        self.even = nn.Parameter(torch.randn(8, 16))
        self.many = nn.Parameter(torch.randn(9000, 16))
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(16, 16) for _ in range(6))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        some = self.a(self.tokens * (1 + 0 * timestep.mean())).mean(0)
        even = self.b(self.even * (1 + timestep.mean() / 1000)).mean(0)
        mean = self.c(sample.mean((0, 1))) + self.d(sample.mean((0, 1))[None])[0]
        return self.e(sample) + some + even + mean + self.f(self.many).mean(0)


def together(batch: int) -> list[c.Call]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "sample": torch.randn(batch, 3, 16, generator=generator),
            "timestep": torch.full((batch,), t),
        }
        for t in (0.0, 300.0, 600.0, 900.0)
    ]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_values_without_a_sample_are_quantised(batch: int, groups: int) -> None:
    torch.manual_seed(0)
    model, calls = Together().eval(), together(batch)
    quantised = c.compiled(model, calls, c.float32(keep_float=(), timestep_groups=groups))
    assert quantised.summary.precision == {"w8a8": 5}, "f's result is a constant"
    for call in calls:
        assert relative_error(quantised(**call), model(**call).detach()) < 0.04


@pytest.mark.parametrize("loss", ["fbr", "layer"])
def test_and_reconstructed(loss: str) -> None:
    torch.manual_seed(0)
    model, calls = Together().eval(), together(4)
    settings = {"iters": 3, "batch": 6, "loss": loss, "sampler": "uniform"}
    recipe = c.float32("w4a8", keep_float=(), timestep_groups=2, reconstruction=settings)
    quantised = c.compiled(model, calls, recipe)
    assert quantised.summary.units
    for call in calls:
        assert relative_error(quantised(**call), model(**call).detach()) < 0.2


def test_values_without_a_sample_count_for_every_row_of_the_call() -> None:
    for has_samples, x in (
        (True, torch.tensor([1.0, 2.0, 9.0])),
        (False, torch.tensor([9.0, 1.0])),
    ):
        edge = ObservedEdge(QuantSpec(), 3, has_samples)
        edge(x, torch.tensor([0, 2]))
        assert edge.seen == [1, 0, 1]
        assert edge.rows[0].range() == edge.rows[2].range() == (1.0, 9.0)
        assert edge.widths == [9.0, 9.0]


def test_parts_of_a_sample_count_in_either_order() -> None:
    """[B * frames] and [frames * B] have one shape."""
    edge = ObservedEdge(QuantSpec(), 2)
    edge(torch.tensor([1.0, 2.0, 30.0, 40.0, 5.0, 6.0]), torch.tensor([0, 1]))
    assert edge.rows[0].range() == (1.0, 30.0)  # 1, 2, 30 side by side; 1, 30, 5 in turns
    assert edge.rows[1].range() == (2.0, 40.0)
