"""Ways to damage a saved model: files cut, flipped and swapped; forgeries whose checksums fit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 8, 9, 16, 17, 63, 255, 2**31 - 1, 2**31, 2**40, 2**62,
    2**63, -(2**63), 10**30, 0.0, -1.0, 0.5, 1e-30, 1e300, 1e308, "", "x", "B", "8*B", "B+1",
    "999999999*B", "../x", "/etc/passwd", "..", "a.b.c", "__class__", "graph", "forward", "none",
    "silu", "gelu", "onednn", "fused", "int8", "uint8", "float32", "bfloat16", "float64", "bool",
    "\x00", "é" * 9, "x" * 5000, "os.system('touch pwned')", "');import os;os.abort()#", [], {},
    [[]], [0], [1, 1], [-1, -1], [2**31] * 4, [2**62, 2], [0, 0, 0, 0], [1] * 5000,
    {"node": "sample"}, {"node": "row"}, {"node": "../x"}, {"tensor": "../x"},
    {"tensor": "conv.weight"}, {"tensor": "conv_in.weight"}, {"dtype": "int8"},
    {"dtype": "object"}, {"device": "cuda:7"}, {"float": "nan"}, {"float": "inf"},
    {"layout": "channels_last"}, {"a": 1, "b": 2}, {"node": "conv", "tensor": "x"},
)  # fmt: skip
OPERATORS = (
    "aten.ones.default", "aten.full.default", "aten.arange.default", "aten.repeat.default",
    "aten.expand.default", "aten.view.default", "aten.reshape.default", "aten.pad.default",
    "aten.empty.memory_format", "aten.set_.source_Tensor", "aten.add_.Tensor", "aten.rand.default",
    "aten.from_file.default", "operator.mul", "operator.getitem", "operator.pow", "os.system",
    "builtins.eval", "fxquant.linear.default", "fxquant.conv2d.default", "fxquant.quantize.default",
    "fxquant.attention.default", "fxquant.cat_quantize.default", "simulate.fake_quantize",
)  # fmt: skip


class Saved:
    """The files of one saved model, to be changed and written elsewhere."""

    def __init__(self, folder: Path):
        self.manifest: dict[str, Any] = json.loads((folder / "fxquant.json").read_text())
        self.graph: dict[str, Any] = json.loads(
            (folder / self.manifest["graph"]["name"]).read_text()
        )
        model = (folder / self.manifest["model"]["name"]).read_bytes()
        length = int.from_bytes(model[:8], "little")
        self.header: dict[str, Any] = json.loads(model[8 : 8 + length])
        self.data = model[8 + length :]

    def write(self, folder: Path) -> None:
        """With names and checksums that fit, as a forger would."""
        header = json.dumps(self.header).encode()
        header += b" " * (-len(header) % 8)
        model = len(header).to_bytes(8, "little") + header + self.data
        self.write_files(folder, model, json.dumps(self.graph).encode())

    def write_files(self, folder: Path, model: bytes, graph: bytes) -> None:
        """The same for content that need not be well formed."""
        manifest = self.manifest
        for kind, suffix, content in (
            ("model", "safetensors", model),
            ("graph", "json", graph),
        ):
            digest = hashlib.sha256(content).hexdigest()
            name = f"{kind}-{digest[:16]}.{suffix}"
            (folder / name).write_bytes(content)
            if isinstance(manifest.get(kind), dict):
                truth = {"name": name, "bytes": len(content), "sha256": digest}
                manifest[kind] |= {k: v for k, v in truth.items() if k in manifest[kind]}
        (folder / "fxquant.json").write_text(forged(manifest))


def forged(manifest: dict[str, Any]) -> str:
    """A manifest whose own checksum fits."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps(rest | {"checksum": hashlib.sha256(text.encode()).hexdigest()})


