"""Calls survive the disk; what is no folder of calls is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fxquant.calibration import load_calls, save_calls
from fxquant.errors import LoaderError, SettingError
from tests import models


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert list(a) == list(b) or set(a) == set(b)
        for name, value in a.items():
            assert_equal(value, b[name])
    else:
        assert torch.equal(a, b)  # type: ignore[arg-type]
        assert a.dtype == b.dtype  # type: ignore[attr-defined]


def test_calls_come_back_as_they_were(tmp_path):
    calls = models.calls("sdxl", 12)
    save_calls(calls, tmp_path / "new" / "calls")
    found = load_calls(tmp_path / "new" / "calls")
    assert len(found) == 12
    for before, after in zip(calls, found, strict=True):
        assert_equal(before, after)


def test_none_numbers_and_views_are_taken(tmp_path):
    sample = torch.arange(6.0).reshape(2, 3).t()
    save_calls(
        [{"sample": sample, "timestep": 7, "class_labels": None, "return_dict": False}], tmp_path
    )
    (call,) = load_calls(tmp_path)
    assert set(call) == {"sample", "timestep", "class_labels"}
    assert call["class_labels"] is None
    assert torch.equal(call["sample"], sample)
    assert int(call["timestep"]) == 7


def test_nesting_and_constants_are_kept(tmp_path):
    x = torch.ones(2)
    given = {"x": x, "extra": {"list": [x], "tuple": (x, None), "scale": 0.5, "empty": []}}
    given |= {"dtype": torch.float16, "endless": float("inf"), "name": "a"}
    save_calls([given], tmp_path)
    (call,) = load_calls(tmp_path)
    extra = call["extra"]
    assert torch.equal(extra["list"][0], x)
    assert torch.equal(extra["tuple"][0], x)
    assert extra["tuple"][1] is None
    assert [extra["scale"], extra["empty"]] == [0.5, []]
    assert [call[name] for name in ("dtype", "endless", "name")] == [torch.float16, torch.inf, "a"]


def test_files_of_tensors_alone_nest_by_their_names(tmp_path):
    x = torch.ones(2)
    tensors = {"x": x, "extra.a": x * 1, "rest.1": x + 1, "rest.0": x + 0}
    save_file(tensors, tmp_path / "0.safetensors")
    (call,) = load_calls(tmp_path)
    assert set(call["extra"]) == {"a"}
    assert [float(t[0]) for t in call["rest"]] == [1.0, 2.0]


def test_a_folder_without_calls_is_refused(tmp_path):
    with pytest.raises(LoaderError, match=r"nowhere holds no \.safetensors file; .*save_calls"):
        load_calls(tmp_path / "nowhere")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "0000.safetensors").write_bytes(b"no")
    with pytest.raises(LoaderError, match=r"0000\.safetensors is damaged"):
        load_calls(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="file: no calls can be written"):
        save_calls([], tmp_path / "file")
