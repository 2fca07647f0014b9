"""The sizes a captured graph takes, and the refusal of others."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import CallError
from fxquant.graph.limits import Limit, check_limits, input_limits
from tests.toy import story


def test_channels_are_fixed_batch_free_and_size_free_in_steps():
    sample, timestep, text = input_limits(story()["capture"])
    assert sample == (Limit(None), Limit(4), Limit(None, 2), Limit(None, 2))
    assert timestep == (Limit(None),)
    assert text == (Limit(None), Limit(None), Limit(16))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 8, 8), "dimension 1 must be 4, as captured"),
        ((2, 4, 7, 8), "dimension 2 must be a positive multiple of 2"),
        ((0, 4, 8, 8), "dimension 0 must be a positive multiple of 1"),
    ],
)
def test_other_sizes_are_refused(shape, message):
    limits = input_limits(story()["capture"])[0]
    check_limits("sample", torch.zeros(3, 4, 6, 10), limits)
    with pytest.raises(CallError, match=message):
        check_limits("sample", torch.zeros(shape), limits)