def damage(source: Path, target: Path, seed: int) -> tuple[str, bool]:
    """A damaged copy of `source` in `target`: what was done, and if the checksums still fit."""
    chance = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    if chance.random() < 0.4:
        shutil.copytree(source, target)
        return chance.choice(ACCIDENTS)(target, chance), False
    target.mkdir()
    saved = Saved(source)
    return chance.choices(FORGERIES, FORGERY_WEIGHTS)[0](saved, target, chance), True


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _flip(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    content = bytearray(path.read_bytes())
    bits = [chance.randrange(8 * len(content)) for _ in range(chance.choice((1, 1, 2, 8)))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"flip bits {bits} of {path.name}"


def _truncate(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    length = chance.choice((0, 1, 7, 8, 9, chance.randrange(path.stat().st_size)))
    os.truncate(path, length)
    return f"cut {path.name} to {length}"


def _extend(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    with path.open("ab") as file:
        file.write(chance.choice((b"\0", b" ", b"}", b"\n{}", chance.randbytes(4096))))
    return f"extend {path.name}"


def _blank(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice((1, 64, 4096)))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"zero {path.name}[{start}:{stop}]"


def _swap(folder: Path, chance: random.Random) -> str:
    a, b = chance.sample(_files(folder), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return f"swap {a.name} and {b.name}"


def _remove(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    path.unlink()
    return f"remove {path.name}"


def _not_a_file(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    path.unlink()
    kind = chance.choice(("folder", "pipe", "loop", "dangling"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    return f"{path.name} is a {kind}"


ACCIDENTS: tuple[Callable[[Path, random.Random], str], ...] = (
    _flip, _flip, _flip, _truncate, _truncate, _extend, _blank, _swap, _remove, _not_a_file,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _edit(root: Any, chance: random.Random) -> str:
    """Change something somewhere; keys are as likely as what is below them."""
    places = list(_places(root))
    depth = chance.randint(1, max(map(len, places)))
    path = chance.choice([p for p in places if len(p) == depth])
    owner = root
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    return f"{_change(owner, key, chance)} at {path}"


def _change(owner: Any, key: Any, chance: random.Random) -> str:
    old = owner[key]
    how = chance.choice(("replace", "replace", "nudge", "nudge", "delete", "double", "swap", "key"))
    if how == "nudge" and type(old) in (int, float):
        owner[key] = chance.choice((old + 1, old - 1, -old, old * 2, old * 2**31, old + 0.5))
    elif how == "nudge" and isinstance(old, str) and old:
        at = chance.randrange(len(old))
        owner[key] = old[:at] + chance.choice("x0_./'\"\\*") + old[at + chance.randint(0, 1) :]
    elif how == "delete":
        del owner[key]
    elif how == "double" and isinstance(owner, list):
        owner.insert(chance.randint(0, len(owner)), copy.deepcopy(old))
    elif how == "swap" and isinstance(owner, list) and len(owner) > 1:
        other = chance.randrange(len(owner))
        owner[key], owner[other] = owner[other], old
    elif how == "key" and isinstance(owner, dict):
        owner[str(chance.choice(NASTY))[:60]] = owner.pop(key)
    else:
        how = "replace"
        owner[key] = copy.deepcopy(chance.choice(NASTY))
    return f"{how} {str(old)[:40]!r} by {str(owner[key])[:40] if _has(owner, key) else 'nothing'}"


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


def _forge_graph(saved: Saved, target: Path, chance: random.Random) -> str:
    done = [_edit(saved.graph, chance) for _ in range(chance.choice((1, 1, 1, 2, 5)))]
    saved.write(target)
    return f"graph: {done}"


def _forge_node(saved: Saved, target: Path, chance: random.Random) -> str:
    """Edits of arguments and operators, which the whole graph has few of."""
    node = chance.choice(saved.graph["nodes"])
    if chance.random() < 0.4:
        done = f"{node['op']} becomes "
        node["op"] = chance.choice((*OPERATORS, chance.choice(saved.graph["nodes"])["op"]))
        done += node["op"]
    else:
        done = _edit({"args": node["args"]}, chance)
    saved.write(target)
    return f"node {node.get('name')}: {done}"


def _forge_manifest(saved: Saved, target: Path, chance: random.Random) -> str:
    saved.write(target)
    done = [_edit(saved.manifest, chance) for _ in range(chance.choice((1, 1, 2)))]
    (target / "fxquant.json").write_text(forged(saved.manifest))
    return f"manifest: {done}"


def _forge_header(saved: Saved, target: Path, chance: random.Random) -> str:
    done = [_edit(saved.header, chance) for _ in range(chance.choice((1, 1, 2)))]
    saved.write(target)
    return f"header: {done}"


def _forge_length(saved: Saved, target: Path, chance: random.Random) -> str:
    length = chance.choice((0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1))
    header = json.dumps(saved.header).encode()
    model = length.to_bytes(8, "little") + header + saved.data
    saved.write_files(target, model, json.dumps(saved.graph).encode())
    return f"header length {length}"


def _forge_data(saved: Saved, target: Path, chance: random.Random) -> str:
    """Other weights and tables: what no checksum covers is refused only where it makes no sense."""
    data = bytearray(saved.data)
    for _ in range(chance.choice((1, 4, 64))):
        data[chance.randrange(len(data))] = chance.choice((0, 0x7F, 0x80, 0xFF))
    saved.data = bytes(data)
    saved.write(target)
    return "data"


def _forge_text(saved: Saved, target: Path, chance: random.Random) -> str:
    """JSON that is hard to parse, as graph or as header."""
    depth = chance.choice((100, 1000, 10_000, 50_000))
    text = chance.choice(
        (
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"[" * depth,
            b'{"nodes": ' + b"9" * depth + b"}",
            b'{"nodes": NaN}',
            b'{"nodes": [], "nodes": []}',
            b"\xff\xfe{}",
            b"null",
            b'"' + b"\\u0000" * 100 + b'"',
            b"-" * depth,
        )
    )
    if chance.random() < 0.5:
        saved.write_files(target, b"", text)
    else:
        model = len(text).to_bytes(8, "little") + text + saved.data
        saved.write_files(target, model, json.dumps(saved.graph).encode())
    return f"text {text[:20]!r}, depth {depth}"


def _forge_nesting(saved: Saved, target: Path, chance: random.Random) -> str:
    """Deep arguments in an otherwise good graph."""
    deep: Any = 1
    for _ in range(chance.choice((3, 5, 50, 400))):
        deep = [deep]
    node = chance.choice(saved.graph["nodes"])
    node["args"][chance.randrange(len(node["args"]))] = deep
    saved.write(target)
    return f"nest in {node['name']}"


FORGERIES: tuple[Callable[[Saved, Path, random.Random], str], ...] = (
    _forge_graph, _forge_node, _forge_manifest, _forge_header, _forge_length, _forge_data,
    _forge_text, _forge_nesting,
)  # fmt: skip
FORGERY_WEIGHTS = (8, 10, 6, 5, 1, 2, 2, 1)
