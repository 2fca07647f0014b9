"""The activation table: which row serves which timestep."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor

from fxquant.quant.observers import ObservedEdge
from fxquant.quant.spec import QuantSpec
from fxquant.quant.table import ActivationTable, contiguous_groups, nearest, settle

LOGGER = "fxquant.quant.table"


def values(groups: int, quantisers: int = 2) -> Tensor:
    return torch.arange(1.0, groups * quantisers * 2 + 1).view(groups, quantisers, 2)


def three() -> ActivationTable:
    """Timesteps 0, 100, ..., 500 in groups 0 0 1 1 2 2."""
    return ActivationTable(values(3), *contiguous_groups([500, 400, 300, 200, 100, 0], 3))


def group(table: ActivationTable, *timesteps: float) -> list[int]:
    return table.group(torch.tensor(timesteps)).tolist()


def test_one_row_serves_every_timestep_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        assert group(ActivationTable(values(1)), 0, 999, -5, 1e6) == [0, 0, 0, 0]
    assert not caplog.records


def test_calibrated_timesteps_have_the_row_of_their_group() -> None:
    assert group(three(), 0, 100, 200, 300, 400, 500) == [0, 0, 1, 1, 2, 2]


def test_between_two_the_nearest_decides() -> None:
    assert group(three(), 149, 151, 349.9, 350.1) == [0, 1, 1, 2]


def test_on_a_tie_the_lower_timestep_decides() -> None:
    assert group(three(), 150, 350) == [0, 1]


def test_outside_the_range_the_nearest_end_serves_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = three()
    with caplog.at_level(logging.WARNING, LOGGER):
        assert group(table, -20, 999) == [0, 2]
        assert group(table, 999) == [2]
    assert [r.getMessage()[:63] for r in caplog.records] == [
        "timestep outside the calibrated range [0, 500]; its nearest end"
    ]


def test_inside_the_range_there_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        group(three(), 0, 250, 500)
    assert not caplog.records


def test_groups_need_not_be_contiguous() -> None:
    table = ActivationTable(
        values(2), torch.tensor([0.0, 10.0, 20.0, 30.0]), torch.tensor([1, 0, 0, 1])
    )
    assert group(table, 0, 10, 20, 30, 26) == [1, 0, 0, 1, 1]


def test_a_sampler_may_repeat_a_timestep_and_go_in_any_order() -> None:
    table = three()
    descending, repeated = group(table, 500, 300, 100), group(table, 100, 300, 300, 500, 300)
    assert descending == [2, 1, 0]
    assert repeated == [0, 1, 1, 2, 1]


def test_other_step_counts_fall_on_the_same_groups() -> None:
    assert group(three(), *range(0, 501, 50)) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16])
def test_timesteps_may_have_any_dtype(dtype: torch.dtype) -> None:
    assert three().group(torch.tensor([0, 300, 500], dtype=dtype)).tolist() == [0, 1, 2]


def test_rows_give_every_sample_its_own() -> None:
    table = three()
    rows = table.rows(torch.tensor([500.0, 0.0, 210.0]))
    assert rows.shape == (3, 2, 2)
    assert torch.equal(rows, torch.stack([table.row(2), table.row(0), table.row(1)]))


def test_gradients_reach_the_rows_in_use_alone() -> None:
    table = three()
    table.values.requires_grad_()
    table.rows(torch.tensor([0.0, 0.0, 300.0])).sum().backward()
    assert table.values.grad.sum((1, 2)).tolist() == [8, 4, 0]


def test_a_deep_copy_is_equal_and_independent() -> None:
    table = three()
    twin = copy.deepcopy(table)
    assert all(torch.equal(a, b) for a, b in zip(table.buffers(), twin.buffers(), strict=True))
    twin.values.zero_()
    assert table.values.any()
    assert group(twin, 0, 300, 500) == [0, 1, 2]


def test_the_table_travels_in_a_state_dict() -> None:
    other = ActivationTable(torch.zeros(3, 2, 2), *contiguous_groups([0, 1, 2, 3, 4, 5], 3))
    other.load_state_dict(three().state_dict())
    assert group(other, 0, 300, 500) == [0, 1, 2]
    assert torch.equal(other.row(1), three().row(1))


@pytest.mark.parametrize(
    ("timesteps", "count", "expected"),
    [
        ([5, 3, 1], 1, [0, 0, 0]),
        ([5, 3, 1], 3, [0, 1, 2]),
        ([1, 2, 3, 4], 2, [0, 0, 1, 1]),
        ([1, 2, 3, 4, 5], 2, [0, 0, 0, 1, 1]),
        ([1, 1, 1, 2, 9, 9], 3, [0, 1, 2]),
        ([7, 8], 5, [0, 1]),
    ],
)
def test_distinct_timesteps_are_split_into_runs(
    timesteps: list[float], count: int, expected: list[int]
) -> None:
    distinct, groups = contiguous_groups(timesteps, count)
    assert distinct.tolist() == sorted(set(timesteps))
    assert groups.tolist() == expected


def test_runs_differ_in_length_by_one_at_most() -> None:
    for count in range(1, 11):
        lengths = contiguous_groups(range(10), count)[1].bincount().tolist()
        assert len(lengths) == count
        assert max(lengths) - min(lengths) <= 1


def test_nearest_with_a_single_entry() -> None:
    assert nearest(torch.tensor([5.0]), torch.tensor([-1.0, 5.0, 99.0])).tolist() == [0, 0, 0]


def edge(groups: int, *seen: tuple[int, float, float]) -> ObservedEdge:
    """An edge that saw [low, high] in some groups."""
    found = ObservedEdge(QuantSpec(), groups)
    for row, low, high in seen:
        found.rows[row].update(torch.tensor([low, high]), (low, high))
        found.seen[row] += 1
    return found


def test_settling_gives_a_column_per_edge_and_a_row_per_group() -> None:
    edges = [edge(2, (0, -1.0, 1.55), (1, 0.0, 5.1)), edge(2, (0, -2.55, 0.0), (1, -1.0, 1.55))]
    table = settle(edges, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    expected = torch.tensor([[[0.01, -28], [0.01, 127]], [[0.02, -128], [0.01, -28]]])
    torch.testing.assert_close(table.values, expected)


def test_a_group_that_an_edge_never_met_uses_the_nearest_that_it_did() -> None:
    edges = [edge(4, (0, 0.0, 2.55), (3, 0.0, 5.1))]
    table = settle(edges, torch.arange(4.0), torch.arange(4))
    assert table.values[:, 0, 0].tolist() == pytest.approx([0.01, 0.01, 0.02, 0.02])


def test_a_model_without_quantised_edges_has_an_empty_table() -> None:
    assert settle([], torch.arange(3.0), torch.tensor([0, 1, 1])).values.shape == (2, 0, 2)
