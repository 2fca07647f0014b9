"""A random program: arguments, then statements by templates, each chosen by weight."""

from __future__ import annotations

import random

from tests.fuzz.grammar import images, python, tokens, vectors, writes  # noqa: F401 - they register
from tests.fuzz.grammar.registry import TEMPLATES
from tests.fuzz.writer import Argument, NotApplicable, Program, Writer

_SAMPLES = ("sample", "x", "hidden_states", "latents")
_TIMES = ("timestep", "timesteps", "t", "time", "sigma")
_TEXTS = ("encoder_hidden_states", "context", "text", "prompt_embeds")


def generate(rng: random.Random, most: int = 7, only: str = "") -> Program:
    """A program of 5 to 15 lines or so. All its randomness is `rng`'s, which may be hypothesis's.

    Args:
        most: how many statements at most, besides the first and last layers.
        only: a template that all of them are written by.
    """
    w = Writer(rng)
    w.odd = w.choose(False, False, True)
    _arguments(w)
    _first_layers(w)
    names = [name for name, (_, weight) in TEMPLATES.items() for _ in range(weight)]
    names = [only] if only else names
    wanted = len(w.statements) + rng.randint(1, most)
    for _ in range(60):
        if len(w.statements) >= wanted:
            break
        name = names[rng.randrange(len(names))]
        try:
            TEMPLATES[name][0](w)
        except NotApplicable:
            w.drop()
            continue
        w.finish(name)
    if w.choose(True, True, False):
        _last_layer(w)
    sizes, other = _sizes(w)
    in_tuple = w.rng.randrange(6) == 0
    return Program(_read(w), tuple(w.statements), sizes, other, _dtype(w), in_tuple)


def _read(w: Writer) -> tuple[Argument, ...]:
    """The arguments, few of which nothing reads."""
    idle = w.rng.randrange(8) == 0
    used = {a.name for a in w.arguments if any(s.reads(a.name) for s in w.statements)}
    return tuple(a for k, a in enumerate(w.arguments) if idle or k == 0 or a.name in used)


def _arguments(w: Writer) -> None:
    if w.choose(True, True, True, False):
        w.argument(w.choose(*_SAMPLES), "torch.randn(B, 4, H, W)", "image", ("B", 4, "H", "W"))
    else:
        w.argument(w.choose(*_SAMPLES), "torch.randn(B, L, 16)", "tokens", ("B", "L", 16))
    if w.choose(True, False):
        _time(w)
    if w.choose(True, False, False):
        w.argument(w.choose(*_TEXTS), "torch.randn(B, L, 32)", "tokens", ("B", "L", 32))
        if w.choose(True, False):
            mask = "(torch.arange(L) < torch.randint(1, L + 1, (B, 1)))"
            kind = w.choose(".long()", ".float()", "")
            w.argument("attention_mask", mask + kind, "mask", ("B", "L"))
    if w.choose(True, False, False):
        n = w.choose(1, 3)
        kind = w.choose("", ".float()")
        name = w.choose("time_ids", "class_labels", "size", "positions")
        w.argument(name, f"torch.randint(0, 1100, (B, {n})){kind}", "ids", ("B", n))


def _time(w: Writer) -> None:
    """A timestep of every sample; now and then one number for all, spread out as diffusers does."""
    name = w.choose(*_TIMES)
    if w.rng.randrange(4):
        made = w.choose(
            "torch.randint(0, 1000, (B,))",
            "torch.randint(0, 1000, (B,)).float()",
            "torch.rand(B) * 999",
        )
        w.argument(name, made, "time", ("B",))
        return
    w.argument(name, w.choose("torch.randint(0, 1000, ())", "torch.tensor(501.0)", "501"))
    first = w.arguments[0].name
    w.line(f"if not torch.is_tensor({name}): {name} = torch.tensor([{name}])")
    w.line(f"if {name}.ndim == 0: {name} = {name}[None]")
    w.new("time", ("B",), f"{name}.expand({first}.shape[0])")
    w.finish("time_of_number")


def _first_layers(w: Writer) -> None:
    """Something to work on: 16 or 32 channels, and tokens now and then."""
    first = w.values[0]
    if first.kind == "image":
        c = w.choose(16, 32)
        layer = w.layer(f"nn.Conv2d(4, {c}, 3, padding=1)")
        w.new("image", ("B", c, "H", "W"), f"{layer}({first})")
        w.finish("first_conv")
    for name, odds in (("to_tokens", 3), ("sinusoid", 2)):
        if w.rng.randrange(odds) == 0:
            try:
                TEMPLATES[name][0](w)
            except NotApplicable:
                w.drop()
                continue
            w.finish(name)


def _last_layer(w: Writer) -> None:
    for value in reversed(w.values):
        if value.kind == "image":
            layer = w.layer(f"nn.Conv2d({value.channels}, 4, 3, padding=1)")
            w.new("image", ("B", 4, *value.dims[2:]), f"{layer}({value})")
            break
        if value.kind == "tokens":
            w.like(value, f"{w.layer(f'nn.Linear({value.channels}, {value.channels})')}({value})")
            break
    w.finish("last_layer")


def _sizes(w: Writer) -> tuple[dict[str, int], dict[str, int]]:
    sides = (7, 9, 11) if w.odd else (8, 12)
    others = (7, 9, 11, 13) if w.odd else (8, 12, 16)
    sizes = {"B": w.choose(2, 2, 3, 1), "H": w.choose(*sides), "W": w.choose(*sides)}
    sizes["L"] = w.choose(5, 7)
    other = {"B": w.choose(1, 3, 4, 5), "H": w.choose(*others), "W": w.choose(*others)}
    other["L"] = w.choose(4, 6, 9)
    return sizes, other


def _dtype(w: Writer) -> str:
    return w.choose(*["float32"] * 6, "bfloat16", "float16")
