"""Writes the source of a random small module, line by line, keeping track of what every name holds.

A *value* is a name in `forward` with symbolic dimensions: an image ("B", 16, "H", "W"), tokens
("B", "L", 32), a vector ("B", 16), ids, a mask. A *statement* is what one template wrote: lines of
`__init__`, lines of `forward`, and the values that they make. The program stays a list of
statements, so that a failing one can be made smaller (`tests/fuzz/minimise.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

T = TypeVar("T")
Dim = int | str
HEAD = """\
import math
import torch
import torch.nn.functional as F
from torch import nn
"""


BLOCKS = """\

class Resnet(nn.Module):
    def __init__(self, channels, time=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, 1, 1)
        self.time = nn.Linear(time, channels) if time else None

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time(F.silu(emb))[:, :, None, None]
        return x + self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1, self.training))


class Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU("tanh"), nn.Linear(48, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

"""


class NotApplicable(Exception):  # noqa: N818 - a template saying "not here", no error
    """There is no value that the template could read."""


@dataclass(frozen=True)
class Value:
    """A name in forward, what kind of thing it holds, and its dimensions."""

    name: str
    kind: str
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def channels(self) -> int:
        """Of an image in dimension 1, of everything else in the last."""
        size = self.dims[1 if self.kind in ("image", "signal", "video") else -1]
        assert isinstance(size, int)
        return size


@dataclass(frozen=True)
class Argument:
    """One argument of forward: how a call makes it, in terms of B, H, W and L."""

    name: str
    made: str
    value: Value | None = None


@dataclass(frozen=True)
class Statement:
    """What one template wrote."""

    template: str
    init: tuple[str, ...]
    lines: tuple[str, ...]
    results: tuple[Value, ...]

    def reads(self, name: str) -> bool:
        return any(re.search(rf"\b{name}\b", line) for line in self.lines)


@dataclass(frozen=True)
class Program:
    """A module as a list of statements, and the sizes of its calls."""

    arguments: tuple[Argument, ...]
    statements: tuple[Statement, ...]
    sizes: dict[str, int]
    other: dict[str, int]
    dtype: str = "float32"
    in_tuple: bool = False

    @property
    def source(self) -> str:
        """The program as a file: imports, the class, how a call is made, at which sizes."""
        body = [line for s in self.statements for line in s.lines]
        parameters = ", ".join(["self", *(a.name for a in self.arguments)])
        calls = ", ".join(f'"{a.name}": {a.made}' for a in self.arguments)
        made = self._init(body)
        blocks = any("Resnet(" in line or "Transformer(" in line for line in made)
        text = [HEAD, *([BLOCKS] if blocks else []), "class Fuzzed(nn.Module):"]
        text += ["    def __init__(self):", "        super().__init__()"]
        text += [f"        {line}" for line in made]
        text += ["", f"    def forward({parameters}):"]
        text += [f"        {line}" for line in [*body, f"return {self._returned()}"]]
        text += ["", "def call(B, H, W, L):", f"    return {{{calls}}}", ""]
        text += [f"SIZES = {self.sizes}", f"OTHER = {self.other}"]
        text += [f"DTYPE = torch.{self.dtype}", ""]
        return "\n".join(text)

    def _init(self, body: Sequence[str]) -> list[str]:
        """Lines of __init__, without what templates made for a way that they did not choose."""
        lines = [line for s in self.statements for line in s.init]
        read = "\n".join(body)
        kept: list[str] = []
        for line in reversed(lines):
            made = re.match(r'self\.(?:register_buffer\("(\w+)"|(\w+) =)', line)
            if made is None or re.search(rf"\bself\.{made[1] or made[2]}\b", read):
                kept.insert(0, line)
                read += line.partition("=")[2]
        return kept

    def _returned(self) -> str:
        """The last value, with what nothing else has read added to it as a number per sample."""
        inputs = [a.value for a in self.arguments if a.value and a.value.kind in _FLOATS]
        made = [v for s in self.statements for v in s.results if v.kind in _FLOATS]
        last = (made or inputs)[-1]
        unread = [v for v in [*inputs, *made[::-1]] if v is not last and not self._is_read(v)]
        ones = ", 1" * (len(last.dims) - 1)
        extra = [f" + {v}.flatten(1).mean(1).reshape(-1{ones})" for v in unread[:2]]
        made_of = str(last) + "".join(extra)
        return f"({made_of},)" if self.in_tuple else made_of

    def _is_read(self, value: Value) -> bool:
        return any(s.reads(value.name) for s in self.statements)

    def without(self, index: int) -> list[Program]:
        """Smaller programs that lack a statement: its value is another of the same kind."""
        gone = self.statements[index]
        before, after = self.statements[:index], self.statements[index + 1 :]
        programs = [replace(self, statements=before + after)]
        for result in gone.results:
            if not any(s.reads(result.name) for s in after):
                continue
            stand_ins = [
                v
                for v in [*(v for s in before for v in s.results), *self._values()]
                if v.dims == result.dims and v.kind == result.kind
            ][-2:]
            programs = [
                replace(p, statements=tuple(_renamed(s, result.name, v.name) for s in p.statements))
                for p in programs
                for v in stand_ins
            ]
        return programs

    def _values(self) -> list[Value]:
        return [a.value for a in self.arguments if a.value]


_FLOATS = ("image", "tokens", "vector", "signal", "video")


def _renamed(statement: Statement, old: str, new: str) -> Statement:
    lines = tuple(re.sub(rf"\b{old}\b", new, line) for line in statement.lines)
    return replace(statement, lines=lines)


@dataclass
class Writer:
    """What templates write with. Everything random comes from `rng`."""

    rng: random.Random
    odd: bool = False
    arguments: list[Argument] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    _init: list[str] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)
    _results: list[Value] = field(default_factory=list)
    _count: int = 0

    # -- choosing --------------------------------------------------------------------------------
    def choose(self, *options: T) -> T:
        return options[self.rng.randrange(len(options))]

    def maybe(self, text: str, otherwise: str = "") -> str:
        return self.choose(text, otherwise)

    def pick(self, kind: str, **wanted: Any) -> Value:
        """A value of that kind, recent ones rather than old ones.

        Raises:
            NotApplicable: there is none.
        """
        found = [v for v in self.values if v.kind == kind and _fits(v, wanted)]
        if not found:
            raise NotApplicable(kind)
        back = min(self.rng.randrange(len(found)), self.rng.randrange(len(found)))
        return found[len(found) - 1 - back]

    # -- writing ---------------------------------------------------------------------------------
    def name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def layer(self, made: str) -> str:
        """self.layer3 = made, in __init__."""
        name = f"self.{self.name('layer')}"
        self._init.append(f"{name} = {made}")
        return name

    def parameter(self, *shape: Dim, scale: float = 1.0) -> str:
        name = f"self.{self.name('weight')}"
        sizes = ", ".join(map(str, shape))
        self._init.append(f"{name} = nn.Parameter(torch.randn({sizes}) * {scale})")
        return name

    def buffer(self, made: str) -> str:
        name = self.name("buffer")
        self._init.append(f'self.register_buffer("{name}", {made})')
        return f"self.{name}"

    def line(self, text: str) -> None:
        self._lines.append(text)

    def init(self, text: str) -> None:
        self._init.append(text)

    def temporary(self, made: str) -> str:
        name = self.name("a")
        self._lines.append(f"{name} = {made}")
        return name

    def new(self, kind: str, dims: Sequence[Dim], made: str) -> Value:
        value = Value(self.name("h"), kind, tuple(dims))
        self._lines.append(f"{value} = {made}")
        self._results.append(value)
        return value

    def like(self, value: Value, made: str) -> Value:
        return self.new(value.kind, value.dims, made)

    def argument(self, name: str, made: str, kind: str = "", dims: Sequence[Dim] = ()) -> None:
        if any(a.name == name for a in self.arguments):
            return
        value = Value(name, kind, tuple(dims)) if kind else None
        self.arguments.append(Argument(name, made, value))
        if value:
            self.values.append(value)

    def finish(self, template: str) -> None:
        """End a statement: its values may be read from now on."""
        self.statements.append(
            Statement(template, tuple(self._init), tuple(self._lines), tuple(self._results))
        )
        self.values += self._results
        self.drop()

    def drop(self) -> None:
        self._init, self._lines, self._results = [], [], []


def _fits(value: Value, wanted: dict[str, Any]) -> bool:
    return all(
        getattr(value, key) in want if isinstance(want, set) else getattr(value, key) == want
        for key, want in wanted.items()
    )
