"""What is saved is what serves, or the refusal says why not."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import QuantizedModel
from fxquant.errors import ArtifactError
from tests.runtime import compiled as c


def doubled(model: QuantizedModel) -> None:
    """Edit the graph in place."""
    graph = model.graph.graph
    end = graph.output_node()
    with graph.inserting_before(end):
        end.args = (graph.call_function(torch.ops.aten.mul.Tensor, (end.args[0], 2)),)
    model.graph.recompile()


def replaced(model: QuantizedModel) -> None:
    """Put an edited copy in its place."""
    other = c.fresh(model)
    doubled(other)
    model.graph = other.graph


@pytest.mark.parametrize("edit", [doubled, replaced])
@pytest.mark.parametrize("load_first", [False, True])
def test_an_edited_graph_serves_and_is_not_saved_as_the_old_one(
    edit: object, load_first: bool, tmp_path: Path
) -> None:
    model, call = c.fresh(c.shared_mite()), c.mite_calls(1)[0]
    if load_first:
        model.save_pretrained(tmp_path / "saved")
        model = fxquant.load(tmp_path / "saved")
    before = c.result(model, call)
    assert callable(edit)
    edit(model)
    assert torch.equal(c.result(model, call), 2 * before)
    with pytest.raises(ArtifactError, match=r"model\.graph is another graph than"):
        model.save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


def test_changed_weights_are_saved(tmp_path: Path) -> None:
    model, call = copy.deepcopy(c.shared_mite()), c.mite_calls(1)[0]
    model.graph.load_state_dict({k: v.flip(0) for k, v in model.graph.state_dict().items()})
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(c.result(fxquant.load(tmp_path / "saved"), call), c.result(model, call))


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_working_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="name is empty"):
        c.shared_mite().save_pretrained(name)
    assert not list(tmp_path.iterdir())


def test_config_entries_that_json_cannot_hold_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = c.fresh(c.shared_mite())
    model.config = {"width": 16, "kind": torch.float16, "mask": {1, 2}, 3: 4, "_name_or_path": "x"}
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "saved")
    (said,) = [r.message for r in caplog.records]
    assert said.startswith("the config's 'kind' (dtype), 'mask' (set), 3 (int) cannot be saved")
    assert dict(fxquant.load(tmp_path / "saved").config) == {"width": 16}
