"""Statements on vectors [B, C]: timesteps, ids and embeddings, and how they reach images."""

from __future__ import annotations

from tests.fuzz.grammar.registry import template
from tests.fuzz.writer import NotApplicable, Writer


@template(3)
def sinusoid(w: Writer) -> None:
    """A timestep, whatever it is called, as sines and cosines."""
    t = w.pick("time")
    half = w.choose(8, 16)
    f = w.temporary(
        w.choose(
            f"torch.exp(-math.log(10000) * torch.arange({half}, dtype=torch.float32) / {half})",
            f"10000 ** (-torch.arange({half}) / {half})",
            f"torch.exp(torch.linspace(0, -9, {half}))",
            w.buffer(f"torch.exp(torch.linspace(0, -8, {half}))") + ".float()",
        )
    )
    a = w.temporary(
        w.choose(
            f"{t}.float()[:, None] * {f}[None]",
            f"{t}[:, None] * {f}",
            f"torch.outer({t}.to({f}.dtype), {f})",
            f'torch.einsum("b,c->bc", {t}.float(), {f})',
        )
    )
    dtype = f".to({w.arguments[0].name}.dtype)"
    w.new("vector", ("B", 2 * half), f"torch.cat([{a}.cos(), {a}.sin()], dim=-1){dtype}")


@template()
def log_sigma(w: Writer) -> None:
    t = w.pick("time")
    f = w.buffer("torch.randn(8)")
    a = w.temporary(f"torch.log({t}.float() + 1)[:, None] * {f} * 0.5")
    dtype = f".to({w.arguments[0].name}.dtype)"
    w.new("vector", ("B", 16), f"torch.cat([{a}.sin(), {a}.cos()], 1){dtype}")


@template()
def time_as_number(w: Writer) -> None:
    """The timestep scales something, without an embedding."""
    t = w.pick("time")
    x = w.pick(w.choose("image", "tokens"))
    ones = ", 1" * (len(x.dims) - 1)
    w.like(
        x,
        w.choose(
            f"{x} * (1 + {t} / 1000).to({x}.dtype).view(-1{ones})",
            f"{x} * torch.rsqrt(1 + ({t}.float() / 500) ** 2).reshape(-1{ones}).to({x}.dtype)",
        ),
    )


@template()
def learned_time(w: Writer) -> None:
    t = w.pick("time")
    table = w.layer("nn.Embedding(1000, 16)")
    w.new("vector", ("B", 16), f"{table}({t}.long())")


@template(3)
def class_embedding(w: Writer) -> None:
    ids = w.pick("ids")
    n = ids.channels
    how = w.choose("sines", "table", "scaled", "hot")
    dtype = f"{w.arguments[0].name}.dtype"
    if how == "sines":
        f = w.temporary("torch.exp(-math.log(10000) * torch.arange(8) / 8)")
        a = w.temporary(
            w.choose(
                f"{ids}.flatten()[:, None].float() * {f}",
                f"{ids}.reshape(-1).unsqueeze(1) * {f}",
                f"torch.outer({ids}.flatten(), {f})",
            )
        )
        made = f"torch.cat([{a}.sin(), {a}.cos()], -1).reshape({ids}.shape[0], -1).to({dtype})"
        w.new("vector", ("B", 16 * n), made)
    elif how == "table":
        table = w.layer("nn.Embedding(1100, 16)")
        w.new("vector", ("B", 16), f"{table}({ids}{w.maybe('.long()')}).sum(1)")
    elif how == "scaled":
        layer = w.layer(f"nn.Linear({n}, 16)")
        w.new("vector", ("B", 16), f"{layer}({ids}.to({dtype}) / 1000)")
    else:
        hot = f"F.one_hot({ids}.long() % 16, 16).sum(1)"
        w.new("vector", ("B", 16), f"{hot}.to({dtype})")


@template(3)
def time_mlp(w: Writer) -> None:
    v = w.pick("vector")
    first, second = w.layer(f"nn.Linear({v.channels}, 32)"), w.layer("nn.Linear(32, 32)")
    w.new("vector", ("B", 32), f"{second}(F.silu({first}({v})))")


@template(4)
def into_image(w: Writer) -> None:
    v, x = w.pick("vector"), w.pick("image", channels={16, 32})
    c = x.channels
    if w.choose(True, False):
        layer = w.layer(f"nn.Linear({v.channels}, {c})")
        made = w.choose(
            f"{x} + {layer}({v})[:, :, None, None]",
            f"{x} + {layer}(F.silu({v})).unsqueeze(-1).unsqueeze(-1)",
            f"{x} * torch.sigmoid({layer}({v})).view(-1, {c}, 1, 1)",
            f'torch.einsum("bchw,bc->bchw", {x}, {layer}({v}).tanh())',
        )
        w.like(x, made)
    else:
        layer = w.layer(f"nn.Linear({v.channels}, {2 * c})")
        w.line(f"scale, shift = {layer}({v})[..., None, None].chunk(2, dim=1)")
        norm = w.layer(f"nn.GroupNorm(4, {c}{w.maybe(', affine=False')})")
        w.like(x, f"{norm}({x}) * (1 + scale) + shift")


@template(3)
def into_tokens(w: Writer) -> None:
    v, x = w.pick("vector"), w.pick("tokens")
    c = x.channels
    layer = w.layer(f"nn.Linear({v.channels}, {3 * c})")
    w.line(
        w.choose(
            f"shift, scale, gate = {layer}({v}).unsqueeze(1).chunk(3, dim=-1)",
            f"shift, scale, gate = {layer}(F.silu({v})).view(-1, 3, 1, {c}).unbind(1)",
            f"shift, scale, gate = (a[:, None] for a in {layer}({v}).split({c}, 1))",
        )
    )
    norm = w.layer(f"nn.LayerNorm({c}, elementwise_affine=False)")
    inner = w.layer(f"nn.Linear({c}, {c})")
    w.like(x, f"{x} + gate * {inner}({norm}({x}) * (1 + scale) + shift)")


@template()
def vector_token(w: Writer) -> None:
    """A vector as one more token, taken off again."""
    v, x = w.pick("vector"), w.pick("tokens")
    layer = w.layer(f"nn.Linear({v.channels}, {x.channels})")
    mix = w.layer(f"nn.Linear({x.channels}, {x.channels})")
    both = w.temporary(f"torch.cat([{layer}({v})[:, None], {x}], dim=1)")
    w.line(f"{both} = {both} + {mix}({both}.softmax(1))")
    w.like(x, f"{both}[:, 1:] + {both}[:, :1]")


@template(2)
def join_vectors(w: Writer) -> None:
    v, u = w.pick("vector"), w.pick("vector")
    layer = w.layer(f"nn.Linear({v.channels + u.channels}, 32)")
    w.new("vector", ("B", 32), f"{layer}(torch.cat([{v}, {u}], dim=-1))")


@template()
def bilinear(w: Writer) -> None:
    v = w.pick("vector")
    c = v.channels
    if c > 64:
        raise NotApplicable
    w.new(
        "vector",
        v.dims,
        w.choose(
            f"F.normalize({v}, dim=-1) * 3",
            f"{v}.softmax(-1) * 8",
            f"torch.bmm({v}[:, :, None], {v}[:, None]).softmax(-1).mul(8).mean(1)",
            f"{v} @ {w.parameter(c, c, scale=round(c**-0.5, 3))}",
            f"{v}.cumsum(-1) / {c}",
            f"{v} + {v}.roll(1, -1)",
            f"{v} * {w.parameter(c)} + {w.parameter(c)}",
        ),
    )
