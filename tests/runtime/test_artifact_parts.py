"""The parts of a saved model by themselves: safetensors, sizes, documents, JSON fields."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import ArtifactError
from fxquant.graph.dump import dump
from fxquant.graph.nodes import attribute
from fxquant.runtime.document import from_document, to_bytes, to_document
from fxquant.runtime.fields import Field, parse
from fxquant.runtime.sizes import Symbols
from fxquant.runtime.tensors import MappedTensors, stream
from tests import toy

TENSORS = {
    "a.weight": torch.arange(-12, 12, dtype=torch.int8).view(2, 3, 4),
    "odd": torch.arange(7, dtype=torch.uint8),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(3).to(torch.bfloat16),
    "last": torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    "index": torch.tensor([1, -(2**62)]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(3, 0, 2),
    "yes": torch.tensor([True, False]),
    "turns": torch.tensor([1 + 2j, -0.5j]),
    "eighth": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "wide": torch.tensor([2**63], dtype=torch.uint64),
}


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(b"".join(stream(tensors)))
    return path


@contextmanager
def mapped(path: Path) -> Iterator[MappedTensors]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield MappedTensors(descriptor, path.stat().st_size, path.name)
    finally:
        os.close(descriptor)


def check_equal(found: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    check_equal(safetensors.torch.load_file(written(tmp_path / "x.safetensors", TENSORS)))


def test_we_read_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    contiguous = {name: value.contiguous() for name, value in TENSORS.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "x.safetensors")
    with mapped(tmp_path / "x.safetensors") as file:
        check_equal({name: file.copy(name) for name in file.entries})


def test_the_bytes_do_not_depend_on_the_order_of_the_tensors() -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert b"".join(stream(TENSORS)) == b"".join(stream(backwards))


def test_released_memory_reads_the_same_again(tmp_path: Path) -> None:
    tensors = {"big": torch.randint(-128, 128, (1 << 20,), dtype=torch.int8), **TENSORS}
    path = written(tmp_path / "x.safetensors", tensors)
    with mapped(path) as file:
        views = {name: file.view(name) for name in tensors}
    path.unlink()
    assert torch.equal(views["big"], tensors["big"])
    file.release(tensors)
    for name, value in tensors.items():
        assert torch.equal(views[name], value)


def test_views_share_the_file_and_copies_do_not(tmp_path: Path) -> None:
    with mapped(written(tmp_path / "x.safetensors", TENSORS)) as file:
        assert file.view("odd").data_ptr() == file.view("odd").data_ptr()
        assert file.copy("b").data_ptr() % 64 == 0
        file.copy("odd").zero_()
        assert torch.equal(file.view("odd"), TENSORS["odd"])


@pytest.mark.parametrize("recipe", ["w8a8-fast", "w4a8-fast"])
def test_a_graph_survives_as_a_document(recipe: str) -> None:
    story = toy.story(toy.Recipe.parse(recipe))
    lowered, bound = story["fuse_requantize"], story["select_kernels"]
    document = to_document(lowered, bound)
    data = to_bytes(document)
    assert json.loads(data) == document
    tensors = {name: attribute(lowered, name) for name in document["tensors"]}
    rebuilt = from_document(parse(data, "graph.json"), tensors)
    assert dump(rebuilt) == dump(lowered)
    # Reading asks more of the sizes than the document says; all else is said again.
    assert to_document(rebuilt, bound) | {"facts": document["facts"]} == document
    assert torch.equal(story.run(rebuilt), story.run(lowered))
    for old, new in zip(*(calls(gm) for gm in (lowered, rebuilt)), strict=True):
        assert old.name == new.name
        assert old.meta["custom"] == new.meta["custom"]


def calls(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def sizes(symbols: dict[str, Any], *shape: Any) -> list[Any]:
    known = Symbols(Field(symbols, "graph.json", "symbols"))
    return [known.size(Field(size, "graph.json", "shape")) for size in shape]


def test_sizes_are_symbolic_and_do_not_meet_by_chance() -> None:
    found = sizes({"B": [2, 15], "h": [2, None], "w": [2, None]}, "B", 4, "8*h", "2*w+1", "w-1")
    assert [isinstance(size, torch.SymInt) for size in found] == [True, False, True, True, True]
    assert found[1] == 4
    hints = [size.node.hint for size in sizes({"B": [2, 63], "h": [2, None], "L": [2, 9]}, *"BhL")]
    assert len(set(hints)) == 3


def test_sizes_are_any_function_of_symbols() -> None:
    symbols = {"h": [2, None, 6], "w": [2, 99, 9]}
    found = sizes(symbols, "h*w//4", "max(h,w)", "2*(h//3)+w%4")
    assert [size.node.hint for size in found] == [13, 9, 5]
    assert all(size.node.expr.free_symbols for size in found)


def test_facts_are_known_of_the_sizes() -> None:
    facts = Field(["h % 2 == 0", "h != w"], "graph.json", "facts")
    known = Symbols(Field({"h": [2, None, 6], "w": [2, None, 9]}, "graph.json", "symbols"), facts)
    size = known.size(Field("h", "graph.json", "shape"))
    learned = len(known.environment.guards)
    assert size % 2 == 0
    assert len(known.environment.guards) == learned  # nothing had to be asked


@pytest.mark.parametrize("fact", ["h % 2 == 1", "h", "3 == 3", "x == 2", "h // 0 == 1", 1, "h =="])
def test_other_facts_are_refused(fact: Any) -> None:
    with pytest.raises(ArtifactError, match=r"graph\.json: facts\[0\]"):
        Symbols(
            Field({"h": [2, None, 6]}, "graph.json", "symbols"),
            Field([fact], "graph.json", "facts"),
        )


@pytest.mark.parametrize(
    "size",
    [
        "",
        "b",
        "8h",
        "h == w",
        "8*h*B",
        "__import__('os')",
        "h - 999",
        "h // 0",
        "-1",
        "3",
        -1,
        2**31,
        1.0,
        None,
        "h" * 2000,
    ],
)
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ArtifactError, match=r"graph\.json: shape"):
        sizes({"h": [2, None], "w": [2, None]}, size)


@pytest.mark.parametrize(
    "symbols",
    [{"h": [5, 4]}, {"h": [2]}, {"h": [-1, 4]}, {"h": [0, 1]}, {"h": [2, 9, 1]},
     {"h": [2, 9, 10]}, {"h": [2, 2**40]}, {"__a": [2, 3]},
     {"h": "x"}, {"h": [2, 9, 3, 4]}, {f"s{k}": [2, None] for k in range(99)}],
)  # fmt: skip
def test_other_ranges_are_refused(symbols: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"graph\.json: symbols"):
        sizes(symbols)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"a": 1, "a": 2}', b"[NaN]", b"[-Infinity]", b"\xff", b"[" * 10**5,
     b"[" + b"9" * 5000 + b"]"],
)  # fmt: skip
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"file\.json: not readable"):
        parse(text, "file.json")


def test_example_values_are_fake() -> None:
    """Reading a graph allocates none of its tensors."""
    story = toy.story()
    bound = story["select_kernels"]
    document = to_document(story["fuse_requantize"], bound)
    tensors = {name: attribute(bound, name) for name in document["tensors"]}
    rebuilt = from_document(parse(to_bytes(document), "graph.json"), tensors)
    values = [n.meta["val"] for n in rebuilt.graph.nodes if n.op != "output"]
    assert all(isinstance(v, FakeTensor | torch.SymInt) for v in values)
