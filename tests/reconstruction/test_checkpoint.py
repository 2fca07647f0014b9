"""Checkpoints: what they refuse, and that a half-written one does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.errors import CheckpointError
from fxquant.reconstruction.checkpoint import Checkpoints, Trained, UnitReport, fingerprint

REPORT = UnitReport("mid.0", "ResnetBlock2D", 2.0, 1.0, 0.995, 200, 1.25)
TRAINED = Trained(
    {"mid.weight": torch.randn(3, 2), "table": torch.randn(4)}, torch.rand(1, 5, 2), REPORT
)


def test_a_unit_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "new" / "folder", {"seed": 1})
    assert kept.read(3, "mid.0") is None
    kept.write(3, TRAINED)
    found = Checkpoints(tmp_path / "new" / "folder", {"seed": 1}).read(3, "mid.0")
    assert found is not None
    assert found.report == REPORT
    assert torch.equal(found.table, TRAINED.table)
    assert found.tensors.keys() == TRAINED.tensors.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in TRAINED.tensors.items())
    assert not list(tmp_path.rglob("*.part"))


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"seed": 1, "recipe": {"iters": 5}})
    message = r"checkpoints of another run: recipe, seed differ\. .*another folder"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, {"seed": 2, "recipe": {"iters": 6}})


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_unit_is_named(tmp_path: Path, damage: bytes | None) -> None:
    kept = Checkpoints(tmp_path, {})
    kept.write(0, TRAINED)
    file = tmp_path / "unit_0000.safetensors"
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"unit_0000.*damaged.*delete it"):
        kept.read(0, "mid.0")


def test_a_unit_of_another_name_is_refused(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {})
    kept.write(0, TRAINED)
    with pytest.raises(CheckpointError, match=r"holds unit mid\.0, not mid\.1"):
        kept.read(0, "mid.1")


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_description_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Checkpoints(tmp_path, {})


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be kept there"):
        Checkpoints(tmp_path / "file" / "inside", {})


def test_what_a_killed_write_left_is_not_read(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {})
    (tmp_path / "unit_0000.safetensors.part").write_bytes(b"half")
    assert kept.read(0, "mid.0") is None
    kept.write(0, TRAINED)
    assert kept.read(0, "mid.0") is not None


def test_a_fingerprint_sees_values_shapes_and_types() -> None:
    base = torch.arange(4.0)
    others = [base + 1, base.view(2, 2), base.to(torch.bfloat16), base.flip(0)]
    assert fingerprint([base]) == fingerprint([base.clone()])
    assert len({fingerprint([t]) for t in (base, *others)}) == 5
